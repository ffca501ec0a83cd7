"""A plan and its weights become an executable: TensorRT's runtime on torch's memory, streams and graphs.

Of torch and not of cuda-python: the tensors of calls are torch's, so one allocator sees all memory of the process and one order of streams holds between
an engine and what surrounds it, and Torch-TensorRT needs torch's CUDA anyway.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorrt as trt
import torch
import torch.distributed as dist
from torch import Tensor
from torch_tensorrt.logging import TRT_LOGGER

from reelstep.compiler.backends import AT_WORK, Executable
from reelstep.compiler.backends.tensorrt.build import STREAM_ABOVE, row_ranges
from reelstep.compiler.backends.tensorrt.records import Records
from reelstep.compiler.recording import record
from reelstep.compiler.signature import Edge, Signature, torch_dtype
from reelstep.errors import CompileError, InternalError, Unavailable

TRT_DTYPES = {
    torch.float32: trt.DataType.FLOAT, torch.bfloat16: trt.DataType.BF16, torch.float16: trt.DataType.HALF, torch.float8_e4m3fn: trt.DataType.FP8,
    torch.int64: trt.DataType.INT64, torch.int32: trt.DataType.INT32, torch.int8: trt.DataType.INT8, torch.bool: trt.DataType.BOOL,
}  # fmt: skip

RESERVE_BYTES = 1 << 30
"""Left free when weights are placed: torch's own tensors, other engines' activations, and what the driver takes."""

RESTART_S = 30.0
"""After which a caller of a lost device may come again."""

WORKSPACE = ""
"""Among buffers by name: no tensor is called so."""


@dataclass(frozen=True)
class Plan:
    """What a run needs of a build. inputs, outputs: the plan's names in the order of the signature. weights: by the plan's names, on the CPU.

    path: where the plan lies, if it was kept.
    """

    data: bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: Mapping[str, Tensor]
    collectives: bool
    path: Path | None


def streaming_budget(streamable: int, activations: int, free: int) -> int:
    """Bytes of weights to keep on the GPU, out of `streamable`, where `free` bytes must hold the activations too."""
    return max(0, min(streamable, free - activations - RESERVE_BYTES))


class TensorRtExecutable(Executable):
    """One engine: one workspace and one set of buffers for all numbers of rows, and for each a context with its CUDA graph.

    The batch is the first dim, so fewer rows are the beginning of the same buffers and every graph finds them where it left them. A recorded graph refers to
    state of its context, which another shape would change: so no context is given another.
    """

    def __init__(self, plan: Plan, signature: Signature, device: torch.device) -> None:
        self.signature, self.device = signature, device
        self.inputs, self.outputs, self.collectives = plan.inputs, plan.outputs, plan.collectives  # and not the plan, which holds all weights
        self.records = Records()
        self.stream = torch.cuda.Stream(device)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        with self.records, torch.cuda.device(device):
            self.runtime = trt.Runtime(TRT_LOGGER)
            self.records.watch(self.runtime)
            if plan.collectives:
                check_links(device)
            torch.cuda.empty_cache()  # what torch keeps for itself TensorRT cannot have, and it counts as taken
            self.engine = self.runtime.deserialize_cuda_engine(plan.data)
            if self.engine is None:
                raise CompileError(self._unloaded(plan.weights))
            self.records_graphs = self._place_weights() and not plan.collectives  # streamed weights and exchanges were not tried under capture
            self._refit(plan.weights)
            self._check_edges()
            self.buffers = self._allocate()
            self.workspace = self.buffers.pop(WORKSPACE)
            self.contexts: dict[int, trt.IExecutionContext] = {}
            self.stream.wait_stream(torch.cuda.current_stream(device))

    @property
    def where(self) -> str:
        return f"program {self.signature.program!r} at profile {self.signature.profile!r}"

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs lie where the first input does. Raises InternalError if TensorRT fails, Unavailable if the device does."""
        tensors = self.signature.ordered(inputs)
        try:
            return self._call(tensors)
        except torch.AcceleratorError as error:
            raise Unavailable(f"{self.where}: device {self.device} failed ({error}); start this process again", retry_after_s=RESTART_S) from error

    def _call(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        rows, home = tensors[0].shape[0], tensors[0].device
        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        with self.records, torch.cuda.stream(self.stream):
            for name, tensor in zip(self.inputs, tensors, strict=True):
                self.buffers[name][:rows].copy_(tensor)
            self._run(rows)
            outputs = {edge.name: self._leave(self.buffers[name][:rows], home) for name, edge in zip(self.outputs, self.signature.outputs, strict=True)}
        caller.wait_stream(self.stream)
        for tensor in outputs.values():
            if tensor.is_cuda:
                tensor.record_stream(caller)  # made on our stream; its memory may be given again only after the caller is done with it
        return outputs

    def _leave(self, tensor: Tensor, home: torch.device) -> Tensor:
        """A copy in memory of its own. One on the CPU is complete when this returns."""
        return tensor.clone() if home == self.device else tensor.to(home)

    def _run(self, rows: int) -> None:
        if rows in self.graphs:
            self.graphs[rows].replay()
        elif rows in self.contexts:
            self._enqueue(self.contexts[rows])
        else:
            with AT_WORK:
                self.contexts[rows] = context = self._context(rows)
                self._enqueue(context)
                if self.records_graphs:
                    self._record(rows, context)

    def _record(self, rows: int, context: trt.IExecutionContext) -> None:
        """Runs a second time, into a graph. Where that cannot be, the outputs of the first run stand, and this executable goes on without more graphs."""
        self.stream.synchronize()
        found = record(lambda: self._enqueue(context), self.stream, self.where)
        if found is None:
            self.records_graphs = False
        else:
            self.graphs[rows] = found[0]

    def _enqueue(self, context: trt.IExecutionContext) -> None:
        if not context.execute_async_v3(self.stream.cuda_stream):
            raise InternalError(f"{self.where} failed to run. {self.records.explain()}")

    def _place_weights(self) -> bool:
        """Choose how many bytes of weights stay on the GPU, before anything else is placed there. Gives whether all do."""
        streamable: int = self.engine.streamable_weights_size
        if streamable == 0:
            return True
        self.engine.weight_streaming_budget_v2 = 0
        free, _ = torch.cuda.mem_get_info(self.device)
        budget = streaming_budget(streamable, self.engine.device_memory_size_v2, free)
        self.engine.weight_streaming_budget_v2 = budget
        return budget >= streamable

    def _unloaded(self, weights: Mapping[str, Tensor]) -> str:
        """Why TensorRT made no engine of the plan: it says so in its log at best, and a lack of memory is told by what is free."""
        needed, (free, total) = sum(weight.nbytes for weight in weights.values()), torch.cuda.mem_get_info(self.device)
        if needed <= free:
            return f"{self.where} has a plan that TensorRT {trt.__version__} cannot read; remove the engine cache to build it again. {self.records.explain()}"
        return (
            f"{self.where} needs {needed / 1e9:.2f} GB for its weights, and {free / 1e9:.2f} of {total / 1e9:.2f} GB are free; load fewer programs on this "
            "device, or compile the model in fewer bits (--quantise) or for ranks that share its weights (--mesh tp=2). Weights stay in host memory only "
            f"where they are more than {STREAM_ABOVE:.0%} of the device's memory when the plan is built. {self.records.explain()}"
        )

    def _refit(self, weights: Mapping[str, Tensor]) -> None:
        """Give the stripped plan its weights."""
        refitter = trt.Refitter(self.engine, TRT_LOGGER)
        self.records.watch(refitter)
        kept = []
        for name in refitter.get_all_weights():
            if name not in weights:
                raise CompileError(f"{self.where}: the plan wants weights {name!r}, which the graph has not; remove the engine cache to build it again")
            tensor = weights[name].detach().cpu().contiguous()
            kept.append(tensor)  # TensorRT reads them when it refits
            if not refitter.set_named_weights(name, trt.Weights(TRT_DTYPES[tensor.dtype], tensor.data_ptr(), tensor.numel()), trt.TensorLocation.HOST):
                raise CompileError(f"{self.where}: TensorRT refuses weights {name!r}, {tensor.dtype} {list(tensor.shape)}. {self.records.explain()}")
        absent = refitter.get_missing_weights()
        if absent or not refitter.refit_cuda_engine():
            raise CompileError(f"{self.where} cannot be given its weights; missing: {', '.join(absent) or 'none'}. {self.records.explain()}")

    def _edges(self) -> dict[str, Edge]:
        """By the plan's names."""
        return dict(zip((*self.inputs, *self.outputs), (*self.signature.inputs, *self.signature.outputs), strict=True))

    def _allocate(self) -> dict[str, Tensor]:
        """Room for the most rows of every edge, and for the contexts' activations."""
        sizes = {name: ((self.signature.max_batch, *edge.sizes), torch_dtype(edge.dtype)) for name, edge in self._edges().items()}
        sizes[WORKSPACE] = ((self.engine.device_memory_size_v2,), torch.uint8)
        try:
            return {name: torch.empty(shape, dtype=dtype, device=self.device) for name, (shape, dtype) in sizes.items()}
        except torch.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info(self.device)
            raise CompileError(
                f"{self.where} needs {self.engine.device_memory_size_v2 / 1e9:.2f} GB for activations of up to {self.signature.max_batch} rows, and "
                f"{free / 1e9:.2f} of {total / 1e9:.2f} GB are free; lower the profile's max_batch, or load fewer programs on this device"
            ) from error

    def _check_edges(self) -> None:
        """The plan's edges are those of the signature: a plan is a file, and files get mixed up."""
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        for name, edge in self._edges().items():
            if name not in names or self.engine.get_tensor_dtype(name) != TRT_DTYPES[torch_dtype(edge.dtype)]:
                raise CompileError(f"{self.where}: the plan has no {edge.dtype} tensor {name!r} for {edge}; it has {', '.join(names)}")

    def _context(self, rows: int) -> trt.IExecutionContext:
        """A context for so many rows, on the common workspace: one thread calls at a time, so one context works at a time."""
        index = 0 if rows == 1 else len(row_ranges(self.signature.max_batch)) - 1
        context = self.engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise CompileError(f"{self.where}: TensorRT makes no execution context. {self.records.explain()}")
        self.records.watch(context)
        context.set_device_memory(self.workspace.data_ptr(), self.workspace.numel())
        if not context.set_optimization_profile_async(index, self.stream.cuda_stream):
            raise CompileError(f"{self.where}: TensorRT refuses optimisation profile {index}. {self.records.explain()}")
        self.stream.synchronize()
        for name, buffer in self.buffers.items():
            context.set_tensor_address(name, buffer.data_ptr())
        if self.collectives and not context.set_communicator(world_communicator(self.device)):
            raise CompileError(f"{self.where}: TensorRT refuses the communicator of the ranks. {self.records.explain()}")
        for name in self.inputs:
            if not context.set_input_shape(name, tuple(self.buffers[name][:rows].shape)):
                raise InternalError(f"{self.where}: TensorRT refuses {rows} rows of {name!r}. {self.records.explain()}")
        for name in self.outputs:
            found, wanted = tuple(context.get_tensor_shape(name)), tuple(self.buffers[name][:rows].shape)
            if found != wanted:
                raise InternalError(f"{self.where}: the plan gives {name!r} the shape {list(found)}, declared is {list(wanted)}")
        return context


def check_links(device: torch.device) -> None:
    """Raises CompileError where ranks do not meet over NCCL on this device."""
    links = dist.get_backend_config() if dist.is_initialized() else "none"  # by device, such as "cpu:gloo,cuda:nccl"
    if f"{device.type}:nccl" not in links.split(","):
        text = f"ranks whose plans hold collectives meet over 'nccl', and here the links are {links}"
        raise CompileError(f"{text}; serve with --cluster, whose ranks have a GPU each")


def world_communicator(device: torch.device) -> Any:
    """The NCCL communicator of all ranks as TensorRT takes it: layers name the ranks that take part. NCCL has made it when the ranks tested their links."""
    group: Any = dist.group.WORLD
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return make(group._get_backend(device)._comm_ptr(), None, None)
