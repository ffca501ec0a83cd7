"""What a model says of itself: how to build it, its programs, and the settings that pipelines and the service need.

Settings travel in the bundle, so that a server never builds the model's class.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reelstep.compiler.lora import Layout
from reelstep.compiler.part import Part
from reelstep.compiler.program import Program
from reelstep.engine.request import Choice, Defaults, Limits
from reelstep.errors import ConfigError

GRID = "grid"
"""What a distilled model calls its schedule: the times that belong to its number of steps."""


@dataclass(frozen=True)
class Distilled:
    """What a student of few steps is tied to. Its few-step map is no velocity field, so it holds at these times and nowhere between them.

    grids: from a number of steps to its times [steps + 1], from 0 (noise) to 1 (data). scale: of guidance, that the teacher was run with; it is in the
    weights now. teacher: its name. Raises ConfigError for no grid, for times that do not increase from 0 to 1 in so many steps, and a scale below 1.
    """

    grids: Mapping[int, tuple[float, ...]]
    scale: float
    teacher: str

    def __post_init__(self) -> None:
        if not self.grids:
            raise ConfigError(f"a student of {self.teacher!r} without a grid; give it the times of at least one number of steps")
        for steps, times in self.grids.items():
            if steps < 1 or len(times) != steps + 1 or (times[0], times[-1]) != (0, 1) or not all(s < t for s, t in pairwise(times)):
                raise ConfigError(f"grid of {steps} steps {list(times)}; so many steps have one time more, increasing from 0 (noise) to 1 (data)")
        if not 1 <= self.scale < math.inf:
            raise ConfigError(f"teacher's scale {self.scale}; at least 1, which is without guidance")

    def times(self, steps: int) -> tuple[float, ...]:
        """Raises ConfigError for a number of steps without a grid."""
        if steps not in self.grids:
            raise ConfigError(f"{steps} steps of a student that was distilled for {', '.join(map(str, sorted(self.grids)))}; take one of these")
        return self.grids[steps]


@dataclass(frozen=True)
class Fused:
    """A LoRA that is in the weights. digest: sha256 of its file. rank: the largest of its layers, of which there are so many."""

    name: str
    digest: str
    strength: float
    rank: int
    layers: int

    def __str__(self) -> str:
        return f"{self.name} at strength {self.strength:g}, rank {self.rank} in {self.layers} layers"


@dataclass(frozen=True)
class ModelSettings:
    """All that runs a compiled model needs beside its programs. Plain values; JSON both ways.

    Raises ConfigError for a distilled model whose defaults no request could ask for.
    """

    tasks: tuple[str, ...]  # pipelines; empty for a model that is only benchmarked
    limits: Limits
    defaults: Mapping[str, Defaults]  # by task
    path: str  # probability path: "condot", "vp", "cosine"
    prediction: str  # what the denoiser gives: "velocity", "eps", "x1", "v"
    latent_channels: int
    condition_channels: int  # of latents joined to the input on channels; 0 where the model takes no picture
    spatial_stride: int  # pixels per latent
    temporal_stride: int  # frames per latent frame
    text_length: int  # tokens of the text encoder, in bytes
    tile_frames: int  # latent frames that one decode call takes
    tile_overlap: int
    distilled: Distilled | None = None  # of a student of few steps; None for a velocity field
    lora: Layout | None = None  # of what requests may bring; None for a bundle that takes none
    fused: tuple[Fused, ...] = ()

    def __post_init__(self) -> None:
        if self.distilled is None:
            return
        for task, d in self.defaults.items():
            if d.steps not in self.distilled.grids or (d.schedule, d.guidance, d.scale) != (GRID, "none", 1.0):
                raise ConfigError(
                    f"defaults of {task}: {d.steps} steps on {d.schedule!r}, guidance {d.guidance!r} at scale {d.scale:g}; a distilled model has a number of "
                    f"steps out of {', '.join(map(str, sorted(self.distilled.grids)))}, schedule {GRID!r}, guidance 'none' and scale 1"
                )

    def latent_shape(self, frames: int, width: int, height: int) -> tuple[int, int, int, int]:
        """[C, F, H, W] of a video in pixels."""
        return self.latent_channels, -(-frames // self.temporal_stride), height // self.spatial_stride, width // self.spatial_stride

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSettings:
        limits = {**data["limits"], "sizes": tuple(map(tuple, data["limits"]["sizes"])), "frames": tuple(data["limits"]["frames"])}
        menus = {task: {name: Choice(**entry) for name, entry in d.get("menu", {}).items()} for task, d in data["defaults"].items()}
        defaults = {task: Defaults(**{**d, "menu": menus[task]}) for task, d in data["defaults"].items()}
        distilled = None
        if data.get("distilled"):  # JSON has no numbers for keys
            grids = {int(steps): tuple(times) for steps, times in data["distilled"]["grids"].items()}
            distilled = Distilled(**{**data["distilled"], "grids": grids})
        lora = Layout.from_json(data["lora"]) if data.get("lora") else None
        made = {"limits": Limits(**limits), "defaults": defaults, "distilled": distilled, "lora": lora}
        return cls(**{**data, **made, "tasks": tuple(data["tasks"]), "fused": tuple(Fused(**each) for each in data.get("fused", ()))})


@dataclass(frozen=True)
class ModelSpec:
    """One entry of MODELS."""

    name: str
    version: str  # a decimal integer, as inference clients expect
    settings: ModelSettings
    build: Callable[[], nn.Module]  # with its weights, where the project ships them; else seeded random ones
    programs: Callable[[nn.Module], tuple[Program, ...]]
    card: Path | None  # model card, Markdown
    fitted: tuple[Path, ...] = ()  # artifacts of fits that go into its bundle
    pieces: Callable[[nn.Module], tuple[Program, ...]] | None = None  # `denoise` split for step caches, on the same weights
    adaptable: Callable[[nn.Module], Mapping[str, nn.Linear]] | None = None  # layers of `denoise` that a LoRA may change, by path in the transformer
    sharding: tuple[Part, ...] = ()  # what ranks share; prefixes as of `build`


def hash_weights(model: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of all weights, hex: what an artifact of a fit is bound to."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
