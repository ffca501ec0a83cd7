"""The registered models as the checks of whole backends take them: the 48 layers of Movie Gen are alike and take minutes to trace, so two of them."""

from __future__ import annotations

from dataclasses import replace

import torch

from reelstep.compiler.part import Part
from reelstep.compiler.program import Program
from reelstep.engine.build import sharded_parts
from reelstep.engine.models import MODELS, movie_gen

DEEP = "movie-gen-30b"


def programs_of(name: str) -> tuple[Program, ...]:
    if name != DEEP:
        return MODELS[name].programs(MODELS[name].build())
    with torch.device("meta"):
        return movie_gen.programs_30b(build_shallow())


def parts_of(name: str) -> tuple[Part, ...]:
    parts = sharded_parts(MODELS[name])
    return tuple(replace(part, build=f"{__name__}:{build_shallow.__name__}") for part in parts) if name == DEEP else parts


def build_shallow() -> movie_gen.MovieGenTransformer:
    return movie_gen.MovieGenTransformer(replace(movie_gen.CONFIG_30B, layers=2))
