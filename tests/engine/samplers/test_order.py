"""Every registered deterministic solver converges as it declares, and scores on the toy what was published for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reelstep.engine.samplers.ns import drive, sample, start
from reelstep.engine.samplers.schedules import linear
from reelstep.engine.samplers.tables import SOLVERS

DETERMINISTIC = [name for name in SOLVERS if not SOLVERS[name].stochastic]
NFE = (128, 256, 512)
ENDS = (0.1, 0.9)
"""The exponential solvers have their order where lambda is bounded, and VP's velocity is infinite at t = 1, where Heun evaluates."""


def solve(name, field, times, x):
    table = SOLVERS[name].build(times, field.path)
    return drive(sample(table, start(table, x)), field.velocity)


def order(name, field, x, exact) -> float:
    """Minus the slope of log(error) over log(NFE), between ENDS. The error of the median sample."""
    schedules = [[ENDS[0] + (ENDS[1] - ENDS[0]) * t for t in linear(n // SOLVERS[name].evaluations)] for n in NFE]
    errors = [(solve(name, field, times, x) - exact).norm(dim=1).median().item() for times in schedules]
    return -np.polyfit(np.log(NFE), np.log(errors), 1)[0]


# not CondOT: one Gaussian makes its velocity linear in t along the way, and the midpoint rule converges with order 3
@pytest.mark.parametrize("path", ["cosine", "vp"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_error_on_a_gaussian_falls_with_the_declared_order(name, path, gaussian, noise):
    field, x = gaussian(path), noise[:128]
    assert order(name, field, x, field.exact(x, *ENDS)) == pytest.approx(SOLVERS[name].order, abs=0.15)


@pytest.fixture(scope="module")
def four_gaussians_reference(noise, four_gaussians):
    return four_gaussians("condot").reference(noise[:128], *ENDS)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_error_on_four_gaussians_falls_with_the_declared_order(name, four_gaussians, noise, four_gaussians_reference):
    assert order(name, four_gaussians("condot"), noise[:128], four_gaussians_reference) == pytest.approx(SOLVERS[name].order, abs=0.15)


def test_the_reference_integrator_agrees_with_the_closed_form(gaussian, noise):
    for path in ("condot", "cosine"):
        field = gaussian(path)
        torch.testing.assert_close(field.reference(noise[:64]), field.exact(noise[:64], 0.0, 1.0), rtol=0, atol=1e-7)


@pytest.fixture(scope="module")
def toy_reference(noise, four_gaussians):
    return four_gaussians("condot").reference(noise)


@pytest.mark.parametrize(
    ("name", "nfe", "score_db"), [("euler", 4, 14.88), ("midpoint", 4, 23.57), ("euler", 8, 20.70), ("midpoint", 8, 35.84), ("dpmpp_2m", 8, 27.91)]
)
def test_the_toy_scores_are_the_published_ones(name, nfe, score_db, four_gaussians, noise, toy_reference):
    field = four_gaussians("condot")
    got = solve(name, field, linear(nfe // SOLVERS[name].evaluations), noise)
    mean_square = (got - toy_reference).square().mean(1)
    assert (-10 * mean_square.log10()).mean().item() == pytest.approx(score_db, abs=6e-3)
