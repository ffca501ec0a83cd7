"""`reel-tiny-flash`: a student of `reel-tiny` that makes a video from words in one to three steps, without guidance.

Distilled by Imagine Flash (Kohler et al. 2024, arXiv:2405.05224; training/zoo/reel_tiny_flash.py). Only its denoiser is its own: text encoder and
autoencoder are the teacher's, and lie in the teacher's file.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from reelstep.compiler.program import Program
from reelstep.engine.models import reel_tiny
from reelstep.engine.models.reel_tiny import FRAMES, WEIGHTS, ReelTiny, load_weights
from reelstep.engine.models.spec import GRID, Distilled, ModelSpec
from reelstep.engine.request import Defaults

TEACHER = reel_tiny.SPEC
GRIDS = {1: (0.0, 1.0), 2: (0.0, 1 / 3, 1.0), 3: (0.0, 1 / 3, 2 / 3, 1.0)}
"""Fewer steps leave out the last ones and end in the data predicted there, so all grids ask the student at times that it was trained at."""


def build() -> ReelTiny:
    """With the shipped weights of both files (bfloat16 on disk, float32 here)."""
    model = ReelTiny()
    for module, prefix in ((model.text, "text."), (model.tae, "tae.")):
        load_weights(module, WEIGHTS / "reel-tiny.safetensors", prefix)
    load_weights(model.denoiser, WEIGHTS / "reel-tiny-flash.safetensors")
    return model.eval()


def programs(model: nn.Module) -> tuple[Program, ...]:
    """encode_text, embed_time, denoise, decode: the teacher's without the profiles of pictures, and so without encode_image."""
    moving = (replace(program, profiles=tuple(p for p in program.profiles if p.name != "image")) for program in TEACHER.programs(model))
    return tuple(program for program in moving if program.profiles)


SPEC = ModelSpec(
    name="reel-tiny-flash",
    version="1",
    settings=replace(
        TEACHER.settings,
        tasks=("text_to_video",),
        limits=replace(TEACHER.settings.limits, frames=(FRAMES,), max_steps=max(GRIDS), max_scale=1.0),
        defaults={"text_to_video": Defaults("ddim", GRID, 3, 1.0, FRAMES, 8.0, guidance="none")},
        distilled=Distilled(GRIDS, scale=3.0, teacher=TEACHER.name),
    ),
    build=build,
    programs=programs,
    card=WEIGHTS / "reel-tiny-flash.md",
)
