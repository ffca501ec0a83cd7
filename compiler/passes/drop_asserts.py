"""Remove the checks that the tracer left: sizes and dtypes are checked once, at the edge of each call."""

from __future__ import annotations

import torch
from torch.export import ExportedProgram

ASSERTS = (
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten._assert_async.msg,
    torch.ops.aten.sym_constrain_range.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
)


def drop_asserts(exported: ExportedProgram) -> ExportedProgram:
    """Casts (`x.float()`) leave `_assert_tensor_metadata`, which OpenVINO does not know."""
    for node in reversed(list(exported.graph.nodes)):
        if node.target in ASSERTS:
            exported.graph.erase_node(node)
    exported.graph_module.recompile()
    return exported
