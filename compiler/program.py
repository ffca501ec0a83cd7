"""A program: one named function of a model, as the compiler is handed it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from reelstep.errors import ConfigError
from reelstep.parallel.mesh import Mesh

if TYPE_CHECKING:
    from torch import nn

BATCH = "B"
"""The one size that stays dynamic: a compiled program takes any number of rows up to its profile's `max_batch`."""

DType = Literal["float32", "int64"]
Precision = Literal["float32", "bfloat16"]
FLOAT_BYTES: Mapping[Precision, int] = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor at a program's edge. A size is a number, or a name that each profile gives a number to; the first is "B"."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        if not self.shape or self.shape[0] != BATCH or BATCH in self.shape[1:]:
            raise ConfigError(f"tensor {self.name!r} has shape {self.shape}; the first size, and only it, is {BATCH!r}")

    def sizes(self, profile: Profile) -> tuple[int, ...]:
        """The sizes after the batch, with the profile's numbers."""
        return tuple(profile.sizes[s] if isinstance(s, str) else s for s in self.shape[1:])


@dataclass(frozen=True)
class Profile:
    """One set of sizes that a program is compiled for."""

    name: str
    sizes: Mapping[str, int]
    max_batch: int

    def __post_init__(self) -> None:
        if self.max_batch < 1:
            raise ConfigError(f"profile {self.name!r}: max_batch is {self.max_batch}; a call has at least one row")

    def on_rank(self, mesh: Mesh) -> Profile:
        """What a rank's graph is captured at. An exchange of a sequence packs rows among other sizes: a graph of it is of one row."""
        return replace(self, max_batch=1) if mesh.cp > 1 else self


@dataclass(frozen=True)
class Program:
    """`module.forward` takes the inputs positionally in this order and returns a tensor, or a tuple in the order of `outputs`.

    `keep_f32`: runs in float32 whatever the plan's precision (timestep embeddings lose 12 % in bfloat16).
    """

    name: str
    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]
    keep_f32: bool = False

    def profile(self, name: str) -> Profile:
        return next(p for p in self.profiles if p.name == name)
