"""Compiles everything, runs nothing: zeros of the right shapes, in microseconds. Weights may be on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from reelstep.compiler.backends import Backend, Executable, Graph
from reelstep.compiler.program import Precision
from reelstep.compiler.signature import Signature


class NullExecutable(Executable):
    def __init__(self, signature: Signature) -> None:
        self.signature = signature

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        first = self.signature.ordered(inputs)[0]
        return {edge.name: edge.zeros(first.shape[0], first.device) for edge in self.signature.outputs}


class NullBackend(Backend):
    name = "null"
    runs = False
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")

    def default_precision(self) -> tuple[Precision, str]:
        return "float32", "nothing is computed"

    def runs_on(self, arch: str) -> bool:
        return True

    def build(self, graph: Graph, signature: Signature, precision: Precision, cache: Path | None, key: str) -> NullExecutable:
        return NullExecutable(signature)


BACKEND = NullBackend()
