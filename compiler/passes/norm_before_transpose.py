"""Norm queries and keys before their heads are moved, so that the backend's attention can take the move into itself.

Models split heads and then norm them, as papers draw it: linear, transpose, norm, attention. A norm over the last dim does not care
where the other dims lie, and a fused attention reads its operands through any permutation, but not through a norm. OpenVINO then runs
half as many transposes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from reelstep.compiler.nodes import call
from reelstep.compiler.passes.mixed_precision import ROW_NORMS

aten = torch.ops.aten

TRANSPOSES = frozenset({aten.permute.default, aten.transpose.int})


def norm_before_transpose(exported: ExportedProgram) -> ExportedProgram:
    graph = exported.graph
    for norm in list(graph.nodes):
        if not _commutes(norm):
            continue
        transpose = norm.args[0]
        source, *dims = transpose.args
        with graph.inserting_before(norm):
            normed = graph.call_function(norm.target, (source, *norm.args[1:]), norm.kwargs)
            normed.meta["val"] = torch.empty_like(source.meta["val"], dtype=norm.meta["val"].dtype)
            moved = call(graph, transpose.target, normed, *dims)
        norm.replace_all_uses_with(moved)
        graph.erase_node(norm)
        graph.erase_node(transpose)
    exported.graph_module.recompile()
    return exported


def _commutes(node: Any) -> bool:
    """A norm over the last dim alone, of a transpose that keeps that dim and serves nothing else, read by attention only."""
    if node.target not in ROW_NORMS or len(node.args[1]) != 1:
        return False
    source = node.args[0]
    if not isinstance(source, Node) or source.target not in TRANSPOSES or len(source.users) != 1:
        return False
    last = source.meta["val"].ndim - 1
    moved = source.target(torch.empty(*range(last + 1)), *source.args[1:])  # every dim is as long as it is far in
    return moved.shape[-1] == last and all(user.target is aten.scaled_dot_product_attention.default for user in node.users)
