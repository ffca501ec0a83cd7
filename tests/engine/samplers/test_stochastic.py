"""Every registered stochastic solver against distributions known in closed form: exactly, by its response to each unit of noise, with nothing drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from reelstep.engine.samplers.fold import fold
from reelstep.engine.samplers.ns import Table, sample, start
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.schedules import linear
from reelstep.engine.samplers.tables import SOLVERS, ddim, lcm, tcd

STOCHASTIC = [name for name in SOLVERS if SOLVERS[name].stochastic]
MEAN, STD = 1.5, 0.6  # of the data, one-dimensional


def moments(table: Table, velocity, mean: float, std: float) -> list[tuple[float, float]]:
    """Mean and standard deviation of the state after every evaluation, from x[0] of these and independent z.

    The velocity is affine in x, so every state is affine in x[0] and z: row 0 has neither, row 1 a deviation of x[0], row 2 + j one of z[j].
    """
    unit = torch.eye(table.n + 2, dtype=torch.float64)
    state = start(table, mean + std * unit[1])
    run, found = sample(table, state, lambda step: unit[2 + step]), []
    x, t = next(run)
    for i in range(table.n):
        if i == table.n - 1:
            with pytest.raises(StopIteration):
                run.send(velocity(x, t))
        else:
            x, t = run.send(velocity(x, t))
        found.append((state.x[0].item(), (state.x[1:] - state.x[0]).norm().item()))
    return found


def marginal(path, t: float, std: float) -> tuple[float, float]:
    p = path.at(t)
    return p.alpha * MEAN, math.hypot(p.alpha * std, p.sigma)


def affine(path, x1):
    """The velocity of data predicted by x1(x, t)."""

    def velocity(x, t):
        p = path.at(t)
        data = x1(x, t)
        return p.d_alpha * data + p.d_sigma / p.sigma * (x - p.alpha * data)

    return velocity


def denoised(path, std: float):
    """E[data | x]."""

    def x1(x, t):
        p = path.at(t)
        return MEAN + p.alpha * std**2 / (p.alpha**2 * std**2 + p.sigma**2) * (x - p.alpha * MEAN)

    return x1


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_known_picture_has_exactly_the_noise_of_its_time_after_every_step(name, path):
    # one data point: its prediction is right, so all that a step can get wrong is how much noise it keeps and adds
    path = PATHS[path]
    for times in (linear(7), [0.1 + 0.8 * t for t in linear(7)]):
        table = SOLVERS[name].build(times, path)
        found = moments(table, affine(path, denoised(path, 0.0)), *marginal(path, times[0], 0.0))
        for t, pair in zip(table.times[1:], found, strict=True):
            assert pair == pytest.approx(marginal(path, t, 0.0), abs=1e-12)


@pytest.mark.parametrize("path", ["condot", "cosine"])
@pytest.mark.parametrize("name", [name for name in STOCHASTIC if SOLVERS[name].order])
def test_the_spread_of_a_gaussian_converges_with_the_declared_weak_order(name, path):
    path, ends, steps, errors = PATHS[path], (0.1, 0.9), (64, 128, 256), []
    for n in steps:
        table = SOLVERS[name].build([ends[0] + (ends[1] - ends[0]) * t for t in linear(n)], path)
        mean, std = moments(table, affine(path, denoised(path, STD)), *marginal(path, ends[0], STD))[-1]
        assert mean == pytest.approx(marginal(path, ends[1], STD)[0], abs=1e-12)
        errors.append(abs(std - marginal(path, ends[1], STD)[1]))
    assert -np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(SOLVERS[name].order, abs=0.15)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_step_to_the_data_end_adds_no_noise(name, path):
    table = SOLVERS[name].build(linear(5), PATHS[path])
    assert table.noise[-1][-1] == 0
    assert table.noise[-2][-1] > 0
    assert SOLVERS[name].build(linear(1), PATHS[path]).noise == ()


@pytest.mark.parametrize("path", ["condot", "cosine"])
def test_an_ancestral_step_from_pure_noise_is_all_fresh_noise(path):
    table = SOLVERS["euler_ancestral"].build(linear(4), PATHS[path])
    lcm_table = SOLVERS["lcm"].build(linear(4), PATHS[path])
    assert (table.a[0], table.b[0], table.noise[0]) == (lcm_table.a[0], lcm_table.b[0], lcm_table.noise[0])


@pytest.mark.parametrize("path", ["condot", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_lcm_with_the_exact_end_of_the_path_predicted_gives_the_datas_distribution_in_any_number_of_steps(steps, path):
    path = PATHS[path]

    def end(x, t):
        mean, std = marginal(path, t, STD)
        return MEAN + STD / std * (x - mean)

    table = SOLVERS["lcm"].build(linear(steps), path)
    for t, pair in zip(table.times[1:], moments(table, affine(path, end), 0.0, 1.0), strict=True):
        assert pair == pytest.approx(marginal(path, t, STD), abs=1e-12)


def test_lcm_does_not_converge_on_a_network_that_predicts_the_mean():
    path, spreads = PATHS["condot"], []
    for steps in (16, 64, 256):
        table = SOLVERS["lcm"].build(linear(steps), path)
        spreads.append(moments(table, affine(path, denoised(path, STD)), 0.0, 1.0)[-1][1])
    assert spreads == sorted(spreads)
    assert spreads[-1] < 0.75 * STD


@pytest.mark.parametrize("path", PATHS)
def test_tcd_lies_between_ddim_and_lcm(path):
    times, path = linear(8), PATHS[path]
    for gamma, other in ((0.0, ddim), (1.0, lcm)):
        ours = fold([tcd.step(i, times, path, gamma) for i in range(8)])
        a, b, noise = fold(other.recipe(times, path)[1])
        assert ours[0] == pytest.approx(a, abs=1e-12)
        for got, want in ((ours[1], b), (ours[2], noise)):
            assert len(got) == len(want)
            for p, q in zip(got, want, strict=True):
                assert p == pytest.approx(q, abs=1e-12)
