"""Put our attention in the place of torch's, for a backend that keeps the op: the way back of `decompose_ops`.

Models call torch's. It has gradients and takes masks, it is what splits over ranks and trains by its name, and every backend knows it; what ours adds is
for GPUs alone, where it picks among FlashAttention-3, cuDNN's and our kernel as it runs, and gives its result in the layout that the next product reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import getitem
from typing import Any

import torch
from torch.export import ExportedProgram

from reelstep.compiler.nodes import call
from reelstep.kernels import OPS
from reelstep.kernels.attention_choice import AUTO
from reelstep.kernels.attention_triton import MAX_HEAD

aten = torch.ops.aten


def compose_attention(exported: ExportedProgram, keep: Iterable[str] = ()) -> ExportedProgram:
    """keep: as for `decompose_ops`. Before the graph is traced again, since what reads the result may be a view of it, or not, by its layout."""
    op = OPS["attention"]
    if op.name not in keep:
        return exported
    graph = exported.graph
    for node in list(graph.nodes):
        if not _is_plain(node):
            continue
        q, k, v = node.args[:3]
        arguments = (q, k, v, None, node.kwargs.get("scale") or q.meta["val"].shape[-1] ** -0.5, AUTO)
        with graph.inserting_before(node):
            out = call(graph, getitem, call(graph, op.overload, *arguments), 0)
        node.replace_all_uses_with(out)
        graph.erase_node(node)
    exported.graph_module.recompile()
    return exported


def _is_plain(node: Any) -> bool:
    """Torch's attention of what our kernels take: no mask nor dropout, as many heads of keys as of queries, [B, N, L, K] with K up to MAX_HEAD."""
    if node.target is not aten.scaled_dot_product_attention.default or len(node.args) > 3 or {*node.kwargs} - {"scale"}:
        return False
    q, k, v = (argument.meta["val"] for argument in node.args)
    scale = node.kwargs.get("scale")
    known = q.ndim == 4 and q.shape[-1] <= MAX_HEAD and (scale is None or scale > 0) and q.dtype == k.dtype == v.dtype
    return bool(known and k.shape == v.shape and q.shape[:2] == k.shape[:2] and q.shape[-1] == k.shape[-1])
