"""Schedules: the published numbers, the ends, and what is refused."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from reelstep.engine.samplers.ns import drive, sample, start
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.schedules import (
    ALIGN_YOUR_STEPS,
    SCHEDULES,
    dynamic_shift,
    explicit,
    exponential,
    exponential_sigmas,
    from_sigmas,
    karras,
    karras_sigmas,
    late,
    linear,
    linear_quadratic,
    shifted,
)
from reelstep.engine.samplers.tables import SOLVERS
from reelstep.errors import ConfigError


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 50, 249, 250, 251, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_increases_from_exactly_0_to_exactly_1(name, steps):
    times = SCHEDULES[name](steps)
    assert len(times) == steps + 1
    assert (times[0], times[-1]) == (0.0, 1.0)
    assert all(s < t for s, t in pairwise(times))


@pytest.mark.parametrize("steps", [0, -1])
@pytest.mark.parametrize("name", SCHEDULES)
def test_no_steps_are_refused(name, steps):
    with pytest.raises(ConfigError, match="at least 1"):
        SCHEDULES[name](steps)


def test_late_is_half_done_at_five_eighths_and_begins_as_linear_does_with_three_fifths_of_its_steps():
    assert late(20)[10] == pytest.approx(5 / 8, rel=1e-15)
    assert late(2000)[1] == pytest.approx(linear(1200)[1], rel=1e-3)
    assert 1 - late(2000)[1999] == pytest.approx(0.6 / 2000, rel=1e-3), "the slope of the shift at the data"


def test_linear_quadratic_has_movie_gens_numbers_for_50_of_250_steps():
    t = linear_quadratic(50)
    assert {i: t[i] for i in (24, 25, 26, 30, 40, 49)} == pytest.approx({24: 0.096, 25: 0.1, 26: 0.10528, 30: 0.152, 40: 0.448, 49: 0.93328}, abs=1e-12)
    assert [t[i] for i in range(25, 51)] == pytest.approx([0.00128 * i * i - 0.06 * i + 0.8 for i in range(25, 51)], abs=1e-12)


def test_linear_quadratic_has_movie_gens_numbers_for_50_of_1000_steps():
    t = linear_quadratic(50, emulated=1000)
    assert {i: t[i] for i in (25, 26, 49)} == pytest.approx({25: 0.025, 26: 0.02752, 49: 0.92452}, abs=1e-12)


def test_linear_quadratic_has_movie_gens_numbers_for_20_steps():
    tail = [0.0532, 0.0848, 0.1348, 0.2032, 0.29, 0.3952, 0.5188, 0.6608, 0.8212, 1]
    assert linear_quadratic(20) == pytest.approx([i * 0.004 for i in range(11)] + tail, abs=1e-12)


def test_linear_quadratic_wastes_no_call_on_a_tiny_step_below_four():
    assert linear_quadratic(1) == (0.0, 1.0)
    assert linear_quadratic(2) == pytest.approx((0, 0.252, 1))  # 1/250 + (1 - 2/250) / 4
    assert min(t - s for s, t in pairwise(linear_quadratic(3))) > 0.1


def test_linear_quadratic_with_its_linear_part_given_keeps_the_slope_where_the_parts_meet():
    t = linear_quadratic(10, emulated=100, linear_steps=3)
    assert t[:4] == pytest.approx((0, 0.01, 0.02, 0.03))
    second = [t[i + 1] - 2 * t[i] + t[i - 1] for i in range(4, 10)]
    assert second == pytest.approx([second[0]] * 6)  # one parabola
    slope_at_joint = (t[4] - t[3]) - second[0] / 2
    assert slope_at_joint == pytest.approx(0.01)


@pytest.mark.parametrize("linear_steps", [-1, 10, 11])
def test_a_linear_part_that_leaves_no_quadratic_one_is_refused(linear_steps):
    with pytest.raises(ConfigError, match=r"0\.\.9"):
        linear_quadratic(10, linear_steps=linear_steps)


def test_as_many_steps_as_are_emulated_are_linear():
    assert linear_quadratic(250) == linear(250)
    assert linear_quadratic(300) == linear(300)


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0, 12.0])
def test_shift_is_sd3s_formula_in_noise_levels(shift):
    tau = [1 - i / 10 for i in range(11)]
    assert shifted(10, shift) == pytest.approx([1 - shift * x / (1 + (shift - 1) * x) for x in tau], abs=1e-15)


@pytest.mark.parametrize("shift", [0.0, -1.0, math.inf, math.nan])
def test_a_shift_that_is_not_positive_is_refused(shift):
    with pytest.raises(ConfigError, match="shift"):
        shifted(10, shift)


def test_dynamic_shift_is_flux_at_256_and_1024_pixels_and_on_the_line_between_and_beyond():
    assert dynamic_shift(20, 256) == shifted(20, math.exp(0.5))
    assert dynamic_shift(20, 4096) == pytest.approx(shifted(20, math.exp(1.15)), abs=1e-15)
    assert dynamic_shift(20, 2176) == pytest.approx(shifted(20, math.exp(0.825)), abs=1e-15)
    assert dynamic_shift(20, 8192) == pytest.approx(shifted(20, math.exp(1.15 + 0.65 * 16 / 15)), abs=1e-15)
    assert dynamic_shift(20, 8192, high=(8192, 0.9)) == pytest.approx(shifted(20, math.exp(0.9)), abs=1e-15)


@pytest.mark.parametrize(("tokens", "high"), [(0, (4096, 1.15)), (-1, (4096, 1.15)), (1024, (256, 1.15)), (1024, (100, 1.15))])
def test_no_tokens_or_a_line_through_one_point_are_refused(tokens, high):
    with pytest.raises(ConfigError, match="at least 1 token"):
        dynamic_shift(10, tokens, high=high)


def test_karras_spaces_the_roots_and_exponential_the_logarithms_of_noise_levels_equally():
    for times, scale in ((karras(9, 0.02, 0.9, rho=5.0), lambda tau: tau**0.2), (exponential(9, 0.02, 0.9), math.log)):
        assert (times[0], times[-2], times[-1]) == pytest.approx((0.1, 0.98, 1.0), abs=1e-15)
        gaps = [scale(1 - t) - scale(1 - s) for s, t in pairwise(times[:-1])]
        assert gaps == pytest.approx([gaps[0]] * 8, rel=1e-12)


def test_one_number_between_a_high_and_a_low_one_is_the_high_one():
    assert (*karras_sigmas(1, 0.1, 4.0), *exponential_sigmas(1, 0.1, 4.0)) == pytest.approx((4.0, 4.0), rel=1e-14)


@pytest.mark.parametrize(
    ("schedule", "options", "words"),
    [
        (karras, {"tau_min": 0.0}, "both above 0"),
        (karras, {"tau_min": 1.0}, "the first above the last"),
        (karras, {"tau_max": math.nan}, "finite"),
        (karras, {"tau_max": 14.6}, "from_sigmas"),
        (karras, {"rho": 0.0}, "rho"),
        (exponential, {"tau_min": -1.0}, "both above 0"),
        (exponential, {"tau_max": 1.5}, "from_sigmas"),
    ],
)
def test_a_spacing_without_sense_is_refused(schedule, options, words):
    with pytest.raises(ConfigError, match=words):
        schedule(10, **options)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sigmas", [karras_sigmas(10, 0.03, 14.6), (*exponential_sigmas(10, 0.03, 14.6), 0.0), *ALIGN_YOUR_STEPS.values()])
def test_on_its_times_a_path_has_the_sigmas_given(sigmas, path):
    points = [PATHS[path].at(t) for t in from_sigmas(sigmas, PATHS[path])]
    assert [p.sigma / p.alpha for p in points] == pytest.approx(sigmas, rel=1e-12)


def test_sigmas_may_begin_at_the_noise_end():
    assert from_sigmas([math.inf, 1.0, 0.0], PATHS["condot"]) == (0.0, 0.5, 1.0)
    assert from_sigmas([math.inf, 1.0, 0.0], PATHS["cosine"]) == pytest.approx((0.0, 0.5, 1.0))
    vp = PATHS["vp"]
    assert from_sigmas([math.exp(-vp.at(0.0).half_log_snr), 0.0], vp) == pytest.approx((0.0, 1.0), abs=1e-15)


@pytest.mark.parametrize("sigmas", [[], [1.0], [1.0, 1.0], [0.0, 1.0], [1.0, -0.1], [math.nan, 0.0], [1.0, math.nan], [153.0, 1.0], [math.inf, 0.0]])
def test_sigmas_that_a_path_does_not_have_are_refused(sigmas):
    with pytest.raises(ConfigError, match=r"decreasing within \[0, 152"):
        from_sigmas(sigmas, PATHS["vp"])


def test_a_users_list_is_taken_as_it_is():
    assert explicit([0, 0.25, 1]) == (0.0, 0.25, 1.0)
    assert explicit([0.3, 0.9]) == (0.3, 0.9)


@pytest.mark.parametrize("times", [[], [0.5], [0, 0.5, 0.5, 1], [1, 0], [-0.1, 1], [0, 1.1], [0, math.nan, 1], [0, math.inf]])
def test_a_bad_list_is_refused(times):
    with pytest.raises(ConfigError, match="increasing within"):
        explicit(times)


@pytest.mark.parametrize("steps", [1, 2, 3, 50])
@pytest.mark.parametrize("name", SCHEDULES)
def test_euler_on_movie_gens_exact_velocity_returns_the_data_on_any_schedule(name, steps):
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, 64, generator=generator, dtype=torch.float64)
    table = SOLVERS["euler"].build(SCHEDULES[name](steps), PATHS["condot"])
    got = drive(sample(table, start(table, x0)), lambda x, t: x1 - (1 - 1e-5) * x0)
    torch.testing.assert_close(got, x1 + 1e-5 * x0, rtol=0, atol=1e-13)
