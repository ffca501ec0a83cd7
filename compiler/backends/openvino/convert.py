"""From the exported graph to OpenVINO's model of it, with the shapes that an engine is compiled for."""

from __future__ import annotations

import openvino as ov
import openvino.opset13 as op
from openvino.tools.ovc.logger import get_logger_state, restore_logger_state
from torch.export import ExportedProgram

from reelstep.compiler.backends.openvino import tensor_name
from reelstep.compiler.backends.openvino.attention import read_keys_in_place
from reelstep.compiler.backends.openvino.collectives import Raised, conversions
from reelstep.compiler.backends.openvino.decoder import decoder_of
from reelstep.compiler.capture import quiet_torch
from reelstep.compiler.passes.mixed_precision import mixed_precision
from reelstep.compiler.program import Precision
from reelstep.compiler.signature import Signature
from reelstep.errors import CompileError


def lower(exported: ExportedProgram, signature: Signature, precision: Precision, raised: Raised | None = None) -> ov.Model:
    """The model of any number of rows. raised: where its collectives say what went wrong; one that will be saved has none. Raises CompileError."""
    return _convert(mixed_precision(exported, signature) if precision == "bfloat16" else exported, signature, raised)


def _convert(exported: ExportedProgram, signature: Signature, raised: Raised | None) -> ov.Model:
    """The OpenVINO model with our names on its inputs. raised: where its collectives say what went wrong; a model that will be saved has none."""
    where, logging = f"program {signature.program!r} at profile {signature.profile!r}", get_logger_state()
    try:
        with quiet_torch():
            extension = None if raised is None else conversions(raised)
            model: ov.Model = ov.convert_model(decoder_of(exported), extension=extension)
    except Exception as error:  # the frontend raises its own unexported classes
        restore_logger_state(logging)  # of the whole process, which only a conversion that succeeds puts back
        raise CompileError(f"{where} cannot be converted to OpenVINO: {error}") from error
    for position, name in enumerate(exported.graph_signature.user_inputs):
        port = next((port for port in model.inputs if name in port.get_names()), None)
        if port is not None:
            port.get_tensor().set_names({tensor_name(position)})
    _compute_outputs(model)
    return model


def _compute_outputs(model: ov.Model) -> None:
    """An output that is an input, at most in another shape, is one that OpenVINO never writes to memory of ours: it becomes the larger one of it and itself."""
    for result in model.get_results():
        source = given = result.input_value(0)
        while given.get_node().get_type_name() in ("Reshape", "Squeeze", "Unsqueeze", "Convert"):
            given = given.get_node().input_value(0)
        if given.get_node().get_type_name() == "Parameter":
            result.input(0).replace_source_output(op.maximum(source, source).output(0))


def for_batch(model: ov.Model, signature: Signature, rows: int) -> ov.Model:
    """The model for up to `rows` rows; for one row every shape is static."""
    sizes = {tensor_name(position): edge.sizes for position, edge in enumerate(signature.inputs)}
    batch = ov.Dimension(1, rows) if rows > 1 else 1
    made: ov.Model = model.clone()
    made.reshape({port: ov.PartialShape([batch, *sizes[port.get_any_name()]]) for port in made.inputs})
    read_keys_in_place(made)
    return made
