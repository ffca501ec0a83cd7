"""What a client gets: files, what they cost, and the choices that were made for them. `sample` gives the same without a server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from reelstep.engine.request import Progress, Queued


@dataclass(frozen=True)
class Artifact:
    """One output file."""

    name: str
    media_type: str
    data: bytes = field(repr=False)  # who prints an event wants to read it
    width: int
    height: int
    frames: int
    seed: int


@dataclass(frozen=True)
class PreviewFile:
    """How the first output looks now."""

    step: int
    media_type: str
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Cost:
    """What a result took. Seconds; see proto Usage for what NFE, forwards and cached count."""

    nfe: int
    forwards: int
    cached: int
    queue_s: float
    compute_s: Mapping[str, float]  # by program


@dataclass(frozen=True)
class Generation:
    """A finished request: its files, what it cost and the choices that were made for it."""

    id: str
    model: str
    task: str
    solver: str
    schedule: str
    steps: int
    guidance: str
    scale: float
    quality: str  # that was asked for, or that `auto` came to, and chose the above; empty for none
    step_cache: str  # empty for none
    artifacts: tuple[Artifact, ...]
    usage: Cost
    lora: Mapping[str, float] = field(default_factory=dict)  # strengths by name
    auto: bool = False  # quality `auto` was asked for

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(a.seed for a in self.artifacts)


ClientEvent = Queued | Progress | PreviewFile | Artifact | Generation
"""What a stream yields; a Generation is the last."""
