"""Give uninitialised memory a value.

In-place code (rotary embeddings that fill an `empty_like`) leaves such operators behind once it is functional. Their
content is overwritten, but OpenVINO refuses them, and no backend can be compared with another on memory nobody wrote.
"""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

from reelstep.compiler.nodes import replace

aten = torch.ops.aten

EMPTY_OPS = (
    aten.empty_like.default,
    aten.empty.memory_format,
    aten.empty_permuted.default,
    aten.empty_strided.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
)


def define_empty(exported: ExportedProgram) -> ExportedProgram:
    """Every `empty` becomes zeros of the same sizes and dtype; the layout is left to the backend."""
    graph = exported.graph
    for node in list(graph.nodes):
        if node.target not in EMPTY_OPS:
            continue
        value = node.meta["val"]
        if node.target is aten.empty_like.default:
            replace(graph, node, aten.zeros_like.default, node.args[0], dtype=value.dtype)
        else:
            sizes = node.args[1] if node.target in (aten.new_empty.default, aten.new_empty_strided.default) else node.args[0]
            replace(graph, node, aten.full.default, sizes, 0, dtype=value.dtype, device=value.device)
    exported.graph_module.recompile()
    return exported
