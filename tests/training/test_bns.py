"""BNS fits on the closed-form toy of the paper's kind: gates, identities, resuming, what goes wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from reelstep.engine.samplers.ns import drive, sample, start
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.schedules import linear, shifted
from reelstep.engine.samplers.tables import SOLVERS
from reelstep.errors import ConfigError, InternalError
from reelstep.training import bns, checkpoint
from reelstep.training.bns import Options, fit_bns, initial_table, polish, solve_rows
from reelstep.training.field import Pairs, score_db

MEANS = torch.tensor([[2, 0], [-2, 0], [0, 2], [0, -2]], dtype=torch.float64)
STD = 0.3


def velocity(x, t):
    """Four Gaussians on straight lines, in closed form."""
    s = 1 - t
    variance = t**2 * STD**2 + s**2
    off = x[:, None] - t * MEANS
    weight = torch.softmax(-off.square().sum(-1) / (2 * variance), dim=1)[..., None]
    return (weight * (MEANS + (t * STD**2 - s) / variance * off)).sum(1)


def reference(noise, end=1.0):
    """By DOP853 at rtol 1e-9."""

    def field(t, y):
        return velocity(torch.from_numpy(y).view_as(noise), torch.tensor(t, dtype=torch.float64)).numpy().ravel()

    y = solve_ivp(field, (0, end), noise.numpy().ravel(), method="DOP853", rtol=1e-9, atol=1e-9).y[:, -1]
    return torch.from_numpy(y.copy()).view_as(noise)


def pairs(seed, count):
    noise = torch.from_numpy(np.random.default_rng(seed).standard_normal((count, 2)))
    return Pairs(noise, reference(noise))


def fields(index):
    return velocity


@pytest.fixture(scope="module")
def data():
    return (fields, pairs(0, 520)), (fields, pairs(1, 1024))


def run(table, noise):
    return drive(sample(table, start(table, noise)), lambda x, t: velocity(x, torch.tensor(t, dtype=torch.float64)))


def options(**changed):
    return Options(**{"iterations": 300, "batch": 130, "rows": 130, "validate_every": 25, **changed})


@pytest.mark.parametrize(("nfe", "rate", "gate"), [(4, 5e-3, 40.0), (8, 3e-3, 45.0)])
def test_a_fit_reaches_the_gate_and_its_table_really_scores_so(data, nfe, rate, gate):
    train, validation = data
    fit = fit_bns(initial_table(nfe, PATHS["condot"]), train, validation, options(rate=rate))
    noise, ends = validation[1].noise, validation[1].ends
    got = float(score_db(run(fit.solver, noise), ends).mean())
    assert got == pytest.approx(fit.best_db, abs=0.01)
    plain = float(score_db(run(SOLVERS["midpoint"].build(linear(nfe // 2), PATHS["condot"]), noise), ends).mean())
    assert fit.start_db == pytest.approx(plain, abs=0.01), "iterate 0 is midpoint"
    assert got > gate
    assert fit.solver.n == nfe


@pytest.mark.parametrize("sigma_0", [1.0, 3.0, 10.0])
def test_euler_from_a_larger_source_is_euler_on_shifted_times(sigma_0):
    table = initial_table(5, PATHS["condot"], sigma_0)
    want = SOLVERS["euler"].build(shifted(5, sigma_0), PATHS["condot"])
    assert np.allclose(table.times, want.times, atol=1e-14)
    noise = pairs(3, 50).noise
    assert torch.allclose(run(table, noise), run(want, noise), atol=1e-13)


# not vp with a larger source: its noise ends at a ratio of 152, so that one would begin before t = 0
@pytest.mark.parametrize(("path", "sigma_0"), [(path, sigma_0) for path in PATHS for sigma_0 in (1.0, 5.0) if (path, sigma_0) != ("vp", 5.0)])
def test_the_velocity_from_a_larger_source_is_that_of_the_scaled_path(path, sigma_0):
    """x_bar(r) = s x(t) on a known trajectory: its derivative by central differences."""
    def x_bar(r):
        t, _, s, _ = bns.scaled_source(PATHS[path], sigma_0, r)
        return s * math.sin(3 * t)

    for r in (0.1, 0.4, 0.8):
        t, t_slope, s, s_slope = bns.scaled_source(PATHS[path], sigma_0, r)
        h = 1e-5
        assert s_slope * math.sin(3 * t) + s * 3 * math.cos(3 * t) * t_slope == pytest.approx((x_bar(r + h) - x_bar(r - h)) / (2 * h), rel=1e-6)
        point, bar = PATHS[path].at(t), PATHS[path].at(r)
        assert s * point.alpha == pytest.approx(bar.alpha, rel=1e-9)
        assert s * point.sigma == pytest.approx(sigma_0 * bar.sigma, rel=1e-9)


def test_a_fit_that_was_interrupted_gives_the_numbers_of_one_that_was_not(data, tmp_path, monkeypatch):
    train, validation = data
    few = options(iterations=8, validate_every=2, batch=20, rows=7)
    whole = fit_bns(initial_table(4, PATHS["condot"]), train, validation, few)

    def stop(iteration, loss, best):
        if iteration == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_bns(initial_table(4, PATHS["condot"]), train, validation, few, stop, tmp_path / "fit.pt")
    assert checkpoint.load(tmp_path / "fit.pt")["iteration"] == 4
    assert fit_bns(initial_table(4, PATHS["condot"]), train, validation, few, saved=tmp_path / "fit.pt") == whole


def test_a_fit_is_never_worse_than_its_start_and_says_when_it_diverged(data):
    train, validation = data
    wild = fit_bns(initial_table(8, PATHS["condot"]), train, validation, options(iterations=30, rate=3.0, validate_every=5))
    assert wild.best_db >= wild.start_db

    broken = (lambda index: lambda x, t: velocity(x, t) * math.nan, train[1])
    fit = fit_bns(initial_table(4, PATHS["condot"]), broken, validation, options(iterations=5))
    assert "lower rate" in fit.note
    assert fit.best_db == pytest.approx(fit.start_db)


def test_the_polish_lowers_the_loss_and_an_exact_row_is_found():
    data = pairs(5, 200)
    table = initial_table(5, PATHS["condot"])
    polished = polish(table, fields, data, 64)

    def loss(t):
        return float(bns.log_error(run(t, data.noise), data.ends).mean())

    assert loss(polished) < loss(table) - 0.1
    assert (polished.a[:-1], polished.b[:-1], polished.times) == (table.a[:-1], table.b[:-1], table.times)
    reached = Pairs(data.noise, run(table, data.noise))
    assert loss_of(polish(table, fields, reached, 64), reached) < 1e-20, "where the row is right already, it is found again"


def loss_of(table, data):
    return float((run(table, data.noise) - data.ends).square().mean())


@pytest.mark.parametrize("solver", ["heun", "euler_ancestral"])
def test_a_table_that_cannot_be_fitted_is_refused(data, solver):
    with pytest.raises(ConfigError, match="cannot be fitted"):
        fit_bns(SOLVERS[solver].build(linear(2), PATHS["condot"]), *data, options())


def test_solved_rows_are_exact_where_one_number_a_row_suffices():
    """x' = c x: every state is exp(c t) of the noise, whatever the times."""
    noise = pairs(5, 40).noise
    at = torch.linspace(0, 1, 33, dtype=torch.float64)
    known = Pairs(noise, math.exp(0.7) * noise, torch.exp(0.7 * at)[:, None, None] * noise)
    table = solve_rows(initial_table(5, PATHS["condot"], 3.0), lambda index: lambda x, t: 0.7 * x, known, 16)
    end = drive(sample(table, start(table, noise)), lambda x, t: 0.7 * x)
    assert float((end - known.ends).abs().max()) < 1e-9
    assert float((known.at(0.3712) - math.exp(0.7 * 0.3712) * noise).abs().max()) < 1e-9, "between the stored states"


def test_solved_rows_begin_far_above_the_solver_whose_times_they_have(data):
    noise = data[0][1].noise
    known = Pairs(noise, data[0][1].ends, torch.stack([noise, *(reference(noise, t) for t in np.linspace(0, 1, 33)[1:])]))
    plain = initial_table(8, PATHS["condot"])
    solved = solve_rows(plain, fields, known, 130)
    held_out = data[1][1]
    dbs = [float(score_db(run(table, held_out.noise), held_out.ends).mean()) for table in (plain, solved)]
    assert dbs[1] > dbs[0] + 3
    assert solved.times == plain.times


def test_rows_cannot_be_solved_for_without_states_between():
    with pytest.raises(InternalError, match="ends alone"):
        solve_rows(initial_table(4, PATHS["condot"]), fields, pairs(5, 10), 10)
