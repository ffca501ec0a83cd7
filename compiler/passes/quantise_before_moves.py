"""Round a tensor to its grid before its dims are moved, so that the runtime can take the rounding into what computes the tensor.

Attention gives heads apart, and the layer behind it reads them joined. Rounding treats every number alike, wherever it lies, so it may come first: then
OpenVINO's attention writes integers itself, and what is moved is a quarter of the bytes.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch.export import ExportedProgram
from torch.fx import Node

aten = torch.ops.aten

FAKE_QUANTISE = aten.fake_quantize_per_tensor_affine.default
MOVES = frozenset({aten.view.default, aten.permute.default, aten.transpose.int, aten.reshape.default, aten._unsafe_view.default, aten.clone.default})
"""Operators after which the same numbers lie elsewhere."""


def quantise_before_moves(exported: ExportedProgram) -> ExportedProgram:
    graph = exported.graph
    for rounded in [node for node in graph.nodes if node.target is FAKE_QUANTISE]:
        first = last = rounded.args[0]
        if not _moves(first):
            continue
        while _moves(first.args[0]):
            first = first.args[0]
        source: Any = first.args[0]
        with graph.inserting_before(first):
            earlier = graph.call_function(FAKE_QUANTISE, (source, *rounded.args[1:]))
        earlier.meta["val"] = torch.empty_like(source.meta["val"])
        first.update_arg(0, earlier)
        rounded.replace_all_uses_with(last)
        graph.erase_node(rounded)
    exported.graph_module.recompile()
    return exported


def is_rounded(value: object) -> bool:
    """Whether a node gives numbers of a grid, moved or not."""
    while _moves(value):
        value = value.args[0]
    return isinstance(value, Node) and value.target is FAKE_QUANTISE


def _moves(value: object) -> TypeGuard[Node]:
    """A move whose result is read once: another reader would get rounded numbers too."""
    return isinstance(value, Node) and value.target in MOVES and len(value.users) == 1
