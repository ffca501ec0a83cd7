"""Guidance: its identities, what it costs, and that a rule which latches fits the contract."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from reelstep.engine.samplers.guidance import GUIDANCE, GuidanceState, Query, guided
from reelstep.engine.samplers.guidance.adaptive import cosine
from reelstep.engine.samplers.ns import drive, sample, start
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.schedules import linear
from reelstep.engine.samplers.tables import SOLVERS
from reelstep.errors import ConfigError, NotFound

NOISE = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


def fresh(step):
    """What solvers with noise add."""
    return torch.randn(2, 6, generator=torch.Generator().manual_seed(1 + step))


def branch(name, x, t):
    return torch.cos(2 * x) * (1 + t) if name == "text" else torch.sin(x) - t


def network(x, t, branches):
    return tuple(branch(name, x, t) for name in branches)


def rule_of(name, scale, path="condot", **options):
    return GUIDANCE[name].build(scale, PATHS[path], options)


def cfg(scale):
    return rule_of("cfg", scale)


def run(rule, solver="euler", steps=6):
    """The result, the state, the queries' branches."""
    table, state, asked = SOLVERS[solver].build(linear(steps), PATHS["condot"]), GuidanceState(), []

    def answer(x, t, branches):
        asked.append(branches)
        return network(x, t, branches)

    return drive(guided(sample(table, start(table, NOISE), fresh), rule, state), answer), state, asked


def unguided(name, solver="euler", steps=6):
    table = SOLVERS[solver].build(linear(steps), PATHS["condot"])
    return drive(sample(table, start(table, NOISE), fresh), lambda x, t: branch(name, x, t))


@pytest.mark.parametrize("solver", SOLVERS)
def test_cfg_is_its_formula_at_every_evaluation(solver):
    table = SOLVERS[solver].build(linear(6), PATHS["condot"])
    want = drive(sample(table, start(table, NOISE), fresh), lambda x, t: branch("null", x, t) + 7.5 * (branch("text", x, t) - branch("null", x, t)))
    got, state, asked = run(cfg(7.5), solver)
    assert torch.equal(got, want)
    assert asked == [("text", "null")] * table.n
    assert (state.nfe, state.forwards) == (table.n, 2 * table.n)


@pytest.mark.parametrize(("rule", "name"), [(cfg(1.0), "text"), (cfg(0.0), "null"), (rule_of("none", 1.0), "text")])
def test_a_scale_that_needs_one_branch_runs_one(rule, name):
    got, state, asked = run(rule, "heun")
    assert torch.equal(got, unguided(name, "heun"))
    assert asked == [(name,)] * 12
    assert (state.nfe, state.forwards) == (12, 12)


@pytest.mark.parametrize("scale", [1.5, 7.5])
def test_equal_branches_are_left_alone_by_any_scale(scale):
    table = SOLVERS["euler"].build(linear(6), PATHS["condot"])
    got = drive(guided(sample(table, start(table, NOISE), fresh), cfg(scale), GuidanceState()), lambda x, t, branches: (branch("text", x, t),) * len(branches))
    assert torch.equal(got, unguided("text"))


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0])
def test_a_scale_that_is_not_a_finite_positive_number_is_refused(scale):
    with pytest.raises(ConfigError, match="scale"):
        cfg(scale)


def test_a_scale_without_guidance_is_an_error_and_not_ignored():
    with pytest.raises(ConfigError, match="use 'cfg'"):
        rule_of("none", 7.5)


@pytest.mark.parametrize("name", GUIDANCE)
def test_every_rule_at_scale_1_is_the_prompts_velocity(name):
    assert torch.equal(run(rule_of(name, 1.0))[0], unguided("text"))


def test_an_answer_with_a_branch_missing_is_refused():
    table = SOLVERS["euler"].build(linear(2), PATHS["condot"])
    generator = guided(sample(table, start(table, NOISE), fresh), cfg(2.0), GuidanceState())
    next(generator)
    with pytest.raises(ConfigError, match="one for each"):
        generator.send((NOISE,))


def stop_after(latch_time):
    """Guidance that, once at or past a time, never asks for the null branch again: the shape of Adaptive Guidance."""

    def rule(x, t, state):
        if "latched" in state.memory:
            (text,) = yield Query(x, t, ("text",))
            return text
        text, null = yield Query(x, t, ("text", "null"))
        if t >= latch_time:
            state.memory["latched"] = torch.ones(())
        return null + 3.0 * (text - null)

    return rule


def test_a_rule_may_latch_and_forwards_count_what_really_ran():
    _, state, asked = run(stop_after(0.5))  # evaluations at 0, 1/6, ..., 5/6; the fourth latches
    assert asked == [("text", "null")] * 4 + [("text",)] * 2
    assert (state.nfe, state.forwards) == (6, 10)


