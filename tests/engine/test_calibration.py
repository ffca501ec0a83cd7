"""Requests that quantisation measures by, on the toy model of closed forms."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reelstep.engine.calibration import HELD_OUT_SEED, TaskRequests
from reelstep.engine.models import MODELS
from reelstep.engine.pipelines.latent import draw_noise
from reelstep.engine.request import Defaults
from reelstep.engine.served import ServedModel
from reelstep.errors import ConfigError, InvalidRequest


class Engine:
    """A closed form with a limit of rows, as an executable has one; it counts the rows of each call."""

    def __init__(self, run):
        self.run, self.signature, self.rows = run, SimpleNamespace(max_batch=8), []

    def __call__(self, inputs):
        self.rows.append(len(next(iter(inputs.values()))))
        return self.run(inputs)


def psnr(a, b):
    mse = float(np.square(a.astype(float) - b).mean())
    return 100.0 if mse == 0 else 10 * math.log10(255**2 / mse)


def agreement(a, b):
    return float((a == b).mean())


@pytest.fixture
def asked(closed_form):
    settings, programs, _ = closed_form
    defaults = {
        "text_to_image": Defaults("euler", "linear", 2, 3.0, 1, 8.0),
        "text_to_video": Defaults("euler", "linear", 4, 3.0, 8, 8.0),
        "animate_sticker": Defaults("euler", "linear", 3, 1.0, 8, 8.0),
    }
    served = ServedModel("toy", "1", replace(settings, defaults=defaults), ("linear",), {})
    return TaskRequests(served, ("a cat", "a dog"), ("a fish",), psnr, agreement, seed=5), {key: Engine(run) for key, run in programs.items()}


def test_every_step_of_every_task_is_heard_with_both_branches(asked, closed_form):
    requests, engines = asked
    calls = requests.calls(engines)
    assert {key: len(found) for key, found in calls.items()} == {("denoise", "image"): 2 * 2, ("denoise", "video"): 2 * (4 + 3)}
    rows = [len(call["x"]) for call in calls["denoise", "video"]]
    assert rows == [2, 2, 2, 2, 1, 1, 1] * 2, "an animation at scale 1 has one branch"
    target, null = closed_form[2]
    guided = null + 3 * (target - null)
    noise = draw_noise((3, 4, 2, 2), 5)
    for k, call in enumerate(calls["denoise", "video"][:4]):
        t = k / 4
        assert call["modulation"][0, 0, 0] == t
        assert torch.allclose(call["x"], ((1 - t) * noise + t * guided).expand(2, -1, -1, -1, -1), atol=1e-5)


def test_every_request_is_told_of_before_it_runs(asked):
    requests, engines = asked
    told = []
    requests = replace(requests, progress=lambda *stage: told.append((*stage, engines["decode", "video"].rows[:])))
    requests.calls(engines)
    names = [f"quantise: {task} of {prompt!r}" for prompt in ("a cat", "a dog") for task in ("text_to_image", "text_to_video", "animate_sticker")]
    assert [stage for *stage, _ in told] == [[name, done, 6] for done, name in enumerate(names)]
    assert len(told[1][-1]) < len(told[2][-1]), "the video was made between the second and the third"
    told.clear()
    requests.compare(engines, engines)
    assert [(done, total) for _, done, total, _ in told] == [(0, 3), (1, 3), (2, 3)]


def test_branches_of_guidance_run_in_one_batch(asked):
    requests, engines = asked
    requests.calls(engines)
    assert engines["denoise", "image"].rows.count(2) == 2 * 2 * 2, "pictures are made once more, to be animated"


def test_animations_have_the_models_own_picture(asked):
    requests, engines = asked
    conditions = [call["condition"] for call in requests.calls(engines)["denoise", "video"]]
    assert [bool(c.any()) for c in conditions[:7]] == [False] * 4 + [True] * 3


def test_results_are_those_of_the_engine(asked, toy, request_for):
    requests, engines = asked
    request = request_for(scale=2.5, seed=9, steps=3)
    heard = toy.submit(scale=2.5, seed=9, steps=3)
    assert np.array_equal(requests.run(request, engines).frames, heard.result().media.frames)


def test_others_are_compared_from_other_noise(asked):
    """A decoder that is 10 levels brighter everywhere: PSNR is 20 log10(255 / 10)."""
    requests, engines = asked
    seen = []
    dark = Engine(lambda inputs: {"video": torch.zeros(len(inputs["latent"]), 3, 2 * inputs["latent"].shape[2], 16, 16)})
    bright = Engine(lambda inputs: {"video": dark.run(inputs)["video"] + 20 / 255})
    watched = Engine(lambda inputs: seen.append(inputs["x"]) or engines["denoise", "video"].run(inputs))
    decoders = [("decode", "video"), ("decode", "image")]
    reference = engines | dict.fromkeys(decoders, dark)
    found = requests.compare(reference, engines | dict.fromkeys(decoders, bright) | {("denoise", "video"): watched})
    assert found == (pytest.approx(20 * math.log10(255 / 10)), 0.0, 3)
    assert torch.equal(seen[0][:1], draw_noise((3, 4, 2, 2), 5 + HELD_OUT_SEED))
    assert requests.compare(engines, engines) == (100.0, 1.0, 3)


@pytest.mark.parametrize(("prompts", "held_out", "text"), [((), ("a",), "0 prompts to measure"), (("a", "b"), ("b",), "'b' is both")])
def test_prompts_are_checked(asked, prompts, held_out, text):
    with pytest.raises(ConfigError, match=text):
        replace(asked[0], prompts=prompts, held_out=held_out)


def test_a_prompt_that_the_model_does_not_take_is_refused_before_anything_runs(asked):
    with pytest.raises(InvalidRequest, match=r"prompt: is 5000 bytes; at most 31"):
        replace(asked[0], held_out=("a fish", "x" * 5000))


def test_a_model_without_tasks_is_refused():
    with pytest.raises(ConfigError, match="does no task"):
        TaskRequests.of(MODELS["dit-mid"], ("a",), ("b",), psnr, agreement)
