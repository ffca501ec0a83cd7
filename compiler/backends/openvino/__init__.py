"""OpenVINO on the CPU: converted from the exported graph, compiled once, the compiled blob cached.

Tensors go in and out without a copy: requests read the caller's memory and write into fresh output tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import openvino as ov
import torch
from torch import Tensor
from torch.export import ExportedProgram

from reelstep.compiler.backends import Backend, Graph
from reelstep.compiler.backends.openvino.collectives import RUNS, Raised, conversions
from reelstep.compiler.capture import quiet_torch
from reelstep.compiler.program import Precision
from reelstep.compiler.signature import TORCH_DTYPES, Signature
from reelstep.compiler.skus import is_gpu
from reelstep.compiler.skus.cpu import SKU
from reelstep.compiler.storage import seal, sealed, write_file
from reelstep.errors import CompileError

DEVICE = "CPU"


class BoundRequest:
    """One compiled variant, ready to infer."""

    def __init__(self, compiled: ov.CompiledModel, signature: Signature, raised: Raised) -> None:
        self.request, self.raised = compiled.create_infer_request(), raised
        ports = [next((i for i, port in enumerate(compiled.inputs) if _tensor_name(k) in port.names), None) for k in range(len(signature.inputs))]
        self.ports = [(position, index) for position, index in enumerate(ports) if index is not None]  # an input that nothing reads has none
        self.outputs = [(index, edge.name, edge.sizes, TORCH_DTYPES[edge.dtype]) for index, edge in enumerate(signature.outputs)]

    def infer(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        request, rows = self.request, tensors[0].shape[0]
        for position, index in self.ports:
            request.set_input_tensor(index, ov.Tensor(tensors[position].numpy(), shared_memory=True))
        outputs = {}
        for index, name, sizes, dtype in self.outputs:
            out = outputs[name] = torch.empty((rows, *sizes), dtype=dtype)
            request.set_output_tensor(index, ov.Tensor(out.numpy(), shared_memory=True))
        try:
            request.infer(share_inputs=True, share_outputs=True)
        except RuntimeError as error:
            raise self.raised.take() or error from None
        return outputs


class OpenVinoExecutable:
    """Two variants of a program: static shapes for one row, which run faster, a dynamic batch for more. Each opens when it is first called."""

    def __init__(self, variants: Sequence[Callable[[], ov.CompiledModel]], signature: Signature, raised: Raised | None = None) -> None:
        self.signature = signature
        self.variants, self.raised = variants, raised or Raised()

    @cached_property
    def one(self) -> BoundRequest:
        return BoundRequest(self.variants[0](), self.signature, self.raised)

    @cached_property
    def many(self) -> BoundRequest:
        return BoundRequest(self.variants[-1](), self.signature, self.raised)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = [tensor.detach().contiguous() for tensor in self.signature.ordered(inputs)]
        return (self.one if tensors[0].shape[0] == 1 else self.many).infer(tensors)


class OpenVinoBackend(Backend):
    name = "openvino"
    runs = True
    own_threads = True
    collectives = frozenset(RUNS.values())

    @property
    def precisions(self) -> tuple[Precision, ...]:
        return ("float32", "bfloat16") if SKU.bf16 else ("float32",)

    def default_precision(self) -> tuple[Precision, str]:
        if not SKU.bf16:
            return "float32", "the CPU has no native bfloat16 (AVX512-BF16 or AMX)"
        return "bfloat16", "the CPU has AMX-BF16" if "amx_bf16" in SKU.features else "the CPU has AVX512-BF16"

    def runs_on(self, arch: str) -> bool:
        return not is_gpu(arch)

    def build(self, graph: Graph, signature: Signature, precision: Precision, cache: Path | None, key: str) -> OpenVinoExecutable:
        if precision not in self.precisions:
            raise CompileError(f"backend 'openvino' cannot run {precision} on {SKU.model}; it can run {', '.join(self.precisions)}")
        core = ov.Core()
        # float32 where the graph does not say otherwise: the bfloat16 hint would round the sums as well
        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": SKU.units}
        batches = [1, signature.max_batch][: signature.max_batch]
        if cache is None:
            raised = Raised()
            model = _lower(graph(), signature, precision, raised)
            ready = [core.compile_model(_for_batch(model, signature, n), DEVICE, options) for n in batches]
            return OpenVinoExecutable([partial(_given, compiled) for compiled in ready], signature, raised)
        machine = "\n".join([key, precision, ov.__version__, SKU.model, str(SKU.units), *sorted(SKU.features)])
        name = f"openvino-{hashlib.sha256(machine.encode()).hexdigest()}"
        paths = [cache / f"{name}-{n}.blob" for n in batches]
        if not all(map(sealed, paths)):
            model = _lower(graph(), signature, precision)
            for n, path in zip(batches, paths, strict=True):
                compiled = core.compile_model(_for_batch(model, signature, n), DEVICE, options)
                seal(path, lambda temporary, compiled=compiled: write_file(temporary, _export(compiled)))  # type: ignore[misc]
        return OpenVinoExecutable([partial(_open, core, path, options) for path in paths], signature)


def _given(compiled: ov.CompiledModel) -> ov.CompiledModel:
    return compiled


def _open(core: ov.Core, blob: Path, options: Mapping[str, Any]) -> ov.CompiledModel:
    return core.import_model(blob.read_bytes(), DEVICE, options)


def _export(compiled: ov.CompiledModel) -> bytes:
    stream: Any = compiled.export_model()
    return bytes(stream) if not hasattr(stream, "getvalue") else bytes(stream.getvalue())


def _tensor_name(position: int) -> str:
    return f"reelstep_input_{position}"


def _lower(exported: ExportedProgram, signature: Signature, precision: Precision, raised: Raised | None = None) -> ov.Model:
    from reelstep.compiler.passes.mixed_precision import mixed_precision  # here: an engine from the cache needs no passes

    return _convert(mixed_precision(exported, signature) if precision == "bfloat16" else exported, signature, raised)


def _convert(exported: ExportedProgram, signature: Signature, raised: Raised | None) -> ov.Model:
    """The OpenVINO model with our names on its inputs. raised: where its collectives say what went wrong; a model that will be saved has none."""
    where = f"program {signature.program!r} at profile {signature.profile!r}"
    try:
        with quiet_torch():
            extension = None if raised is None else conversions(raised)
            model: ov.Model = ov.convert_model(exported, extension=extension)
    except Exception as error:  # the frontend raises its own unexported classes
        raise CompileError(f"{where} cannot be converted to OpenVINO: {error}") from error
    for position, name in enumerate(exported.graph_signature.user_inputs):
        port = next((port for port in model.inputs if name in port.get_names()), None)
        if port is not None:
            port.get_tensor().set_names({_tensor_name(position)})
    return model


def _for_batch(model: ov.Model, signature: Signature, rows: int) -> ov.Model:
    """The model for up to `rows` rows; for one row every shape is static."""
    sizes = {_tensor_name(position): edge.sizes for position, edge in enumerate(signature.inputs)}
    batch = ov.Dimension(1, rows) if rows > 1 else 1
    made: ov.Model = model.clone()
    made.reshape({port: ov.PartialShape([batch, *sizes[port.get_any_name()]]) for port in made.inputs})
    return made


BACKEND = OpenVinoBackend()