def test_a_rule_may_ask_more_than_once_for_one_velocity():
    def one_by_one(x, t, state):
        (text,) = yield Query(x, t, ("text",))
        (null,) = yield Query(x, t, ("null",))
        return null + 3.0 * (text - null)

    got, state, _ = run(one_by_one)
    assert torch.equal(got, run(cfg(3.0))[0])
    assert (state.nfe, state.forwards) == (6, 12)


@pytest.mark.parametrize("stop", range(12))
def test_a_guided_run_saved_at_any_query_continues_bit_for_bit_with_its_counts(stop, interrupted):
    whole, counts, _ = run(stop_after(0.5), "heun")
    got, guidance = interrupted(SOLVERS["heun"].build(linear(6), PATHS["condot"]), NOISE, stop_after(0.5), network, stop, fresh)
    assert torch.equal(got, whole)
    assert guidance == counts


def test_an_option_that_a_rule_lacks_or_that_is_out_of_range_is_refused():
    with pytest.raises(NotFound, match="known: guided, threshold"):
        rule_of("adaptive", 3.0, treshold=0.9)
    with pytest.raises(ConfigError, match=r"-1 to 2"):
        rule_of("adaptive", 3.0, threshold=math.nan)
    with pytest.raises(ConfigError, match="is empty"):
        rule_of("interval", 3.0, start=0.5, stop=0.5)


def one_velocity(rule, text, null, bare=None, x=NOISE, t=0.25, state=None):
    """A rule's velocity for given branches, and the branches it asked for."""
    by_name, asked = {"text": text, "null": null, "bare": bare}, []

    def answer(x, t, branches):
        asked.extend(branches)
        return tuple(by_name[name] for name in branches)

    return drive(rule(x, t, state or GuidanceState()), answer), asked


@pytest.fixture
def branches():
    return torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).unbind(0)


def test_rescaled_guidance_has_the_deviation_of_the_prompts_velocity(branches):
    text, null, _ = branches
    x = torch.zeros_like(text)
    whole, _ = one_velocity(rule_of("cfg", 7.5, rescale=1.0), text, null, x=x)
    plain, _ = one_velocity(cfg(7.5), text, null, x=x)
    half, _ = one_velocity(rule_of("cfg", 7.5, rescale=0.5), text, null, x=x)
    assert torch.allclose(whole.std(1), text.std(1))
    assert torch.allclose(half, (whole + plain) / 2)


def test_an_interval_guides_inside_and_costs_one_forward_outside():
    _, state, asked = run(rule_of("interval", 3.0, start=0.3, stop=0.7))  # times 0, 1/6, ..., 5/6
    assert asked == [("text",)] * 2 + [("text", "null")] * 3 + [("text",)]
    assert (state.nfe, state.forwards) == (6, 9)


def test_cfg_zero_projects_the_null_velocity_and_rests_without_a_forward(branches):
    text, null, _ = branches
    u, _ = one_velocity(rule_of("cfg_zero", 4.0), text, null, x=torch.zeros_like(text))
    for row in range(len(text)):  # least squares of text on null, by numpy
        r = np.linalg.lstsq(null[row].numpy()[:, None], text[row].numpy(), rcond=None)[0][0]
        assert torch.allclose(u[row], r * null[row] + 4.0 * (text[row] - r * null[row]))
    _, state, asked = run(rule_of("cfg_zero", 4.0, rest=2))
    assert (len(asked), state.nfe, state.forwards) == (4, 6, 8)


def test_projected_guidance_moves_at_right_angles_to_the_predicted_data(branches):
    text, null, x = branches
    t = 0.25
    u, _ = one_velocity(rule_of("apg", 4.0), text, null, x=x, t=t)
    predicted = x + (1 - t) * text  # data on straight lines
    assert torch.allclose(((u - text) * predicted).sum(1), torch.zeros(4, dtype=torch.float64), atol=1e-12)
    plain, _ = one_velocity(rule_of("apg", 4.0, eta=1.0), text, null, x=x, t=t)
    assert torch.allclose(plain, null + 4.0 * (text - null))


def test_projected_guidance_limits_the_norm_and_remembers_past_differences(branches):
    text, null, x = branches
    u, _ = one_velocity(rule_of("apg", 2.0, eta=1.0, limit=0.5), text, null, x=x, t=0.25)
    assert torch.allclose(((u - text) * 0.75).norm(dim=1), torch.full((4,), 0.5, dtype=torch.float64))
    rule, state = rule_of("apg", 2.0, eta=1.0, momentum=-0.5), GuidanceState()
    first, _ = one_velocity(rule, text, null, x=x, t=0.25, state=state)
    second, _ = one_velocity(rule, text, null, x=x, t=0.25, state=state)
    assert torch.allclose(second - text, 0.5 * (first - text))


