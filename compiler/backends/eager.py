"""The graph, operator by operator, through PyTorch: for debugging, and the reference of the other backends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from reelstep.compiler.backends import Backend, Executable, Graph
from reelstep.compiler.capture import quiet_torch
from reelstep.compiler.program import Precision
from reelstep.compiler.signature import Signature, torch_dtype
from reelstep.compiler.skus import is_gpu


class EagerExecutable(Executable):
    def __init__(self, module: nn.Module, signature: Signature, precision: Precision) -> None:
        self.module = module
        self.signature = signature
        self.bf16 = precision == "bfloat16"

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = self.signature.ordered(inputs)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            found = self.module(*tensors)
        outputs = found if isinstance(found, tuple | list) else (found,)
        return {edge.name: out.to(torch_dtype(edge.dtype), copy=True) for edge, out in zip(self.signature.outputs, outputs, strict=True)}


class EagerBackend(Backend):
    name = "eager"
    runs = True
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")

    def default_precision(self) -> tuple[Precision, str]:
        return "float32", "eager is the reference; bfloat16 (autocast) only on request"

    def runs_on(self, arch: str) -> bool:
        return not is_gpu(arch)

    def build(self, graph: Graph, signature: Signature, precision: Precision, cache: Path | None, key: str) -> EagerExecutable:
        with quiet_torch():
            return EagerExecutable(graph().module(), signature, precision)


BACKEND = EagerBackend()
