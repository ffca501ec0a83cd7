"""The shipped student: whose weights it has, and that a request runs them as plain Euler steps on its grid, without guidance."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from reelstep.benchmarks.concurrency import run_all
from reelstep.engine.build import default_tables
from reelstep.engine.executors.inline import Inline
from reelstep.engine.loop import Engine, warm_up
from reelstep.engine.models import reel_tiny
from reelstep.engine.models.byte_text import tokenize
from reelstep.engine.models.reel_tiny_flash import SPEC
from reelstep.engine.pipelines.latent import to_pixels
from reelstep.engine.resolve import Ask, resolve
from reelstep.engine.runner import Runner
from reelstep.engine.served import ServedModel, schedules_of
from reelstep.errors import UnsupportedRequest


@pytest.fixture(scope="module")
def model():
    return SPEC.build()


def test_text_encoder_and_autoencoder_are_the_teachers_and_the_denoiser_is_its_own_file(model):
    state = model.state_dict()
    teacher = load_file(reel_tiny.WEIGHTS / "reel-tiny.safetensors")
    student = load_file(reel_tiny.WEIGHTS / "reel-tiny-flash.safetensors")
    assert state.keys() == teacher.keys()
    assert student.keys() == {name.removeprefix("denoiser.") for name in teacher if name.startswith("denoiser.")}
    assert {value.dtype for value in student.values()} == {torch.bfloat16}
    for name, value in state.items():
        stored = student[name.removeprefix("denoiser.")] if name.startswith("denoiser.") else teacher[name]
        assert torch.equal(value, stored.float()), name
        assert bool(value.isfinite().all()), name


def test_its_programs_are_those_that_a_video_from_words_needs(model):
    assert [(p.name, [profile.name for profile in p.profiles]) for p in SPEC.programs(model)] == [
        ("encode_text", ["any"]), ("embed_time", ["any"]), ("denoise", ["video"]), ("decode", ["video"]),
    ]  # fmt: skip
    assert SPEC.card is not None
    assert SPEC.card.is_file()


@torch.no_grad()
def euler(model, prompt, seed, times):
    """[F, H, W, 3], straight from the modules."""
    denoiser, tae = model.denoiser, model.tae
    context = denoiser.text(model.text(torch.tensor([tokenize(prompt, 128)])))
    x = torch.randn((1, 16, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
    for t, after in pairwise(times):
        x = x + (after - t) * denoiser(x, denoiser.time(torch.tensor([t])), torch.zeros_like(x), context)
    return to_pixels(tae.decode(x).clamp(-1, 1))[0]


@pytest.fixture(scope="module")
def engine(model):
    """Over the modules as they are, in float32."""

    def run(program):
        def answer(inputs):
            with torch.no_grad():
                return {program.outputs[0].name: program.module(*(inputs[edge.name] for edge in program.inputs))}

        return answer

    programs = {(p.name, profile.name): run(p) for p in SPEC.programs(model) for profile in p.profiles}
    served = ServedModel(SPEC.name, SPEC.version, SPEC.settings, schedules_of(SPEC.settings), default_tables(SPEC.settings))
    made = Engine({SPEC.name: served}, Inline({SPEC.name: Runner(programs, dict.fromkeys(programs, 8))}))
    yield made
    made.close(0)


def test_an_engine_warms_up_with_it(engine):
    warm_up(engine, engine.models[SPEC.name], "text_to_video", "", several=False)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_request_is_eulers_method_on_the_grid(model, engine, steps):
    _, (result,) = run_all(engine, [resolve(Ask("a red heart spins", seed=3, steps=steps), engine.models)], together=True)
    times = {1: [0.0, 1.0], 2: [0.0, 1 / 3, 1.0], 3: [0.0, 1 / 3, 2 / 3, 1.0]}[steps]
    # float32 both ways, summed in another order: at most the rounding of a pixel
    assert np.abs(result.media.frames[0].astype(int) - euler(model, "a red heart spins", 3, times)).max() <= 1
    assert result.usage.forwards == steps


@pytest.mark.parametrize(("asked", "task"), [({"frames": 1}, "text_to_image"), ({"image": b"a picture"}, "animate_sticker")])
def test_what_needs_a_picture_or_makes_one_is_left_to_the_teacher(asked, task):
    served = ServedModel(SPEC.name, SPEC.version, SPEC.settings, schedules_of(SPEC.settings), {})
    with pytest.raises(UnsupportedRequest, match=f"'reel-tiny-flash' does not do {task}; it does: text_to_video"):
        resolve(Ask("a fox", **asked), {SPEC.name: served})
