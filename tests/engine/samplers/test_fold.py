"""Folding keeps a solver's results, and every shipped solver is its textbook's."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from reelstep.engine.samplers.fold import Rule, fold, noise, state, velocity
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
    d, e = torch.randn(2, n, n, generator=generator, dtype=torch.float64).tril() / n
    z = torch.randn(n, *noise.shape, generator=generator, dtype=torch.float64)
    times, field = linear(n), four_gaussians("condot").velocity
    table = Table("random", "condot", 1, times, *fold([Rule(*(dict(enumerate(m[i, : i + 1].tolist())) for m in (c, d, e))) for i in range(n)]))
    xs, us = [noise], []
    for i in range(n):
        us.append(field(xs[i], times[i]))
        xs.append(sum(c[i, j] * xs[j] + d[i, j] * us[j] + e[i, j] * z[j] for j in range(i + 1)))
    torch.testing.assert_close(drive(sample(table, start(table, noise), z.__getitem__), field), xs[-1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("later", [state(1), velocity(1), noise(1)])
def test_a_rule_may_not_look_ahead(later):
    with pytest.raises(ConfigError, match="later step"):
        fold([state(0) + 0.5 * later])


def test_rules_that_draw_no_noise_fold_to_a_table_without():
    assert fold([state(0) + 0.0 * noise(0)]) == ((1.0,), ((0.0,),), ())
    assert fold([state(0) + 2.0 * noise(0), state(1)]) == ((1.0, 1.0), ((0.0,), (0.0, 0.0)), ((2.0,), (2.0, 0.0)))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["euler", "midpoint", "heun", "rk4", "ab2"])
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
def test_midpoint_heun_rk4_and_ab2_are_the_textbook_loops(schedule, four_gaussians, noise):
    times, u = SCHEDULES[schedule], four_gaussians("condot").velocity
    midpoint = heun = rk4 = ab2 = noise
    past = None
    for s, t in itertools.pairwise(times):
        h = t - s
        midpoint = midpoint + h * u(midpoint + h / 2 * u(midpoint, s), s + h / 2)
        k = u(heun, s)
        heun = heun + h / 2 * (k + u(heun + h * k, t))
        k1 = u(rk4, s)
        k2 = u(rk4 + h / 2 * k1, s + h / 2)
        k3 = u(rk4 + h / 2 * k2, s + h / 2)
        k4 = u(rk4 + h * k3, t)
        rk4 = rk4 + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        now = u(ab2, s)
        ab2 = ab2 + h * now if past is None else ab2 + h * (now + h / (2 * past[0]) * (now - past[1]))
        past = h, now
    for name, want in {"midpoint": midpoint, "heun": heun, "rk4": rk4, "ab2": ab2}.items():
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


def corrected_data_form(times, field, x):
    """UniPC-2 with B2 as its paper has it: the weights of the predicted data solve R w = b. For times where lambda is finite but for the last."""
    lam = [field.path.at(t).half_log_snr for t in times]
    data, last, predicted = [], len(times) - 2, x
    for i in range(last + 1):
        p, q = field.path.at(times[i]), field.path.at(times[i + 1])
        h = lam[i + 1] - lam[i]
        data.append(field.x1(predicted, times[i]))
        ddim = q.sigma / p.sigma * x - q.alpha * math.expm1(-h) * data[i]
        if i == last and math.isinf(h):
            return ddim
        nodes = [(lam[i - 1] - lam[i]) / h] if i else []
        slopes = [(data[i - 1] - data[i]) / nodes[0]] if i else []
        predicted = ddim - q.alpha * math.expm1(-h) * sum(0.5 * slope for slope in slopes)
        if i == last:
            return predicted
        phi = -math.expm1(-h) / h  # phi_1(-h)
        b = [(phi - 1) / math.expm1(-h), 2 * ((1 - phi) / h - 0.5) / math.expm1(-h)]
        weights = np.linalg.solve([[1, 1], [nodes[0], 1]], b).tolist() if i else [0.5]
        slopes.append(field.x1(predicted, times[i + 1]) - data[i])
        x = ddim - q.alpha * math.expm1(-h) * sum(w * slope for w, slope in zip(weights, slopes, strict=True))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("end", [0.98, 1.0])
def test_unipc_is_its_papers_predictor_and_corrector(end, path, four_gaussians, noise):
    field = four_gaussians(path)
    times = [0.02 + (end - 0.02) * t for t in linear(9)]
    got = run("unipc", times, field.path, field.velocity, noise)
    torch.testing.assert_close(got, corrected_data_form(times, field, noise), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("end", [0.98, 1.0])
def test_deis_integrates_a_line_in_log_rho(end, path, four_gaussians, noise):
    field = four_gaussians(path)
    times = [0.02 + (end - 0.02) * t for t in linear(9)]
    x, past = noise, None
    for s, t in itertools.pairwise(times):
        p, q = field.path.at(s), field.path.at(t)
        rho, rho_end, eps = p.sigma / p.alpha, q.sigma / q.alpha, field.eps(x, s)
        slope = 0 if past is None else (past[1] - eps) / math.log(past[0] / rho)
        moment = quad(lambda r, rho=rho: math.log(r / rho), rho, rho_end, epsabs=1e-13)[0]
        x, past = q.alpha * (x / p.alpha + (rho_end - rho) * eps + moment * slope), (rho, eps)
    torch.testing.assert_close(run("deis", times, field.path, field.velocity, noise), x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("path", ["condot", "cosine"])
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "unipc", "deis"])
def test_a_start_at_pure_noise_is_the_limit_of_starts_just_after_it(name, path, four_gaussians, noise):
    field = four_gaussians(path)
    exact = run(name, linear(8), field.path, field.velocity, noise)
    near = [(run(name, (t0, *linear(8)[1:]), field.path, field.velocity, noise) - exact).abs().mean().item() for t0 in (1e-6, 1e-12, 1e-60)]
    assert near == sorted(near, reverse=True)
    # those with a past converge only as 1 / lambda_0, which is 140 at t0 = 1e-60
    assert near[-1] < (1e-12 if name == "ddim" else 0.02)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["ddim", "deis"])
def test_an_end_at_the_data_is_the_limit_of_ends_just_before_it(name, path, four_gaussians, noise):
    field = four_gaussians(path)
    exact = run(name, linear(8), field.path, field.velocity, noise)
    near = [(run(name, (*linear(8)[:-1], 1 - gap), field.path, field.velocity, noise) - exact).abs().mean().item() for gap in (1e-3, 1e-6, 1e-12)]
    assert near == sorted(near, reverse=True)
    assert near[-1] < (1e-5 if path == "vp" else 1e-10)  # the sigma of VP falls as a root of the gap


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
