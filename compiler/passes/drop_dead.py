"""Remove what no output needs."""

from __future__ import annotations

from torch.export import ExportedProgram


def drop_dead(exported: ExportedProgram) -> ExportedProgram:
    exported.graph.eliminate_dead_code()
    exported.graph_module.recompile()
    return exported
