"""Give uninitialised memory a value.

In-place code (rotary embeddings that fill an `empty_like`) leaves such operators behind once it is functional. Their
content is overwritten, but OpenVINO refuses them, and no backend can be compared with another on memory nobody wrote.
"""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

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
        with graph.inserting_before(node):
            if node.target is aten.empty_like.default:
                zeros = graph.call_function(aten.zeros_like.default, (node.args[0],), {"dtype": value.dtype})
            else:
                sizes = node.args[1] if node.target in (aten.new_empty.default, aten.new_empty_strided.default) else node.args[0]
                zeros = graph.call_function(aten.full.default, (sizes, 0), {"dtype": value.dtype, "device": value.device})
        zeros.meta["val"] = value
        node.replace_all_uses_with(zeros)
        graph.erase_node(node)
    exported.graph_module.recompile()
    return exported
