"""Nodes of a graph, read and rewritten where they stand."""

from __future__ import annotations

from typing import Any

from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.node import map_arg


def arguments_of(node: Node) -> dict[str, Any]:
    """Of an operator's call, by name, with what the schema says of those that are not given."""
    assert isinstance(node.target, OpOverload)
    schema = node.target._schema.arguments
    given = {each.name: value for each, value in zip(schema, node.args, strict=False)}
    return {each.name: each.default_value for each in schema} | given | dict(node.kwargs)


def call(graph: Graph, target: Any, *args: Any) -> Node:
    """A call at the graph's point of insertion, with the shape, dtype and layout that its value will have."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*map_arg(args, lambda each: each.meta["val"]))
    return node


def replace(graph: Graph, node: Node, target: Any, *args: Any, **options: Any) -> None:
    """Call something else in a node's place, whose value is as the node's was."""
    with graph.inserting_before(node):
        found = graph.call_function(target, args, options)
    found.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(found)
    graph.erase_node(node)