def test_projected_guidance_is_refused_where_there_is_no_predicted_data(branches):
    text, null, x = branches
    with pytest.raises(ConfigError, match="no predicted data"):
        one_velocity(rule_of("apg", 2.0), text, null, x=x, t=1.0)


def test_adaptive_guidance_never_latched_is_cfg_bit_for_bit():
    assert torch.equal(run(rule_of("adaptive", 3.0, threshold=2.0), "heun")[0], run(cfg(3.0), "heun")[0])


def test_adaptive_guidance_latched_at_once_runs_one_guided_evaluation():
    _, state, asked = run(rule_of("adaptive", 3.0, threshold=-1.0))
    assert asked == [("text", "null")] + [("text",)] * 5
    assert (state.nfe, state.forwards) == (6, 7), "evaluations plus guided ones"
    assert run(rule_of("adaptive", 3.0, threshold=-1.0, guided=4))[1].forwards == 10


def test_the_step_that_reaches_the_threshold_is_guided_and_no_later_one_whatever_the_cosine(branches):
    text, _, x = branches
    rule, state = rule_of("adaptive", 3.0, threshold=0.9), GuidanceState()
    one_velocity(rule, text, -text, x=x, state=state)
    assert not state.memory
    u, asked = one_velocity(rule, text, 1.01 * text, x=x, state=state)
    assert asked == ["text", "null"]
    assert torch.allclose(u, 1.01 * text + 3.0 * (text - 1.01 * text))
    u, asked = one_velocity(rule, text, -text, x=x, state=state)
    assert asked == ["text"]
    assert torch.equal(u, text)


def test_the_cosine_is_numpys_and_one_where_nothing_is_guided(branches):
    x, y, _ = branches
    want = [np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(x.numpy(), y.numpy(), strict=True)]
    assert cosine(x, y).tolist() == pytest.approx(want, abs=1e-12)
    assert cosine(x, torch.zeros_like(x)).tolist() == [1.0] * 4


def test_what_is_compared_decides_the_cosine():
    """On a noise model both branches agree near the noise; their predicted data do not. Castillo et al. 2023; checked on Gaussians.

    Data of the branches are N(+-m, c^2) in 64 dimensions; on straight lines at t = 0.05 the exact velocities are closed forms.
    """
    t, c, m = 0.05, 0.3, torch.ones(1, 64, dtype=torch.float64)
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def velocity(mean):
        x1 = mean + t * c**2 / (t**2 * c**2 + (1 - t) ** 2) * (x - t * mean)
        return (x1 - x) / (1 - t), x1

    (text, x1_text), (null, x1_null) = velocity(m), velocity(-m)
    noise_cosine = float(cosine(x - t * x1_text, x - t * x1_null))
    assert noise_cosine > 0.98
    assert abs(float(cosine(text, null))) < 0.4
    assert float(cosine(x1_text, x1_null)) < -0.9
    for rule, latches in (("adaptive", True), ("adaptive_x1", False)):
        state = GuidanceState()
        one_velocity(rule_of(rule, 3.0, threshold=-0.5), text, null, x=x, t=t, state=state)
        assert bool(state.memory) == latches


def test_a_held_difference_gives_cfg_where_the_difference_is_constant():
    table, constant = SOLVERS["heun"].build(linear(6), PATHS["condot"]), torch.ones_like(NOISE)

    def answer(x, t, asked):
        return tuple(branch("text", x, t) - (constant if name == "null" else 0) for name in asked)

    def whole(rule):
        state = GuidanceState()
        return drive(guided(sample(table, start(table, NOISE), fresh), rule, state), answer), state.forwards

    (want, full), (got, held) = whole(cfg(3.0)), whole(rule_of("delta_hold", 3.0, stop=0.5))
    assert torch.allclose(got, want, atol=1e-5)
    assert (full, held) == (24, 17), "held from 0.5 on: seven of twelve evaluations"


def test_picture_and_text_have_scales_of_their_own(branches):
    text, null, bare = branches
    u, asked = one_velocity(rule_of("picture_and_text", 5.0, picture=2.0), text, null, bare)
    assert asked == ["text", "null", "bare"]
    assert torch.allclose(u, bare + 2.0 * (null - bare) + 5.0 * (text - null))
    one, _ = one_velocity(rule_of("picture_and_text", 1.0, picture=1.0), text, null, bare)
    assert torch.equal(one, text), "scales 1 and 1 are the conditional velocity"
    assert one_velocity(rule_of("picture_and_text", 5.0), text, null)[1] == ["text", "null"], "with picture 1 it is CFG, at its cost"
