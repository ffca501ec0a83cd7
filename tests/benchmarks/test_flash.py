"""The student's benchmark: prompts that it never saw, what is compared, and a noise correction that is seen where there is one. All of it runs by
`reelstep bench flash`."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reelstep.benchmarks import flash
from reelstep.benchmarks.flash import Made, Reference, contenders, correction, data_clips, held_out, rows_of
from reelstep.engine.models.reel_tiny_flash import SPEC
from reelstep.engine.request import Usage
from reelstep.engine.samplers.paths import PATHS
from reelstep.training.zoo import reel_tiny_flash as recipe
from reelstep.training.zoo.stickers import FONT, prompts


def test_no_prompt_is_one_that_the_student_learned_from_or_was_chosen_by():
    found = held_out(16)
    assert len(set(found)) == 16
    assert not set(found) & set(prompts(recipe.PROMPTS + recipe.VALIDATION_PROMPTS, 0))


def test_teacher_student_and_untouched_teacher_are_compared():
    asks = contenders("reel-tiny-flash", SPEC.settings.distilled, 25)
    assert [(name, a.model, a.solver, a.guidance, a.scale, a.steps) for name, a in asks.items()] == [
        ("teacher, 25 steps", "reel-tiny", "euler", "cfg", 3.0, 25),
        ("teacher, its defaults", "reel-tiny", "", "", None, None),
        ("student, 3 steps", "reel-tiny-flash", "", "", None, 3),
        ("student, 2 steps", "reel-tiny-flash", "", "", None, 2),
        ("student, 1 steps", "reel-tiny-flash", "", "", None, 1),
        ("untouched, 3 steps", "reel-tiny", "euler", "cfg", 3.0, 3),
    ]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_noise_correction_changes_exactly_nothing_from_noise_alone_and_what_the_closed_form_says_from_elsewhere(steps):
    """Data of one point: u = d_alpha x1 + d_sigma eps with eps = (x - alpha x1) / sigma, and the first step moves by s1 (z (1 - 1/s0) + a0/s0 x1)."""
    x1, noise = 2.0, torch.randn((4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = [i / steps for i in range(steps)] + [1.0]

    def field_on(path):
        def field(x, t):
            at = path.at(float(t))
            return at.d_alpha * x1 + at.d_sigma * (x - at.alpha * x1) / at.sigma

        return field

    assert correction(field_on(PATHS["condot"]), "condot", times, noise) == 0.0
    first, second = PATHS["vp"].at(0.0), PATHS["vp"].at(times[1])
    moved = second.sigma * (noise * (1 - 1 / first.sigma) + first.alpha / first.sigma * x1)
    found = correction(field_on(PATHS["vp"]), "vp", times, noise)
    assert found >= float(moved.abs().max()) - 1e-12
    assert (found > 1e-4) == (steps > 1), "one step ends in the predicted data, with nothing left of any noise"


@pytest.mark.skipif(not FONT.exists(), reason=f"{FONT} is not installed (Debian: fonts-noto-color-emoji)")
def test_clips_of_the_data_move_and_differ_by_seed():
    clips = data_clips(6, 0)
    assert (clips.shape, clips.dtype) == ((6, 8, 64, 64, 3), np.uint8)
    assert (clips[:, 0] != clips[:, -1]).any((1, 2, 3)).all()
    assert np.array_equal(clips, data_clips(6, 0))
    assert not np.array_equal(clips, data_clips(6, 1))


def made_of(model, steps, forwards):
    request = SimpleNamespace(model=model, solver="ddim", guidance="none", scale=1.0, steps=steps)
    video = SimpleNamespace(frames=[f"{model} {steps}"])
    return Made([request], [SimpleNamespace(media=video, usage=Usage(steps, each, 0, 0.0, {})) for each in forwards], [0.5, 0.7])


def test_a_row_is_measured_by_the_teachers_and_says_what_noise_correction_did(monkeypatch):
    """Features are stood in for by one Gaussian a contender: the distance of two of one shape is the square of what lies between their means."""
    cloud = np.random.default_rng(0).standard_normal((40, 3))
    means = {"reel-tiny 25": 0.5, "reel-tiny-flash 3": 1.0, "reel-tiny 3": 3.0}
    monkeypatch.setattr(flash, "features", lambda videos: cloud + np.array([means[videos[0]], 0, 0]))
    made = {"teacher": made_of("reel-tiny", 25, [50, 50]), "student": made_of("reel-tiny-flash", 3, [3, 3]), "untouched": made_of("reel-tiny", 3, [6, 6])}
    rows = rows_of(made, Reference(data=cloud - np.array([0.5, 0, 0]), teacher=cloud), {3: "changes 0; alpha is 0 at t = 0"})
    assert [row["to_data"] for row in rows] == pytest.approx([1.0, 2.25, 12.25], rel=1e-9)
    assert [row["over_teacher"] for row in rows] == pytest.approx([1, 2.25, 12.25], rel=1e-9)
    assert [row["to_teacher"] for row in rows] == pytest.approx([0.25, 1.0, 9.0], rel=1e-9)
    assert [row["over_floor"] for row in rows] == pytest.approx([1, 4, 36], rel=1e-9)
    assert [row["forwards"] for row in rows] == [50, 3, 6]
    assert [row["noise_correction"] for row in rows] == ["", "changes 0; alpha is 0 at t = 0", ""]
    assert [row["seconds"] for row in rows] == pytest.approx([0.6] * 3)
