"""What a model says of itself: how to build it, its programs, and the settings that pipelines and the service need.

Settings travel in the bundle, so that a server never builds the model's class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from reelstep.compiler.program import Program
from reelstep.engine.request import Defaults, Limits


@dataclass(frozen=True)
class ModelSettings:
    """All that runs a compiled model needs beside its programs. Plain values; JSON both ways."""

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

    def latent_shape(self, frames: int, width: int, height: int) -> tuple[int, int, int, int]:
        """[C, F, H, W] of a video in pixels."""
        return self.latent_channels, -(-frames // self.temporal_stride), height // self.spatial_stride, width // self.spatial_stride

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSettings:
        limits = {**data["limits"], "sizes": tuple(map(tuple, data["limits"]["sizes"])), "frames": tuple(data["limits"]["frames"])}
        defaults = {task: Defaults(**d) for task, d in data["defaults"].items()}
        return cls(**{**data, "tasks": tuple(data["tasks"]), "limits": Limits(**limits), "defaults": defaults})


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
