"""Bespoke solvers: their identities, the bound that is their loss, its gradient, and fits on the toy of four Gaussians."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import nn

from reelstep.engine.samplers.fold import fold
from reelstep.engine.samplers.ns import Table, drive, sample, start
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.schedules import linear
from reelstep.engine.samplers.tables import SOLVERS
from reelstep.errors import ConfigError
from reelstep.training.bespoke import (
    KINDS,
    Bespoke,
    Options,
    Paths,
    ScaleTime,
    fit_bespoke,
    local_errors,
    loss_terms,
    rules,
    solver_of,
    transform_of,
    weights,
)
from reelstep.training.field import Fit, Pairs, score_db, solve

MEANS = torch.tensor([[2, 0], [-2, 0], [0, 2], [0, -2]], dtype=torch.float64)
STD = 0.3
BASES = {"rk1": "euler", "rk2": "midpoint"}


def reference_paths(field, noise, points=65):
    return Paths.of(field, solve(field, noise, 1e-11, points))


def mixture(path):
    """The velocity of four Gaussians on a path, in closed form."""

    def field(x, t):
        p = PATHS[path].at(t)
        variance = p.alpha**2 * STD**2 + p.sigma**2
        off = x[:, None] - p.alpha * MEANS
        weight = torch.softmax(-off.square().sum(-1) / (2 * variance), dim=1)[..., None]
        data, noise = MEANS + p.alpha * STD**2 / variance * off, p.sigma / variance * off
        return (weight * (p.d_alpha * data + p.d_sigma * noise)).sum(1)

    return field


def normal(seed, count):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, 2)))


def exact(noise, stops=(1.0,)):
    """The mixture's flow on straight lines by DOP853 at rtol 1e-9, at each of the stops."""
    field = mixture("condot")

    def velocity(t, y):
        return field(torch.from_numpy(y).view_as(noise), torch.tensor(t, dtype=torch.float64)).numpy().ravel()

    y = solve_ivp(velocity, (0, 1), noise.numpy().ravel(), method="DOP853", rtol=1e-9, atol=1e-9, t_eval=stops).y
    return torch.from_numpy(y.T.copy()).view(len(stops), *noise.shape)


def run(table, noise, field):
    return drive(sample(table, start(table, noise)), lambda x, t: field(x, torch.tensor(t, dtype=x.dtype)))


def random_raw(kind, steps, seed, size=0.5):
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(4, steps * KINDS[kind], generator=generator, dtype=torch.float64)


def sampled(kind, steps, t, d_t, s, d_s):
    """A solver from smooth curves of r."""
    nodes = KINDS[kind] * steps
    r = [k / nodes for k in range(nodes + 1)]
    return Bespoke(kind, tuple(map(t, r)), tuple(map(d_t, r[:-1])), tuple(map(s, r)), tuple(map(d_s, r[:-1])))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 4, 5, 8])
def test_the_start_is_the_base_solver(kind, steps):
    got, want = Bespoke.base(kind, steps).table("condot"), SOLVERS[BASES[kind]].build(linear(steps), PATHS["condot"])
    assert (got.name, got.path, got.order, got.n) == (f"bespoke_{kind}", "condot", want.order, want.n)
    differences = [abs(p - q) for p, q in zip((*got.times, *got.a, *sum(got.b, ())), (*want.times, *want.a, *sum(want.b, ())), strict=True)]
    assert max(differences) <= (0 if steps in (1, 4, 8) else 1e-15)  # 1 / 5 rounds
    x = normal(0, 64)
    assert (run(got, x, mixture("condot")) - run(want, x, mixture("condot"))).abs().max() <= (0 if steps in (1, 4, 8) else 1e-14)
    zeros = solver_of(kind, torch.zeros(4, steps * KINDS[kind], dtype=torch.float64))
    assert zeros.t == pytest.approx(Bespoke.base(kind, steps).t, abs=1e-15)
    assert (zeros.d_t, zeros.s, zeros.d_s) == (Bespoke.base(kind, steps).d_t, Bespoke.base(kind, steps).s, Bespoke.base(kind, steps).d_s)


