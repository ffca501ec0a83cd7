"""Folding keeps a solver's results, and every shipped solver is its textbook's."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from reelstep.engine.samplers.fold import Rule, fold
from reelstep.engine.samplers.ns import Table, drive, sample, start
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.schedules import linear, linear_quadratic, shifted
from reelstep.engine.samplers.tables import SOLVERS
from reelstep.errors import ConfigError

SCHEDULES = {"linear": linear(8), "linear_quadratic": linear_quadratic(8), "shifted": shifted(8)}


def run(name, times, path, field, x):
    table = SOLVERS[name].build(times, path)
    return drive(sample(table, start(table, x)), field)


def test_random_general_rules_fold_to_the_same_states(four_gaussians, noise):
    n, generator = 7, torch.Generator().manual_seed(3)
    c = torch.rand(n, n, generator=generator, dtype=torch.float64).tril()
    c = c / c.sum(1, keepdim=True)
    d = torch.randn(n, n, generator=generator, dtype=torch.float64).tril() / n
    times, field = linear(n), four_gaussians("condot").velocity
    a, b = fold([Rule(dict(enumerate(c[i, : i + 1].tolist())), dict(enumerate(d[i, : i + 1].tolist()))) for i in range(n)])
    table = Table("random", "condot", 1, times, a, b)
    xs, us = [noise], []
    for i in range(n):
        us.append(field(xs[i], times[i]))
        xs.append(sum(c[i, j] * xs[j] for j in range(i + 1)) + sum(d[i, j] * us[j] for j in range(i + 1)))
    torch.testing.assert_close(drive(sample(table, start(table, noise)), field), xs[-1], rtol=1e-12, atol=1e-12)


def test_a_rule_may_not_look_ahead():
    with pytest.raises(ConfigError, match="later step"):
        fold([Rule({0: 1.0}, {1: 0.5})])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["euler", "midpoint", "heun", "ab2"])
def test_runge_kutta_and_multistep_tables_add_up_a_constant_velocity_exactly(name, schedule):
    table = SOLVERS[name].build(SCHEDULES[schedule], PATHS["condot"])
    assert table.a == (1.0,) * table.n
    for i, row in enumerate(table.b):
        assert sum(row) == pytest.approx(table.times[i + 1], abs=1e-15)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_table_asks_for_as_many_velocities_as_its_solver_declares(name):
    for steps in (1, 2, 3, 10):
        table = SOLVERS[name].build(linear(steps), PATHS["condot"])
        assert table.n == steps * SOLVERS[name].evaluations
        assert (table.name, table.path, table.order) == (name, "condot", SOLVERS[name].order)


@pytest.mark.parametrize("times", [(0.0,), (0.0, 0.5, 0.5, 1.0), (0.0, 0.6, 0.5, 1.0), (0.0, math.nan, 1.0)])
def test_a_schedule_that_does_not_increase_is_refused(times):
    with pytest.raises(ConfigError, match="increase"):
        SOLVERS["euler"].build(times, PATHS["condot"])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_midpoint_heun_and_ab2_are_the_textbook_loops(schedule, four_gaussians, noise):
    times, u = SCHEDULES[schedule], four_gaussians("condot").velocity
    midpoint = heun = ab2 = noise
    past = None
    for s, t in itertools.pairwise(times):
        h = t - s
        midpoint = midpoint + h * u(midpoint + h / 2 * u(midpoint, s), s + h / 2)
        k = u(heun, s)
        heun = heun + h / 2 * (k + u(heun + h * k, t))
        now = u(ab2, s)
        ab2 = ab2 + h * now if past is None else ab2 + h * (now + h / (2 * past[0]) * (now - past[1]))
        past = h, now
    for name, want in {"midpoint": midpoint, "heun": heun, "ab2": ab2}.items():
        torch.testing.assert_close(run(name, times, PATHS["condot"], u, noise), want, rtol=1e-12, atol=1e-12)


def data_form(order, times, field, x):
    """DDIM and DPM-Solver++(2M) on predicted data, in logarithms as their papers have them. For times where all are finite but the last."""
    lam = [field.path.at(t).half_log_snr for t in times]
    past = None
    for i in range(len(times) - 1):
        p, q = field.path.at(times[i]), field.path.at(times[i + 1])
        h, x1 = lam[i + 1] - lam[i], field.x1(x, times[i])
        mixed = x1
        if order == 2 and past is not None and math.isfinite(h):
            r = (lam[i] - lam[i - 1]) / h
            mixed = (1 + 1 / (2 * r)) * x1 - 1 / (2 * r) * past
        x, past = q.sigma / p.sigma * x + q.alpha * -math.expm1(-h) * mixed, x1
    return x


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
def test_ddim_and_dpm_solver_are_their_papers_data_form(name, path, four_gaussians, noise):
    field = four_gaussians(path)
    for end in (0.98, 1.0):
        times = [0.02 + (end - 0.02) * t for t in linear(9)]
        got = run(name, times, field.path, field.velocity, noise)
        torch.testing.assert_close(got, data_form(SOLVERS[name].order, times, field, noise), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", ["condot", "cosine"])
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
def test_a_start_at_pure_noise_is_the_limit_of_starts_just_after_it(name, path, four_gaussians, noise):
    field = four_gaussians(path)
    exact = run(name, linear(8), field.path, field.velocity, noise)
    near = [(run(name, (t0, *linear(8)[1:]), field.path, field.velocity, noise) - exact).abs().mean().item() for t0 in (1e-3, 1e-6, 1e-12, 1e-60)]
    assert near == sorted(near, reverse=True)
    # 2M converges only as 1 / lambda_0: about 1 / 140 of the first gap at t0 = 1e-60
    assert near[-1] < (1e-12 if name == "ddim" else 0.02)


def test_ddim_on_straight_lines_is_euler():
    for times in SCHEDULES.values():
        ddim, euler = (SOLVERS[name].build(times, PATHS["condot"]) for name in ("ddim", "euler"))
        assert ddim.a == euler.a
        for p, q in zip(ddim.b, euler.b, strict=True):
            assert p == pytest.approx(q, abs=1e-15)


def test_dpm_solver_scales_the_noise_as_published():
    # a[n-1] of 6 steps from t = 1e-3 and as far from t = 1: 1 on CondOT, 1.31 on cosine, 1.40 on VP (1.4056 without rounding)
    times = [1e-3 + (1 - 2e-3) * t for t in linear(6)]
    last = {name: SOLVERS["dpmpp_2m"].build(times, PATHS[name]).a[-1] for name in PATHS}
    assert last == pytest.approx({"condot": 1.0, "cosine": 1.31, "vp": 1.40}, abs=6e-3)
