"""Remove weights that the program does not read: a decoder program of an autoencoder holds no encoder."""

from __future__ import annotations

from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec

WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def drop_unused_weights(exported: ExportedProgram) -> ExportedProgram:
    unused = {node.name: node for node in exported.graph.nodes if node.op == "placeholder" and not node.users}
    specs = exported.graph_signature.input_specs
    dropped = [spec for spec in specs if spec.kind in WEIGHTS and spec.arg.name in unused]
    for spec in dropped:
        exported.graph.erase_node(unused[spec.arg.name])
    exported.graph_module.recompile()
    return _with_inputs(exported, [spec for spec in specs if spec not in dropped])


def _with_inputs(exported: ExportedProgram, specs: list[InputSpec]) -> ExportedProgram:
    kept = {spec.target for spec in specs}
    return ExportedProgram(
        root=exported.graph_module,
        graph=exported.graph,
        graph_signature=ExportGraphSignature(specs, exported.graph_signature.output_specs),
        state_dict={name: tensor for name, tensor in exported.state_dict.items() if name in kept},
        range_constraints=exported.range_constraints,
        module_call_graph=exported.module_call_graph,
        example_inputs=exported.example_inputs,
        constants={name: tensor for name, tensor in exported.constants.items() if name in kept},
        verifiers=exported.verifiers,
    )
