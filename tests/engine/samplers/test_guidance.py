"""Guidance: its identities, what it costs, and that a rule which latches fits the contract."""

from __future__ import annotations

import io
import math

import pytest
import torch

from reelstep.engine.samplers.guidance import GUIDANCE, GuidanceState, Query, cfg, guided, none
from reelstep.engine.samplers.ns import SamplerState, drive, sample, start
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.schedules import linear
from reelstep.engine.samplers.tables import SOLVERS
from reelstep.errors import ConfigError

NOISE = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


def branch(name, x, t):
    return torch.cos(2 * x) * (1 + t) if name == "text" else torch.sin(x) - t


def network(x, t, branches):
    return tuple(branch(name, x, t) for name in branches)


def run(rule, solver="euler", steps=6):
    """The result, the state, the queries' branches."""
    table, state, asked = SOLVERS[solver].build(linear(steps), PATHS["condot"]), GuidanceState(), []

    def answer(x, t, branches):
        asked.append(branches)
        return network(x, t, branches)

    return drive(guided(sample(table, start(table, NOISE)), rule, state), answer), state, asked


def unguided(name, solver="euler", steps=6):
    table = SOLVERS[solver].build(linear(steps), PATHS["condot"])
    return drive(sample(table, start(table, NOISE)), lambda x, t: branch(name, x, t))


@pytest.mark.parametrize("solver", SOLVERS)
def test_cfg_is_its_formula_at_every_evaluation(solver):
    table = SOLVERS[solver].build(linear(6), PATHS["condot"])
    want = drive(sample(table, start(table, NOISE)), lambda x, t: branch("null", x, t) + 7.5 * (branch("text", x, t) - branch("null", x, t)))
    got, state, asked = run(cfg(7.5), solver)
    assert torch.equal(got, want)
    assert asked == [("text", "null")] * table.n
    assert (state.nfe, state.forwards) == (table.n, 2 * table.n)


@pytest.mark.parametrize(("rule", "name"), [(cfg(1.0), "text"), (cfg(0.0), "null"), (none(1.0), "text")])
def test_a_scale_that_needs_one_branch_runs_one(rule, name):
    got, state, asked = run(rule, "heun")
    assert torch.equal(got, unguided(name, "heun"))
    assert asked == [(name,)] * 12
    assert (state.nfe, state.forwards) == (12, 12)


@pytest.mark.parametrize("scale", [1.5, 7.5])
def test_equal_branches_are_left_alone_by_any_scale(scale):
    table = SOLVERS["euler"].build(linear(6), PATHS["condot"])
    got = drive(guided(sample(table, start(table, NOISE)), cfg(scale), GuidanceState()), lambda x, t, branches: (branch("text", x, t),) * len(branches))
    assert torch.equal(got, unguided("text"))


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0])
def test_a_scale_that_is_not_a_finite_positive_number_is_refused(scale):
    with pytest.raises(ConfigError, match="scale"):
        cfg(scale)


def test_a_scale_without_guidance_is_an_error_and_not_ignored():
    with pytest.raises(ConfigError, match="use 'cfg'"):
        none(7.5)


@pytest.mark.parametrize("name", GUIDANCE)
def test_every_rule_at_scale_1_is_the_prompts_velocity(name):
    assert torch.equal(run(GUIDANCE[name](1.0))[0], unguided("text"))


def test_an_answer_with_a_branch_missing_is_refused():
    table = SOLVERS["euler"].build(linear(2), PATHS["condot"])
    generator = guided(sample(table, start(table, NOISE)), cfg(2.0), GuidanceState())
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
def test_a_guided_run_saved_at_any_query_continues_bit_for_bit_with_its_counts(stop):
    whole, counts, _ = run(stop_after(0.5), "heun")
    table = SOLVERS["heun"].build(linear(6), PATHS["condot"])
    sampler, guidance = start(table, NOISE), GuidanceState()
    generator = guided(sample(table, sampler), stop_after(0.5), guidance)
    query = next(generator)
    for _ in range(stop):
        query = generator.send(network(*query))
    file = io.BytesIO()
    torch.save([vars(sampler), vars(guidance)], file)
    file.seek(0)
    saved_sampler, saved_guidance = torch.load(file, weights_only=True)
    guidance = GuidanceState(**saved_guidance)
    got = drive(guided(sample(table, SamplerState(**saved_sampler)), stop_after(0.5), guidance), network)
    assert torch.equal(got, whole)
    assert guidance == counts
