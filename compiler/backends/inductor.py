"""AOTInductor: C++ generated, compiled by the system's compiler, loaded as a shared library. The portable path.

On a CPU in float32. On a GPU in bfloat16 too, with our Triton kernels as they are, the products' tiles chosen by measuring, and CUDA graphs. One name for
both: which device it is follows the arch, by `on`.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import signal
import subprocess
import sys
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch._C._aoti import AOTIModelPackageLoader
from torch._inductor import aoti_compile_and_package, config
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.utils import fresh_cache
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from reelstep.compiler.backends import AT_WORK, Backend, Executable, Graph
from reelstep.compiler.capture import log_levels, quiet_torch
from reelstep.compiler.graphs import weights_of
from reelstep.compiler.passes.cast_weights import cast_weights
from reelstep.compiler.passes.mixed_precision import mixed_precision
from reelstep.compiler.program import Precision
from reelstep.compiler.recording import record
from reelstep.compiler.signature import Signature
from reelstep.compiler.skus import is_gpu
from reelstep.compiler.skus.cpu import SKU
from reelstep.compiler.storage import FULL, check_writable, seal, sealed
from reelstep.errors import CompileError, StorageError
from reelstep.kernels import OPS
from reelstep.parallel.mesh import Mesh

Run = Callable[..., Sequence[Tensor]]


class InductorExecutable(Executable):
    """Outputs lie where the inputs do."""

    def __init__(self, launch: Run, signature: Signature, device: str) -> None:
        self.launch = launch
        self.signature = signature
        self.device = device

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = self.signature.ordered(inputs)
        with torch.inference_mode():
            outputs = self.run([tensor.to(self.device).contiguous() for tensor in given])
        return {edge.name: out.to(given[0].device) for edge, out in zip(self.signature.outputs, outputs, strict=True)}

    def run(self, given: Sequence[Tensor]) -> Sequence[Tensor]:
        return [out.clone() for out in self.launch(*given)]  # it may give an input, or a weight


class Replayed(InductorExecutable):
    """All kernels of a call as one CUDA graph, recorded once for each number of rows. Where one cannot be, calls of so many rows launch their kernels."""

    def __init__(self, launch: Run, signature: Signature, device: str) -> None:
        super().__init__(launch, signature, device)
        self.recorded: dict[int, Recording | None] = {}
        # One of each for all of them: they run one at a time, what one gave is copied before the next, and memory of a pool is given again on its own stream.
        self.memory, self.aside = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        self.free = Lock()

    def open(self, rows: int) -> None:
        with torch.inference_mode(), self.free:
            self._recorded([edge.zeros(rows, torch.device(self.device)) for edge in self.signature.inputs])

    def run(self, given: Sequence[Tensor]) -> Sequence[Tensor]:
        with self.free:
            recording = self._recorded(given)
            return super().run(given) if recording is None else recording(given)

    def _recorded(self, given: Sequence[Tensor]) -> Recording | None:
        rows = len(given[0])
        if rows not in self.recorded:
            with AT_WORK:
                self.recorded[rows] = self._record([tensor.clone() for tensor in given])
        return self.recorded[rows]

    def _record(self, given: list[Tensor]) -> Recording | None:
        self.aside.wait_stream(torch.cuda.current_stream(given[0].device))
        with torch.cuda.stream(self.aside):
            self.launch(*given)  # loads kernels and chooses algorithms, which a recording may not
        self.aside.synchronize()
        found = record(lambda: self.launch(*given), self.aside, f"{_where(self.signature)} of {len(given[0])} rows", self.memory)
        return found and Recording(given, *found)


@dataclass(frozen=True)
class Recording:
    """One call as a CUDA graph. It reads and writes memory of its own."""

    given: list[Tensor]
    graph: torch.cuda.CUDAGraph
    outputs: Sequence[Tensor]

    def __call__(self, given: Sequence[Tensor]) -> list[Tensor]:
        for mine, theirs in zip(self.given, given, strict=True):
            mine.copy_(theirs)
        self.graph.replay()
        return [out.clone() for out in self.outputs]


@dataclass(frozen=True)
class InductorBackend(Backend):
    """device: "cpu", or a CUDA device, on which ops of ours that a graph has kept run as they are. autotune: there, measure tiles as it compiles.
    cuda_graphs: there, replay a recording of each call's kernels.
    """

    device: str = "cpu"
    autotune: bool = True
    cuda_graphs: bool = True
    name: str = "inductor"
    runs: bool = True

    @property
    def precisions(self) -> tuple[Precision, ...]:
        return ("float32",) if self.device == "cpu" else ("float32", "bfloat16")

    def default_precision(self) -> tuple[Precision, str]:
        if self.device == "cpu":
            return "float32", "the only one this backend builds for a CPU"
        return "bfloat16", "every GPU in the table of SKUs has tensor cores for bfloat16"

    def runs_on(self, arch: str) -> bool:
        return True

    def on(self, arch: str) -> InductorBackend:
        return replace(self, device="cuda" if is_gpu(arch) else "cpu")

    def refuses(self, mesh: Mesh, arch: str) -> str | None:
        return "ranks run its pieces on CPUs alone; use backend 'tensorrt', one device, or plan it with backend 'null'" if is_gpu(arch) else None

    def keeps(self, arch: str) -> frozenset[str]:
        return frozenset(OPS) if is_gpu(arch) else frozenset()  # a call to one cannot be fused with what stands beside it

    def lacks(self) -> str | None:
        return self._no_device() or compiler_fault()

    def _no_device(self) -> str | None:
        if self.device == "cpu" or torch.cuda.is_available():
            return None
        return f"torch {torch.__version__} sees no CUDA device; it needs a CUDA build of torch, the NVIDIA driver and a GPU"

    def build(self, graph: Graph, signature: Signature, precision: Precision, cache: Path | None, key: str) -> InductorExecutable:
        if precision not in self.precisions:
            text = f"builds {' and '.join(self.precisions)} for {self.device}, not {precision}"
            raise CompileError(f"backend 'inductor' {text}; use precision {self.precisions[0]} or backend 'openvino'")
        if no_device := self._no_device():
            raise CompileError(f"{_where(signature)} cannot be built for {self.device} by backend 'inductor' here: {no_device}")
        if self.device != "cpu":
            torch.backends.cudnn.allow_tf32 = False  # for the process, since engines ask as they run: convolutions in float32 would be rounded to 10 bits
        if cache is None:
            try:
                with tempfile.TemporaryDirectory(prefix="reelstep-inductor-") as folder:
                    path = Path(folder) / "engine.pt2"
                    self._package(graph, signature, precision, path)
                    return self._load(path, signature)
            except OSError as error:
                raise StorageError(f"{_where(signature)} cannot be compiled: {error}. Free some space, or set TMPDIR to a folder with more") from error
        machine = "\n".join([key, precision, str(torch.__version__), *self._machine()])
        path = cache / f"inductor-{hashlib.sha256(machine.encode()).hexdigest()}.pt2"
        if not sealed(path):
            check_writable(cache)
            seal(path, lambda temporary: self._package(graph, signature, precision, temporary))
        return self._load(path, signature)

    def _machine(self) -> list[str]:
        """What an engine is compiled for: the CPU in any case, which runs what calls the kernels of a GPU."""
        cpu = [SKU.model, *sorted(SKU.features)]
        if self.device == "cpu":
            return [*cpu, str(torch.get_num_threads())]  # compiled for one thread, it stays with one
        found = torch.cuda.get_device_properties(self.device)
        tuned = config.max_autotune_gemm_backends if self.autotune else ""  # which a user may narrow by its environment variable
        return [*cpu, found.name, f"{found.major}.{found.minor}", str(torch.version.cuda), tuned]

    def _package(self, graph: Graph, signature: Signature, precision: Precision, path: Path) -> None:
        if fault := compiler_fault():
            raise CompileError(f"{_where(signature)} cannot be built by backend 'inductor' here: {fault}")
        exported = graph()
        try:
            with quiet_torch(), quiet_tuning(), torch.no_grad(), fresh_cache(dir=str(path.parent)):  # sources and a second copy of all weights go with it
                lowered = self._lowered(exported, signature, precision)
                aoti_compile_and_package(lowered, package_path=str(path), inductor_configs=self._options(lowered))
        except Exception as error:  # the generator and the C++ compiler fail in many ways
            if isinstance(error, OSError) and error.errno in FULL:
                raise  # the caller's to report
            raise CompileError(f"{_where(signature)} cannot be compiled by inductor: {error}") from error

    def _lowered(self, exported: ExportedProgram, signature: Signature, precision: Precision) -> ExportedProgram:
        if precision == "bfloat16":
            exported = cast_weights(mixed_precision(exported, signature))
        return exported if self.device == "cpu" else moved(exported, self.device)

    def _options(self, lowered: ExportedProgram) -> dict[str, Any]:
        if self.device != "cpu":
            return {"max_autotune": self.autotune, "autotune_num_choices_displayed": 0, "max_autotune_report_choices_stats": False}
        integers = any(weight.dtype is torch.int8 for weight in weights_of(lowered).values())
        # Frozen weights are laid out for oneDNN's products, which are the fastest with AVX-512; with AVX2 alone MKL's are, of weights as they lie. Those in
        # int8 would be unpacked to float32 for good. Threads are counted when a call begins: a count from here would be the length of arrays that each thread
        # writes to, and another process, or just another thread, may have more.
        return {"freezing": "avx512f" in SKU.features and not integers, "cpp.dynamic_threads": True}

    def _load(self, path: Path, signature: Signature) -> InductorExecutable:
        """Not by `aoti_load_package`: it compiles and runs C++ to see which vector instructions this CPU has, in every process, which the path already tells,
        and tries again what fails, so that the error is lost.
        """
        if self.device != "cpu":
            tuple(OPS.values())  # its engines call them by name, and one that is imported is known to torch
            gc.collect()
            torch.cuda.empty_cache()  # the library asks the driver for its weights' memory, and what a build has left torch keeps
        replayed = self.device != "cpu" and self.cuda_graphs  # then without events: it would ask whether they are over, which recorded ones are not
        try:
            package = AOTIModelPackageLoader(str(path), "model", replayed, 1, -1)  # as it was named, for one call at a time, on the current device
        except RuntimeError as error:
            raise CompileError(f"{_where(signature)}: its compiled library cannot be loaded: {error}") from error
        held = [package]
        executable = (Replayed if replayed else InductorExecutable)(lambda *given: held[0].boxed_run(list(given)), signature, self.device)
        weakref.finalize(executable, held.clear)  # at the latest as the process ends, which may leave objects as they are: a package removes what it unpacked
        return executable


def moved(exported: ExportedProgram, device: str) -> ExportedProgram:
    """To another device, where a tensor may lie otherwise than on the CPU that the graph was traced on: what only looked at it there, may have to copy."""
    program = move_to_device_pass(exported, device)
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default
    program.graph_module.recompile()
    return program


@contextmanager
def quiet_tuning() -> Iterator[None]:
    """Inside, tiles that do not fit a GPU, some of which are tried for every product, are not reported as errors, nor as warnings those that would read
    another layout, float32 that is kept exact, what torch itself uses that is old, and where the files of a failed build are, which are removed.
    """
    quiet = {"select_algorithm": logging.CRITICAL, "scheduler": logging.ERROR, "utils": logging.ERROR}
    with log_levels({f"torch._inductor.{name}": level for name, level in quiet.items()}), warnings.catch_warnings():
        for text in ("TensorFloat32 tensor cores", "TypedStorage is deprecated"):
            warnings.filterwarnings("ignore", text, UserWarning)
        yield


def _where(signature: Signature) -> str:
    return f"program {signature.program!r} at profile {signature.profile!r}"


def compiler_fault() -> str | None:
    """What is wrong with the C++ compiler that PyTorch would call, and what to do."""
    try:
        compiler = get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):  # a file that may not be run is the second
        return "it needs a C++ compiler and found none; install g++ or set CXX, or use backend 'openvino'"
    if fault := runtime_fault(compiler):
        text = f"what the C++ compiler {compiler} makes does not run beside PyTorch, as if its C++ library were another"
        return f"{text} ({fault}); set CXX to this system's own, such as /usr/bin/g++"
    return None


MATCHES = """
#include <regex>
#include <string>
extern "C" int matches() { return std::regex_match(std::string("reel"), std::regex("[a-z]+")); }
"""
"""What an engine does first: the patterns of the C++ library read its locales, which a library linked with another copy of them finds in none."""


@cache
def runtime_fault(compiler: str) -> str | None:
    """What becomes of a process that loads PyTorch and what `compiler` makes, if it does not end well: an engine would end the process that opens it. None too
    if it makes nothing, which the build will explain.
    """
    with tempfile.TemporaryDirectory(prefix="reelstep-inductor-") as folder:
        source, library = Path(folder) / "matches.cpp", Path(folder) / "matches.so"
        source.write_text(MATCHES)
        if subprocess.run([compiler, "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(library)], capture_output=True, check=False).returncode:
            return None
        script = "import ctypes, sys, torch; sys.exit(0 if ctypes.CDLL(sys.argv[1]).matches() else 'it found no match')"
        done = subprocess.run([sys.executable, "-P", "-c", script, str(library)], capture_output=True, text=True, check=False)
    if done.returncode < 0:
        return f"the process was ended by {signal.Signals(-done.returncode).name}"
    return done.stderr.strip().splitlines()[-1] if done.returncode else None

BACKEND = InductorBackend()
