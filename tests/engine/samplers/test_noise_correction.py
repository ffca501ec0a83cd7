"""Noise correction against the published first step, its size, and where it must do nothing."""

from __future__ import annotations

import pytest
import torch

from reelstep.engine.samplers.convert import velocity_to_eps, velocity_to_x1
from reelstep.engine.samplers.noise_correction import noise_corrected
from reelstep.engine.samplers.ns import drive, sample, start
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.schedules import linear
from reelstep.engine.samplers.tables import SOLVERS
from reelstep.errors import ConfigError

FITTING = [name for name, solver in SOLVERS.items() if solver.evaluations == 1 and not solver.stochastic]


def states(table, x, field):
    """Every state that the table asks at, and the end."""
    seen = []
    end = drive(sample(table, start(table, x)), lambda x, t: seen.append(x) or field(x, t))
    return [*seen, end]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_first_step_is_the_published_one_and_the_others_are_ddim(four_gaussians, noise, steps):
    """Kohler et al. 2024: alpha' x0_hat + sigma' eps at T, with the drawn eps; DDIM from there."""
    field, path, times = four_gaussians("vp"), PATHS["vp"], linear(steps)
    x = noise
    for i in range(steps):
        u, end = field.velocity(x, times[i]), path.at(times[i + 1])
        eps = noise if i == 0 else velocity_to_eps(u, x, times[i], path)
        x = end.alpha * velocity_to_x1(u, x, times[i], path) + end.sigma * eps
    table = noise_corrected(SOLVERS["ddim"]).build(times, path)
    assert torch.allclose(states(table, noise, field.velocity)[-1], x, atol=1e-12)


def test_its_size_is_that_of_the_closed_form(four_gaussians, noise):
    """s1 (z (1 - 1/s0) + a0/s0 x0_hat), with a0, s0 at the start and s1 at the next time."""
    field, path, times = four_gaussians("vp"), PATHS["vp"], linear(4)
    plain, corrected = (states(solver.build(times, path), noise, field.velocity)[1] for solver in (SOLVERS["ddim"], noise_corrected(SOLVERS["ddim"])))
    first, second = path.at(0.0), path.at(times[1])
    want = second.sigma * (noise * (1 - 1 / first.sigma) + first.alpha / first.sigma * field.x1(noise, 0.0))
    assert torch.allclose(corrected - plain, want, atol=1e-12)
    assert float(want.abs().max()) > 1e-4, "alpha is 0.0066 there: small, as the paper says of such models, but not nothing"


@pytest.mark.parametrize("path", ["condot", "cosine"])
@pytest.mark.parametrize("name", [name for name in FITTING if name not in ("euler", "ab2")])
def test_it_does_nothing_where_the_first_time_is_noise_alone(four_gaussians, noise, name, path):
    field, times = four_gaussians(path), linear(6)
    plain, corrected = (states(solver.build(times, PATHS[path]), noise, field.velocity) for solver in (SOLVERS[name], noise_corrected(SOLVERS[name])))
    assert all(torch.allclose(p, q, atol=1e-10) for p, q in zip(plain, corrected, strict=True))


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc", "deis"])
def test_the_history_keeps_the_predicted_data_of_the_first_step(four_gaussians, noise, name):
    """From the corrected x[1] on, a solver that was started there with the same past goes the same way: its rules but the first are untouched."""
    path, times = PATHS["vp"], linear(5)
    _, plain = SOLVERS[name].recipe(times, path)
    _, corrected = noise_corrected(SOLVERS[name]).recipe(times, path)
    assert list(corrected[1:]) == list(plain[1:])
    assert corrected[0] != plain[0]


@pytest.mark.parametrize("name", ["midpoint", "heun", "rk4", "lcm", "euler_ancestral"])
def test_a_solver_that_has_no_such_first_step_is_refused(name):
    with pytest.raises(ConfigError, match="noise correction"):
        noise_corrected(SOLVERS[name])