@pytest.mark.parametrize(("kind", "order"), [("rk1", 1), ("rk2", 2)])
def test_a_fixed_smooth_transform_keeps_the_order_of_the_base_solver(kind, order):
    noise, counts = normal(1, 256), (16, 32, 64, 128)
    end = exact(noise)[0]
    errors = []
    for steps in counts:
        solver = sampled(
            kind,
            steps,
            lambda r: r + math.sin(2 * math.pi * r) / (4 * math.pi) if r < 1 else 1.0,
            lambda r: 1 + 0.5 * math.cos(2 * math.pi * r),
            lambda r: math.exp(0.4 * math.sin(math.pi * r) + 0.2 * r),
            lambda r: (0.4 * math.pi * math.cos(math.pi * r) + 0.2) * math.exp(0.4 * math.sin(math.pi * r) + 0.2 * r),
        )
        errors.append(float((run(solver.table("condot"), noise, mixture("condot")) - end).norm(dim=1).median()))
    ratios = [coarse / fine for coarse, fine in pairwise(errors)]
    assert ratios[-1] == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_scale_changes_nothing(kind):
    nodes, noise = 5 * KINDS[kind], normal(1, 64)
    base = Bespoke.base(kind, 5)
    scaled = ScaleTime(kind, base.t, base.d_t, (3.7,) * (nodes + 1), base.d_s)
    table = Table("scaled", "condot", KINDS[kind], scaled.t, *fold(rules(scaled)))
    torch.testing.assert_close(run(table, noise, mixture("condot")), run(base.table("condot"), noise, mixture("condot")), rtol=0, atol=1e-14)


def bounds_and_errors(kind, matrix, raw, order=1):
    """On the linear field of `matrix`: the bound with its weights in the given order, and what the run really missed. [B] both."""
    times = torch.linspace(0, 1, 201, dtype=torch.float64)
    noise = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states = noise @ torch.linalg.matrix_exp(times[:, None, None] * matrix).mT

    def field(x, t):
        return x @ matrix.T

    transform = transform_of(kind, raw)
    factors = weights(transform, float(torch.linalg.matrix_norm(matrix, 2)))[::order]
    bound = sum(m * d for m, d in zip(factors, local_errors(transform, Paths(field, tuple(times.tolist()), states, states @ matrix.T)), strict=True))
    end = run(solver_of(kind, raw).table("condot"), noise, field)
    return bound, (end - states[-1]).square().mean(1).sqrt()


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_bounds_the_error_where_the_lipschitz_constant_is_true(kind):
    slack = []
    for seed in range(200):
        matrix = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        bound, error = bounds_and_errors(kind, matrix, random_raw(kind, 5, seed))
        assert (error <= bound).all(), f"seed {seed}"
        slack += (bound / error).tolist()
    assert np.median(slack) < 30, "a bound that says something"


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_would_bound_nothing_with_the_weights_of_the_steps_before(kind):
    """On u = 2 x with s = exp(-2 t) the scaled state stands still and every step is exact, but for the first, which is disturbed."""
    nodes = 5 * KINDS[kind]
    r = torch.arange(nodes + 1, dtype=torch.float64) / nodes
    raw = torch.stack([torch.zeros_like(r[1:]), torch.zeros_like(r[1:]), -2 * r[1:], -2 * torch.exp(-2 * r[:-1])])
    for disturbance in (-1.0, 0.3, 0.5):
        raw[3, KINDS[kind] - 1] += disturbance
        bound, error = bounds_and_errors(kind, 2 * torch.eye(3, dtype=torch.float64), raw)
        assert (error <= bound).all()
        reversed_bound, _ = bounds_and_errors(kind, 2 * torch.eye(3, dtype=torch.float64), raw, order=-1)
        assert (error > 2 * reversed_bound).all()


def test_the_weight_of_a_step_is_the_growth_of_those_after_it():
    transform = transform_of("rk1", random_raw("rk1", 3, 0))
    h, s, d_t, d_s = 1 / 3, *(list(map(float, v)) for v in (transform.s, transform.d_t, transform.d_s))
    factor = [s[i] / s[i + 1] * (1 + h * (abs(d_s[i]) / s[i] + 2.0 * d_t[i])) for i in range(3)]
    assert list(map(float, weights(transform, 2.0))) == pytest.approx([factor[1] * factor[2], factor[2], 1.0], rel=1e-14)


