"""TensorRT on NVIDIA GPUs: an exported graph becomes a weight-stripped plan, and a plan with weights becomes an engine.

network.py   graph -> TensorRT network, through Torch-TensorRT's lowering and converters
collectives.py  the converters of collectives, which take the ranks of the named group
build.py     network -> plan
engine.py    plan + weights -> executable
records.py   what TensorRT says while it works, kept for errors
cache.py     where plans, weights and timings lie

A plan is tuned on the GPU that runs it, so it is built there, by whoever loads or finalises a bundle; no plan is in a bundle. Plans hold no weights:
bundles that differ in weights only (LoRA variants) share a plan, and plans for several SKUs share weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed._functional_collectives  # registers torch.ops._c10d_functional
from torch._ops import OpOverload

from reelstep.compiler.backends import Backend, Graph, Watch, unwatched
from reelstep.compiler.program import Precision
from reelstep.compiler.signature import Signature
from reelstep.compiler.skus import is_gpu
from reelstep.errors import CompileError
from reelstep.parallel.mesh import Mesh

if TYPE_CHECKING:
    from reelstep.compiler.backends.tensorrt.engine import TensorRtExecutable

NEEDS = {"tensorrt": "11.0", "torch-tensorrt": "2.13", "torch": "2.13"}
"""Packages and their series: Torch-TensorRT states which TensorRT and torch it was built against, and we build on its interpreter."""

NOT_RUN = (
    "Backend 'tensorrt' has not been run on hardware: its operators are checked against the converters of Torch-TensorRT, and its calls against the "
    "Python bindings of TensorRT; no plan was built, no output was compared and nothing was timed."
)
"""For whoever describes a plan: what stands behind this backend."""


def installed(package: str) -> str:
    """Its version, as its metadata has it: importing TensorRT loads gigabytes. Empty if it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def missing() -> list[str]:
    """What this machine lacks, each with what would help; empty if plans can be built and run here."""
    found = {package: installed(package) for package in NEEDS}
    lacks = [
        f"{package} {series} is needed, and {found[package] or 'none'} is installed (pip install '{package}=={series}.*')"
        for package, series in NEEDS.items()
        if not found[package].startswith(f"{series}.")
    ]
    if not torch.cuda.is_available():
        lacks.append(f"torch {torch.__version__} sees no CUDA device (a CUDA build of torch, the NVIDIA driver and a GPU)")
    return lacks


@dataclass(frozen=True)
class TensorRtBackend(Backend):
    """watch: told how far a build is; a build takes minutes. What it raises stops the build. No op of ours is kept: its kernel would be a plugin."""

    watch: Watch = unwatched
    name: str = "tensorrt"
    runs: bool = True
    weights_apart: bool = True
    keeps_collectives: bool = True
    even_exchange: bool = True

    @property
    def collectives(self) -> frozenset[OpOverload]:
        c10d = torch.ops._c10d_functional
        return frozenset({c10d.all_reduce.default, c10d.all_gather_into_tensor.default, c10d.all_to_all_single.default})

    def watched(self, watch: Watch) -> Backend:
        return replace(self, watch=watch)

    @property
    def precisions(self) -> tuple[Precision, ...]:
        return () if missing() else ("float32", "bfloat16")

    def default_precision(self) -> tuple[Precision, str]:
        return "bfloat16", "every GPU in the table of SKUs has tensor cores for bfloat16"

    def runs_on(self, arch: str) -> bool:
        return is_gpu(arch)

    def refuses(self, mesh: Mesh, arch: str) -> str | None:
        """A rank's whole graph is one engine, with the collectives that TensorRT has layers for."""
        if mesh.ring == 1:
            return None
        ulysses = f"cp={mesh.cp} with ring=1, which trades heads for tokens (Ulysses), or tp={mesh.cp} in place of cp"
        return f"ring={mesh.ring} sends keys and values from stage to stage, and TensorRT has no layer for that; use {ulysses}, or plan it with backend 'null'"

    def lacks(self) -> str | None:
        return "; ".join(missing()) or None

    def build(self, graph: Graph, signature: Signature, precision: Precision, cache: Path | None, key: str) -> TensorRtExecutable:
        if lacks := self.lacks():
            raise CompileError(
                f"backend 'tensorrt' cannot build or run program {signature.program!r} here: {lacks}. Compiling a bundle for it and checking "
                "its operators (docs/tensorrt.md) work without; backends 'inductor' and 'openvino' run here"
            )
        from reelstep.compiler.backends.tensorrt.cache import build  # only here: the libraries may be absent

        return build(graph, signature, precision, cache, key, self.watch)


BACKEND = TensorRtBackend()
