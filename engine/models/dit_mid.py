"""`dit-mid`: a Movie Gen of width 384 with 4,096 tokens and seeded random weights. For measuring engines, not for pictures."""

from __future__ import annotations

import torch
from torch import nn

from reelstep.compiler.program import Profile, Program
from reelstep.engine.models.movie_gen import MovieGenConfig, MovieGenTransformer, denoise_program, time_program
from reelstep.engine.models.spec import ModelSettings, ModelSpec
from reelstep.engine.request import Limits

CONFIG = MovieGenConfig(
    layers=6, width=384, ffn=1024, heads=6, latent_channels=16, condition_channels=0, patch=(1, 2, 2), positions=(16, 16, 16),
    text_widths=(384,), time_frequencies=256, time_scale=1000.0, qk_norm=False,
)  # fmt: skip
TEXT_TOKENS = 128


def build() -> MovieGenTransformer:
    """Random weights from seed 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MovieGenTransformer(CONFIG).eval()


def programs(transformer: nn.Module) -> tuple[Program, ...]:
    """4,096 tokens: latents of 16 x 32 x 32."""
    assert isinstance(transformer, MovieGenTransformer)
    video = Profile("video", {"F": 16, "H": 32, "W": 32}, 4)
    return time_program(transformer, 64), denoise_program(transformer, TEXT_TOKENS, (video,))


SPEC = ModelSpec(
    name="dit-mid",
    version="1",
    settings=ModelSettings(
        tasks=(), limits=Limits(sizes=((256, 256),), frames=(128,), max_steps=1000, max_scale=30.0, max_count=1), defaults={},
        path="condot", prediction="velocity", latent_channels=16, condition_channels=0, spatial_stride=8, temporal_stride=8, text_length=TEXT_TOKENS,
        tile_frames=4, tile_overlap=2,
    ),
    build=build,
    programs=programs,
    card=None,
)  # fmt: skip
