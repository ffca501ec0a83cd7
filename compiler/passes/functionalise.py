"""Turn in-place writes and views of them into operators without side effects."""

from __future__ import annotations

from torch.export import ExportedProgram


def functionalise(exported: ExportedProgram) -> ExportedProgram:
    """Same operators, none decomposed: backends keep `linear`, `conv2d` and attention whole.

    A graph that `decompose_ops` has traced again is functional already; tracing it once more would cost a third of a capture.
    """
    if exported.dialect != "TRAINING":
        return exported
    functional: ExportedProgram = exported.run_decompositions({})
    return functional
