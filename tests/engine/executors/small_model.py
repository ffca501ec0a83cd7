"""A model with a sharded denoiser and a program that is not. Ranks import it by name."""

from __future__ import annotations

import torch
from torch import nn

from reelstep.compiler.program import Profile, Program
from reelstep.engine.models.movie_gen import MovieGenConfig, MovieGenTransformer, denoise_program, time_program

CONFIG = MovieGenConfig(
    layers=1, width=24, ffn=10, heads=3, latent_channels=4, condition_channels=0, patch=(1, 2, 2), positions=(3, 2, 2), text_widths=(10,),
    time_frequencies=8, time_scale=1.0, qk_norm=True,
)  # fmt: skip
TEXT = 5


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.denoiser = MovieGenTransformer(CONFIG)


def build() -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Small().eval()


def build_denoiser() -> MovieGenTransformer:
    return MovieGenTransformer(CONFIG)


def denoiser_programs(denoiser: nn.Module) -> tuple[Program, ...]:
    assert isinstance(denoiser, MovieGenTransformer)
    return (denoise_program(denoiser, TEXT, [Profile("video", {"F": 3, "H": 4, "W": 4}, 4)]),)


def programs(model: nn.Module) -> tuple[Program, ...]:
    assert isinstance(model, Small)
    return (time_program(model.denoiser, 8), *denoiser_programs(model.denoiser))
