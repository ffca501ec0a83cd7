"""A weight that is only read in a narrower precision is stored in it, where a backend would cast it again at every call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from reelstep.compiler.passes.drop_unused_weights import WEIGHTS

aten = torch.ops.aten


def cast_weights(exported: ExportedProgram) -> ExportedProgram:
    """A weight that something also reads as it is stays, and so do the casts of it. The values that are read are the same."""
    targets = {spec.arg.name: spec.target for spec in exported.graph_signature.input_specs if spec.kind in WEIGHTS}
    for node in exported.graph.find_nodes(op="placeholder"):
        if node.name in targets:
            held: Any = exported.state_dict if targets[node.name] in exported.state_dict else exported.constants
            held[targets[node.name]] = _as_read(node, held[targets[node.name]])
    exported.graph_module.recompile()
    return exported


def _as_read(node: Node, weight: Tensor) -> Tensor:
    """The weight as all users of its node read it, which then read it without a cast."""
    dtypes = {_cast_to(user) for user in node.users}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    if dtype is None or not weight.is_floating_point() or dtype.itemsize >= weight.dtype.itemsize:
        return weight
    node.meta["val"] = node.meta["val"].to(dtype)
    for cast in tuple(node.users):
        cast.replace_all_uses_with(node)
        node.graph.erase_node(cast)
    narrow = weight.detach().to(dtype)
    return nn.Parameter(narrow, requires_grad=False) if isinstance(weight, nn.Parameter) else narrow


def _cast_to(node: Node) -> torch.dtype | None:
    """The dtype that a node casts to, if it does nothing else."""
    if node.target is aten.to.dtype and len(node.args) == 2 and not node.kwargs:
        return node.args[1]  # type: ignore[return-value]  # by the operator's schema
    return None