def test_the_change_from_straight_lines_to_the_cosine_path_is_a_scale_time_transform():
    quarter, noise, steps = math.pi / 2, normal(1, 256), 8
    solver = sampled(
        "rk2",
        steps,
        lambda r: math.sin(quarter * r) / (math.sin(quarter * r) + math.cos(quarter * r)),
        lambda r: quarter / (math.sin(quarter * r) + math.cos(quarter * r)) ** 2,
        lambda r: math.sin(quarter * r) + math.cos(quarter * r),
        lambda r: quarter * (math.cos(quarter * r) - math.sin(quarter * r)),
    )
    got = run(solver.table("condot"), noise, mixture("condot"))
    want = run(SOLVERS["midpoint"].build(linear(steps), PATHS["cosine"]), noise, mixture("cosine"))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def published_loop(solver, x, field):
    """Equations 17, 19 and 20 as they are printed, z in the scaled space."""
    f, h, m = solver, 1 / solver.steps, KINDS[solver.kind]
    for k in range(0, m * solver.steps, m):
        u = field(x, torch.tensor(f.t[k], dtype=x.dtype))
        if m == 1:
            x = (f.s[k] + h * f.d_s[k]) / f.s[k + 1] * x + h * f.d_t[k] * f.s[k] / f.s[k + 1] * u
            continue
        z = (f.s[k] + h / 2 * f.d_s[k]) * x + h / 2 * f.s[k] * f.d_t[k] * u
        u = field(z / f.s[k + 1], torch.tensor(f.t[k + 1], dtype=x.dtype))
        x = f.s[k] / f.s[k + 2] * x + h / f.s[k + 2] * (f.d_s[k + 1] / f.s[k + 1] * z + f.d_t[k + 1] * f.s[k + 1] * u)
    return x


