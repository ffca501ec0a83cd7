"""The field of an animation: the picture that its model makes, and the branches of guidance that see it."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from reelstep.engine.calibration import run_request, unfitted
from reelstep.engine.models import MODELS
from reelstep.engine.request import Fit
from reelstep.engine.resolve import Ask, resolve
from reelstep.engine.runner import Runner
from reelstep.engine.samplers.guidance import GUIDANCE
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.schedules import linear
from reelstep.engine.samplers.tables import SOLVERS
from reelstep.errors import UnsupportedRequest
from reelstep.training.field import ends_under
from reelstep.training.model_field import PICTURES_SEED, ModelFields

SPEC = MODELS["reel-tiny"]
WORDS = ["a cat grows", "a red heart spins"]


@pytest.fixture(scope="module")
def module():
    return SPEC.build()


@pytest.fixture(scope="module")
def fields(module):
    return ModelFields.of(SPEC, module, Fit(("animate_sticker",), "", "", 4, "picture_and_text", {"picture": 2.0}, 3.0), WORDS)


@pytest.fixture(scope="module")
def runner(module):
    """The model's own modules, as plainly as they can be called."""

    def run(program, inputs):
        with torch.no_grad():
            return {program.outputs[0].name: program.module(*(inputs[edge.name] for edge in program.inputs))}

    programs = {(p.name, profile.name): p for p in SPEC.programs(module) for profile in p.profiles}
    return Runner({key: lambda inputs, p=p: run(p, inputs) for key, p in programs.items()}, dict.fromkeys(programs, 16))


def test_pictures_are_what_the_model_answers_to_the_same_words(fields, runner):
    still = resolve(Ask(WORDS[1], seed=PICTURES_SEED + 1, frames=1), {"reel-tiny": unfitted(SPEC)})
    made = np.array(Image.open(BytesIO(fields.pictures[1]))).astype(int)
    assert np.abs(made - run_request(unfitted(SPEC), still, runner).frames[0, 0]).max() <= 1, "of rounding: attention is computed in another order"
    assert len(set(fields.identity)) == 2


def test_a_field_with_a_picture_has_three_branches(fields, module):
    """Equation 3 of InstructPix2Pix, written out on the network itself."""
    x, t = fields.noise(5), torch.tensor(0.3)
    pixels = [np.array(Image.open(BytesIO(picture))) for picture in fields.pictures]
    with torch.no_grad():
        still = torch.stack([torch.tensor(p).permute(2, 0, 1).float() / 127.5 - 1 for p in pixels])[:, :, None]
        picture = module.tae.encode(still).expand(-1, -1, x.shape[2], -1, -1)
        modulation = module.denoiser.time(t.reshape(1)).expand(2, -1, -1)
        text, null = (module.denoiser(x, modulation, picture, fields.contexts[name]) for name in ("text", "null"))
        bare = module.denoiser(x, modulation, torch.zeros_like(picture), fields.contexts["null"])
        expected = bare + 2.0 * (null - bare) + 3.0 * (text - null)
        assert torch.allclose(fields(torch.tensor([0, 1]))(x, t), expected, atol=2e-4)
        assert torch.allclose(fields(torch.tensor([1]))(x[1:], t), expected[1:], atol=2e-4), "each sample has its own picture"
    assert float((expected - bare).abs().mean()) > 0.01, "the picture says something"


def test_a_run_in_the_field_ends_where_the_pipeline_ends(fields, runner):
    table = SOLVERS["euler"].build(linear(3), PATHS["condot"])
    rule = GUIDANCE["picture_and_text"].build(3.0, PATHS["condot"], {"picture": 2.0})
    ends, forwards = ends_under(fields.network, table, rule, fields.noise(7), 2)
    assert forwards == 3 * 3
    with torch.no_grad():
        video = fields.programs["decode"].module(ends).clamp(-1, 1)
    ask = Ask(WORDS[0], seed=7, image=fields.pictures[0], steps=3, scale=3.0, guidance="picture_and_text", guidance_options={"picture": 2.0})
    made = run_request(unfitted(SPEC), resolve(ask, {"reel-tiny": unfitted(SPEC)}), runner).frames[0]
    expected = (video[0].permute(1, 2, 3, 0).numpy() + 1) * 127.5
    assert np.abs(expected - made).max() <= 1


def test_the_field_of_a_task_without_pictures_makes_none(module):
    fields = ModelFields.of(SPEC, module, Fit(("text_to_video",), "", "", 4, "cfg", {"rescale": 0.0}, 3.0), WORDS)
    assert (fields.pictures, fields.conditions, fields.identity) == ((), None, [])
    assert not fields.inputs(torch.tensor([0]), fields.noise(0)[:1], 0.5, ("text", "bare"))["condition"].any()


def test_a_task_that_no_field_is_made_of_is_refused(module):
    with pytest.raises(UnsupportedRequest, match="no fits for track_body; tasks of words and pictures alone: text_to_image"):
        ModelFields.of(SPEC, module, Fit(("track_body",), "", "", 4, "cfg", {}, 1.0), WORDS)
