"""Turn in-place writes and views of them into operators without side effects, and what stands for several products into these."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram, default_decompositions
from torch.export.graph_signature import OutputKind

from reelstep.compiler.capture import place_of
from reelstep.errors import CompileError

aten = torch.ops.aten

COMPOSED = frozenset({aten.einsum.default, aten.tensordot.default, aten.inner.default, aten.bilinear.default, aten.chain_matmul.default})
"""What a bundle could not hold, or would not count: an equation is text, and which sizes are multiplied depends on it."""
MUTATIONS = {OutputKind.BUFFER_MUTATION: "its buffer", OutputKind.USER_INPUT_MUTATION: "its input"}


def functionalise(exported: ExportedProgram) -> ExportedProgram:
    """Otherwise the same operators: backends keep `linear`, `conv2d` and attention whole. Raises CompileError for what would change a buffer or an input.

    A graph that `decompose_ops` has traced again is functional already; tracing it once more would cost a third of a capture.
    """
    composed = COMPOSED & {node.target for node in exported.graph.nodes}
    if exported.dialect == "TRAINING" or composed:
        known: dict[Any, Any] = default_decompositions() if composed else {}
        exported = exported.run_decompositions({op: known[op] for op in composed})
    for spec in exported.graph_signature.output_specs:
        if spec.kind in MUTATIONS:
            (written,) = (node for node in exported.graph.output_node().all_input_nodes if node.name == spec.arg.name)
            what = f"{MUTATIONS[spec.kind]} {spec.target!r}{place_of(written)}"
            raise CompileError(f"its code writes into {what}; a program gives new tensors and keeps no state")
    return exported