def gentle(x, t):
    return torch.tanh(torch.stack([x[:, 0] + t, x[:, 1] * x[:, 0] - t], 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_random_numbers_fold_to_the_published_steps(kind, dtype, tolerance):
    for seed in range(5):
        solver, noise = solver_of(kind, random_raw(kind, 4, seed, 0.3)), normal(1, 64).to(dtype)
        want = published_loop(solver, noise, gentle)
        torch.testing.assert_close(run(solver.table("condot"), noise, gentle), want, rtol=0, atol=tolerance * float(want.abs().max()))


def test_reference_paths_are_the_flow_also_between_their_points():
    noise, stops = normal(3, 64), [0.013, 0.31, 0.5, 0.77, 0.985, 1.0]
    paths, want = reference_paths(mixture("condot"), noise), exact(noise, stops)
    assert paths.times == tuple(k / 64 for k in range(65))
    for t, x in zip(stops, want, strict=True):
        state, velocity = paths.at(t)
        torch.testing.assert_close(state, x, rtol=0, atol=1e-4)
        torch.testing.assert_close(velocity, mixture("condot")(x, torch.tensor(t, dtype=torch.float64)), rtol=0, atol=1e-2)
    many = [*np.linspace(0.01, 1, 41)]
    want = exact(noise, many)
    coarser = reference_paths(mixture("condot"), noise, 33)
    errors = [max(float((each.at(t)[0] - x).abs().max()) for t, x in zip(many, want, strict=True)) for each in (paths, coarser)]
    assert errors[0] < errors[1] / 8, "of order 4"


def test_a_time_moves_its_state_along_the_velocity():
    paths = reference_paths(mixture("condot"), normal(3, 16), 129)
    for t in (0.2, 0.6, 0.9):
        moved = torch.autograd.functional.jacobian(paths.near, torch.tensor(t, dtype=torch.float64))
        state = paths.near(torch.tensor(t, dtype=torch.float64))
        torch.testing.assert_close(moved, mixture("condot")(state, torch.tensor(t, dtype=torch.float64)), rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_the_loss_is_that_of_finite_differences(kind):
    paths = reference_paths(mixture("condot"), normal(3, 16))
    raw = random_raw(kind, 3, 0, 0.2).requires_grad_()

    def loss(numbers):
        return sum(loss_terms(transform_of(kind, numbers), paths, 1.0))

    loss(raw).backward()
    differences = torch.zeros_like(raw.grad)
    with torch.no_grad():
        for index in np.ndindex(*raw.shape):
            step = torch.zeros_like(raw)
            step[index] = 1e-6
            differences[index] = (loss(raw + step) - loss(raw - step)) / 2e-6
    torch.testing.assert_close(raw.grad, differences, rtol=1e-4, atol=1e-4 * float(differences.abs().max()))


def condot_fields(index):
    return mixture("condot")


@pytest.fixture(scope="module")
def train():
    """8 batches of 64."""
    paths = reference_paths(mixture("condot"), normal(0, 512))
    return [Paths(paths.field, paths.times, x, u) for x, u in zip(paths.states.split(64, 1), paths.velocities.split(64, 1), strict=True)]


@pytest.fixture(scope="module")
def validation():
    noise = normal(1, 512)
    return condot_fields, Pairs(noise, exact(noise)[0])


@pytest.mark.parametrize("steps", [4, 5])
def test_a_fit_gains_five_decibels_over_midpoint_on_fresh_noise(steps, train, validation):
    fit = fit_bespoke(train, validation, Options("rk2", steps, rows=512))
    noise = normal(2, 1024)
    end = exact(noise)[0]
    fitted, plain = (
        float(score_db(run(table, noise, mixture("condot")), end).mean())
        for table in (fit.solver.table("condot"), SOLVERS["midpoint"].build(linear(steps), PATHS["condot"]))
    )
    assert fitted >= plain + 5
    assert fit.solver.parameters == 8 * steps - 1
    assert fit.note == ""


def test_euler_is_fitted_too(train, validation):
    fit = fit_bespoke(train, validation, Options("rk1", 4, iterations=100, rows=512))
    assert fit.best_db >= fit.start_db + 3


def test_the_best_validated_iterate_is_returned(train, validation):
    fit = fit_bespoke(train, validation, Options("rk2", 4, iterations=40, rate=0.05, validate_every=4, rows=512))
    assert [i for i, _ in fit.history] == list(range(0, 41, 4))
    assert (fit.iteration, fit.best_db) == max(fit.history, key=lambda entry: entry[1])
    assert fit.best_db > fit.history[-1][1], "the last iterate is not the best here"
    again = score_db(run(fit.solver.table("condot"), validation[1].noise, mixture("condot")), validation[1].ends).mean()
    assert float(again) == pytest.approx(fit.best_db, abs=1e-9)


def test_a_fit_that_only_harms_returns_the_base_solver(train, validation):
    fit = fit_bespoke(train, validation, Options("rk2", 4, iterations=4, rate=2.0, validate_every=1, rows=512))
    assert fit.solver == Bespoke.base("rk2", 4)
    assert (fit.iteration, fit.best_db) == (0, fit.start_db)


def test_a_fit_that_was_interrupted_gives_the_numbers_of_one_that_was_not(train, validation, tmp_path):
    options, file = Options("rk2", 3, iterations=14, validate_every=5, rows=512, seed=3), tmp_path / "fit.pt"
    whole, parts = [], []
    fit = fit_bespoke(train, validation, options, lambda *heard: whole.append(heard))

    def stop(*heard):
        if heard[0] == 8:
            raise KeyboardInterrupt
        parts.append(heard)

    with pytest.raises(KeyboardInterrupt):
        fit_bespoke(train, validation, options, stop, file)
    resumed = fit_bespoke(train, validation, options, lambda *heard: parts.append(heard), file)
    assert parts == whole[:7] + whole[5:], "again from the last validation on"
    assert resumed == fit
    assert fit_bespoke(train, validation, options, saved=file) == fit, "a finished fit stays as it is"
    with pytest.raises(ConfigError, match="other"):
        fit_bespoke(train, validation, Options(**{**asdict(options), "rate": 0.5}), saved=file)


def test_a_loss_that_is_not_finite_ends_the_fit(train, validation):
    poisoned = [*train[:1], Paths(lambda x, t: x * math.nan, train[0].times, train[0].states, train[0].velocities)]
    fit = fit_bespoke(poisoned, validation, Options("rk2", 4, iterations=10, validate_every=1, rows=512))
    assert "nan" in fit.note
    assert len(fit.history) <= 2
    assert fit.best_db >= fit.start_db
    assert math.isfinite(fit.best_db)


def test_an_iterate_that_is_no_solver_ends_the_fit(train, validation):
    fit = fit_bespoke(train, validation, Options("rk2", 4, iterations=10, rate=1e4, validate_every=1, rows=512))
    assert "no solver" in fit.note
    assert fit == Fit(Bespoke.base("rk2", 4), fit.start_db, fit.start_db, 0, ((0, fit.start_db),), fit.note)


def test_a_network_on_video_latents_is_fitted_in_float32_each_batch_under_its_own_condition():
    torch.manual_seed(0)
    network, conditions = nn.Conv3d(2, 2, 3, padding=1), torch.randn(12, 2, 1, 1, 1)
    noise = torch.randn(12, 2, 2, 4, 4)

    def fields(index):
        def field(x, t):
            assert (x.dtype, t.dtype, t.shape, len(x)) == (torch.float32, torch.float32, (), len(index))
            return torch.tanh(4 * network(x)) * (3 * t).cos() + (1 + t) * conditions[index] - x

        return field

    parts = torch.arange(12).split(4)
    train = [reference_paths(fields(part), noise[part], 40) for part in parts[:2]]
    held = Pairs(noise, torch.cat([reference_paths(fields(part), noise[part], 40).states[-1] for part in parts]))
    fit = fit_bespoke(train, (fields, held), Options("rk2", 2, iterations=60, validate_every=10, rows=5))
    assert fit.best_db > fit.start_db + 3
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_counted_and_survive_json(kind):
    solver = solver_of(kind, random_raw(kind, 10, 0))
    assert solver.parameters == {"rk1": 39, "rk2": 79}[kind]
    assert (solver.steps, solver.table("condot").n) == (10, 10 * KINDS[kind])
    assert Bespoke.from_json(json.loads(json.dumps(solver.to_json()))) == solver


WHOLE = Bespoke.base("rk2", 2).to_json()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "rk3"}, "one of rk1, rk2"),
        ({"d_t": [1.0] * 3}, "sizes"),
        ({"t": [0.0, 1.0], "d_t": [1.0], "s": [1.0, 1.0], "d_s": [0.0]}, "sizes"),
        ({"t": [], "d_t": [], "s": [], "d_s": []}, "sizes"),
        ({"t": [0.0, 0.5, 0.5, 0.7, 1.0]}, "increase from 0 to 1"),
        ({"t": [0.0, 0.2, 0.5, 0.7, 0.9]}, "increase from 0 to 1"),
        ({"t": [0.1, 0.2, 0.5, 0.7, 1.0]}, "increase from 0 to 1"),
        ({"d_t": [1.0, 1.0, 0.0, 1.0]}, "above 0"),
        ({"s": [1.0, 1.0, -1.0, 1.0, 1.0]}, "above 0"),
        ({"s": [2.0, 1.0, 1.0, 1.0, 1.0]}, "begin with 1"),
        ({"d_s": [0.0, math.nan, 0.0, 0.0]}, "not finite"),
        ({"d_s": [0.0, "many", 0.0, 0.0]}, "not a number"),
        ({"d_s": 1.0}, "not a number"),
        ({"more": 1}, "fields"),
    ],
)
def test_numbers_that_make_no_solver_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Bespoke.from_json({**WHOLE, **change})


def test_fits_that_cannot_be_are_refused(train, validation):
    with pytest.raises(ConfigError, match="one of rk1, rk2"):
        fit_bespoke(train, validation, Options("rk4", 4))
    with pytest.raises(ConfigError, match="at least 1 step"):
        fit_bespoke(train, validation, Options("rk2", 0))
    with pytest.raises(ConfigError, match="reference paths"):
        fit_bespoke([], validation, Options("rk2", 4))
    with pytest.raises(ConfigError, match="at least 33"):
        reference_paths(mixture("condot"), normal(0, 4), 20)
    with pytest.raises(ConfigError, match="increase from 0 to 1"):
        Paths(mixture("condot"), (0.0, 0.5), train[0].states[:2], train[0].velocities[:2])
    with pytest.raises(ConfigError, match="at every time"):
        Paths(mixture("condot"), (0.0, 1.0), train[0].states[:2], train[0].velocities[:1])
