"""The table of models."""

from __future__ import annotations

from reelstep.engine.models.spec import ModelSpec
from reelstep.registry import Registry

MODELS: Registry[ModelSpec] = Registry(
    "model",
    {
        "reel-tiny": "reelstep.engine.models.reel_tiny:SPEC",
        "reel-tiny-flash": "reelstep.engine.models.reel_tiny_flash:SPEC",
        "dit-mid": "reelstep.engine.models.dit_mid:SPEC",
        "movie-gen-30b": "reelstep.engine.models.movie_gen:SPEC_30B",
    },
)
