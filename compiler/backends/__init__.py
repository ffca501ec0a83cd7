"""The table of backends, and what one is: it turns an exported graph into something that runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Protocol, TypeAlias

from reelstep.compiler.program import Precision
from reelstep.compiler.signature import Signature
from reelstep.parallel.mesh import Mesh
from reelstep.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor
    from torch._ops import OpOverload
    from torch.export import ExportedProgram

Graph: TypeAlias = "Callable[[], ExportedProgram]"
"""Reads the graph: seconds of work, so a backend that finds its engine in the cache does not ask."""

Watch = Callable[[str, int, int], None]
"""Called with a phase of a build, its steps done, and its steps in all."""


def unwatched(phase: str, done: int, total: int) -> None:
    """Nobody watches."""


AT_WORK = Lock()
"""Held, in any thread of the process, by who makes an engine while others run (`compiler.load.Later`), and for an engine's first run and its recording.
Graphs are traced by one thread at a time; a build waits for the whole device, and to load kernels may, which must not be while another engine is recorded.
"""


class Executable(Protocol):
    """A program at a profile, ready to run. May be called by one thread at a time. A backend's is a subclass."""

    signature: Signature

    def open(self, rows: int) -> None:
        """What the first call of so many rows does before it computes, ahead of it and from any thread. Nothing for most."""
        return

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name, in memory of their own, for inputs of any number of rows in 1..max_batch.

        Edges are float32 or int64 whatever the precision inside. Raises ConfigError for inputs that do not fit the signature.
        """
        ...


class Backend(Protocol):
    """One way to run graphs. A backend is a subclass, and says only where it differs from what stands here."""

    name: str
    runs: bool
    """False for a backend that computes nothing."""
    own_threads: bool = False
    """Whether it computes on a CPU with threads of its own and not with torch's, which then compete: they wait actively after each operator."""
    weights_apart: bool = False
    """Whether its engines hold no weights: those lie in the cache once, by content, and what a device has no memory for can stay on the host."""
    keeps_collectives: bool = False
    """Whether an engine with collectives in it can lie in the cache."""
    even_exchange: bool = False
    """Whether its all-to-all has no sizes, so that each rank has to send as much to every other."""

    @property
    def collectives(self) -> frozenset[OpOverload]:
        """Those that it runs inside a graph, over this process's links: a graph without others needs no cut at them."""
        return frozenset()

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """What this machine can run."""
        ...

    def default_precision(self) -> tuple[Precision, str]:
        """What is used if nobody says otherwise, and why."""
        ...

    def runs_on(self, arch: str) -> bool:
        """Whether its engines are for an arch; a backend that computes nothing plans for any."""
        ...

    def on(self, arch: str) -> Backend:
        """The same for the device of an arch that it runs on: what it can run and builds may differ between devices."""
        return self

    def watched(self, watch: Watch) -> Backend:
        """The same, which tells how far a build is, where one takes minutes. What `watch` raises stops the build."""
        return self

    def refuses(self, mesh: Mesh, arch: str) -> str | None:
        """What ranks of a mesh cannot run on an arch, and what to take instead; None where they can."""
        return None

    def lacks(self) -> str | None:
        """What this machine is without that a build of its engines needs, and what to do; None where nothing is missing. To load them may need less."""
        return None

    def keeps(self, arch: str) -> frozenset[str]:
        """Ops of `reelstep.kernels` that it runs whole on an arch; its graphs have the formulas of the others."""
        return frozenset()

    def build(self, graph: Graph, signature: Signature, precision: Precision, cache: Path | None, key: str) -> Executable:
        """Compile, or take from the directory `cache` what was compiled under `key` before.

        key: hash of the graph, the weights and every choice; the backend adds its own version and the machine. Raises
        CompileError if the graph or the precision cannot be compiled here, StorageError if the cache cannot be written.
        """
        ...


sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None is what makes an import of a module fail
"""OpenVINO's converter would tell its makers of each use, by network, and wait for that; without this package it does not. Here, before it is imported."""

BACKENDS: Registry[Backend] = Registry(
    "backend",
    {
        "openvino": "reelstep.compiler.backends.openvino:BACKEND",
        "inductor": "reelstep.compiler.backends.inductor:BACKEND",
        "tensorrt": "reelstep.compiler.backends.tensorrt:BACKEND",
        "eager": "reelstep.compiler.backends.eager:BACKEND",
        "null": "reelstep.compiler.backends.null:BACKEND",
    },
)
