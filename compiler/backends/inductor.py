"""AOTInductor: C++ generated, compiled by the system's compiler, loaded as a shared library. The portable path; float32."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor import aoti_compile_and_package, aoti_load_package
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.export import ExportedProgram

from reelstep.compiler.backends import Graph
from reelstep.compiler.capture import quiet_torch
from reelstep.compiler.program import Precision
from reelstep.compiler.signature import Signature
from reelstep.compiler.skus.cpu import SKU
from reelstep.compiler.storage import seal, sealed
from reelstep.errors import CompileError


class InductorExecutable:
    def __init__(self, run: Callable[..., Any], signature: Signature) -> None:
        self.run = run
        self.signature = signature

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = [tensor.contiguous() for tensor in self.signature.ordered(inputs)]
        with torch.inference_mode():
            found = self.run(*tensors)
        outputs = found if isinstance(found, tuple | list) else (found,)
        return {edge.name: out for edge, out in zip(self.signature.outputs, outputs, strict=True)}


class InductorBackend:
    name = "inductor"
    runs = True
    precisions: tuple[Precision, ...] = ("float32",)

    def default_precision(self) -> tuple[Precision, str]:
        return "float32", "the only one this backend builds"

    def build(self, graph: Graph, signature: Signature, precision: Precision, cache: Path | None, key: str) -> InductorExecutable:
        if precision != "float32":
            raise CompileError(f"backend 'inductor' builds float32 only, not {precision}; use precision float32 or backend 'openvino'")
        if cache is None:
            with tempfile.TemporaryDirectory(prefix="reelstep-inductor-") as folder:
                path = Path(folder) / "engine.pt2"
                _package(graph(), signature, path)
                return _load(path, signature)
        machine = "\n".join([key, str(torch.__version__), SKU.model, *sorted(SKU.features)])
        path = cache / f"inductor-{hashlib.sha256(machine.encode()).hexdigest()}.pt2"
        if not sealed(path):
            seal(path, lambda temporary: _package(graph(), signature, temporary))
        return _load(path, signature)


def _package(exported: ExportedProgram, signature: Signature, path: Path) -> None:
    where = f"program {signature.program!r} at profile {signature.profile!r}"
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise CompileError(f"{where}: backend 'inductor' needs a C++ compiler and found none; install g++ or set CXX, or use backend 'openvino'") from error
    try:
        with quiet_torch(), torch.no_grad():
            aoti_compile_and_package(exported, package_path=str(path))
    except OSError:
        raise  # a full disk is the caller's to report
    except Exception as error:  # the generator and the C++ compiler fail in many ways
        raise CompileError(f"{where} cannot be compiled by inductor: {error}") from error


def _load(path: Path, signature: Signature) -> InductorExecutable:
    return InductorExecutable(aoti_load_package(str(path)), signature)


BACKEND = InductorBackend()
