"""OpenVINO on the CPU: converted from the exported graph, compiled once, the compiled blob cached.

Tensors go in and out without a copy: requests read the caller's memory and write into fresh output tensors.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import openvino as ov

from reelstep.compiler.backends import Backend, Executable, Graph
from reelstep.compiler.program import Precision
from reelstep.compiler.signature import Signature, torch_dtype
from reelstep.compiler.skus import is_gpu
from reelstep.compiler.skus.cpu import SKU
from reelstep.compiler.storage import check_writable, read_sealed, seal, sealed, write_file
from reelstep.errors import CompileError

if TYPE_CHECKING:  # an engine is taken from the cache without torch
    from torch import Tensor
    from torch._ops import OpOverload

    from reelstep.compiler.backends.openvino.collectives import Raised

DEVICE = "CPU"
LANES = 2
"""Parts of the threads that run a row each where a call has more than one: guidance brings rows in pairs. After every operator the threads of one row
wait for the slowest; rows side by side do not."""
SMALL = 8192
"""Numbers that a row reads and writes. Where there are fewer (of a time, say), handing it over takes longer than what is computed, and all rows go at once."""


class Variant(NamedTuple):
    """How a program runs: up to so many rows at once (for one, every shape is static), so many times side by side on parts of the threads."""

    rows: int
    lanes: int


ALONE = Variant(1, 1)


def variants_of(signature: Signature, meets: bool) -> tuple[Variant, ...]:
    """For a lone row, then for more. meets: whether it meets other ranks, all its rows together."""
    if signature.max_batch == 1:
        return (ALONE,)
    numbers = sum(math.prod(edge.sizes) for edge in (*signature.inputs, *signature.outputs))
    return ALONE, Variant(signature.max_batch, 1) if meets or SKU.units < LANES or numbers < SMALL else Variant(1, LANES)


def tensor_name(position: int) -> str:
    """Of an input, in an engine."""
    return f"reelstep_input_{position}"


class Bound:
    """An infer request of a compiled variant."""

    def __init__(self, compiled: ov.CompiledModel, signature: Signature) -> None:
        self.request = compiled.create_infer_request()
        ports = [next((i for i, port in enumerate(compiled.inputs) if tensor_name(k) in port.names), None) for k in range(len(signature.inputs))]
        self.ports = [(position, index) for position, index in enumerate(ports) if index is not None]  # an input that nothing reads has none

    def bind(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> ov.InferRequest:
        """The request, which is to read and write these."""
        for position, index in self.ports:
            self.request.set_input_tensor(index, ov.Tensor(inputs[position].numpy(), shared_memory=True))
        for index, out in enumerate(outputs):
            self.request.set_output_tensor(index, ov.Tensor(out.numpy(), shared_memory=True))
        return self.request


class OpenVinoExecutable(Executable):
    """A program's variants, each opened when it is first called.

    raised: where collectives in it say what went wrong; None where it has none.
    """

    def __init__(self, variants: Mapping[Variant, Callable[[], ov.CompiledModel]], signature: Signature, raised: Raised | None = None) -> None:
        self.variants, self.signature, self.raised = variants, signature, raised
        *_, self.many = variants
        self._opened: dict[Variant, list[Bound]] = {}
        self._opening = Lock()

    def open(self, rows: int) -> None:
        beside = self._beside(rows)
        if beside:
            self._lanes(self.many)
        if beside < rows:
            self._lanes(ALONE)

    def _beside(self, rows: int) -> int:
        """Of so many rows those that do not run alone: all at once, or as many as fill all lanes. One that is left over gets all threads."""
        if self.many.rows > 1:
            return rows if rows > 1 else 0
        return rows - rows % self.many.lanes if self.many.lanes > 1 else 0

    def _lanes(self, variant: Variant) -> list[Bound]:
        """Opened by whoever asks first."""
        with self._opening:
            if variant not in self._opened:
                with ThreadPoolExecutor(variant.lanes) as pool:  # opening one keeps a single core at work
                    self._opened[variant] = list(pool.map(lambda _: Bound(self.variants[variant](), self.signature), range(variant.lanes)))
            return self._opened[variant]

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        import torch

        tensors = [tensor.detach().contiguous() for tensor in self.signature.ordered(inputs)]
        rows = len(tensors[0])
        outputs = {edge.name: torch.empty((rows, *edge.sizes), dtype=torch_dtype(edge.dtype)) for edge in self.signature.outputs}
        try:
            self._run(tensors, list(outputs.values()), rows)
        except RuntimeError as error:
            raise (self.raised and self.raised.take()) or error from None
        return outputs

    def _run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], rows: int) -> None:
        beside = self._beside(rows)
        lanes = self._lanes(self.many) if beside else []
        if self.many.rows > 1 and lanes:
            lanes[0].bind(inputs, outputs).infer(share_inputs=True, share_outputs=True)
            return

        def row(bound: Bound, k: int) -> ov.InferRequest:
            return bound.bind([x[k : k + 1] for x in inputs], [y[k : k + 1] for y in outputs])

        try:
            for k in range(beside):
                lane = lanes[k % self.many.lanes]
                if k >= self.many.lanes:
                    lane.request.wait()
                row(lane, k).start_async(share_inputs=True)
        finally:
            for lane in lanes:  # what runs writes to the caller's memory, also when a neighbour has failed
                lane.request.wait()
        for k in range(beside, rows):
            row(self._lanes(ALONE)[0], k).infer(share_inputs=True, share_outputs=True)


class OpenVinoBackend(Backend):
    name = "openvino"
    runs = True
    own_threads = True

    @property
    def collectives(self) -> frozenset[OpOverload]:
        from reelstep.compiler.backends.openvino.collectives import RUNS  # here: one device is spared torch's own

        return frozenset(RUNS.values())

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
        if cache is None:
            exported = graph()
            from reelstep.compiler.backends.openvino.collectives import Raised, has_collectives
            from reelstep.compiler.backends.openvino.convert import for_batch, lower

            raised = Raised()
            model = lower(exported, signature, precision, raised)
            variants = variants_of(signature, has_collectives(model))
            compiled = {rows: core.compile_model(for_batch(model, signature, rows), DEVICE, options_of(ALONE)) for rows, _ in variants}
            ready = {v: partial(_given, compiled[v.rows]) if v.lanes == 1 else partial(_again, core, compiled[v.rows], options_of(v)) for v in variants}
            return OpenVinoExecutable(ready, signature, raised)
        machine = "\n".join([key, precision, ov.__version__, SKU.model, str(SKU.units), *sorted(SKU.features)])
        name = f"openvino-{hashlib.sha256(machine.encode()).hexdigest()}"
        variants = variants_of(signature, meets=False)
        paths = {rows: cache / f"{name}-rows{rows}.blob" for rows, _ in variants}
        if not all(map(sealed, paths.values())):
            check_writable(cache)
            exported = graph()
            from reelstep.compiler.backends.openvino.convert import for_batch, lower  # here: an engine from the cache needs neither it nor the passes

            model = lower(exported, signature, precision)
            for rows, path in paths.items():
                made = core.compile_model(for_batch(model, signature, rows), DEVICE, options_of(ALONE))
                seal(path, partial(_save, made))
        return OpenVinoExecutable({v: partial(_open, core, paths[v.rows], options_of(v)) for v in variants}, signature)


def options_of(variant: Variant) -> dict[str, Any]:
    # float32 where the graph does not say otherwise: the bfloat16 hint would round the sums as well
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": SKU.units // variant.lanes}
    if not SKU.int8:  # OpenVINO would multiply integers all the same, and be wrong by up to a fifth
        options["LP_TRANSFORMS_MODE"] = "NO"
    # each lane is an engine of its own, and pinned they would all sit on the first cores; streams of one engine share weights that some layers spoil
    return options if variant.lanes == 1 else {**options, "ENABLE_CPU_PINNING": False}


def _given(compiled: ov.CompiledModel) -> ov.CompiledModel:
    return compiled


def _again(core: ov.Core, compiled: ov.CompiledModel, options: Mapping[str, Any]) -> ov.CompiledModel:
    return core.import_model(_export(compiled), DEVICE, options)


def _open(core: ov.Core, blob: Path, options: Mapping[str, Any]) -> ov.CompiledModel:
    return core.import_model(read_sealed(blob), DEVICE, options)


def _save(compiled: ov.CompiledModel, path: Path) -> None:
    write_file(path, _export(compiled))


def _export(compiled: ov.CompiledModel) -> bytes:
    stream: Any = compiled.export_model()
    return bytes(stream) if not hasattr(stream, "getvalue") else bytes(stream.getvalue())


BACKEND = OpenVinoBackend()
