"""DDIM (eta = 0), the same as DPM-Solver-1: x[i+1] = alpha' x1 + sigma' eps, with the data and noise that u[i] points to.

No logarithm and no division by alpha or sigma, so a start at alpha = 0 and an end at sigma = 0 need no special case. On CondOT
it is Euler. Song et al. 2021, arXiv:2010.02502, equation 12.
"""

from __future__ import annotations

from collections.abc import Sequence

from reelstep.engine.samplers.convert import velocity_to_eps, velocity_to_x1
from reelstep.engine.samplers.fold import Rule, Solver, state, velocity
from reelstep.engine.samplers.paths import Path


def x1(i: int, times: Sequence[float], path: Path) -> Rule:
    """The data predicted at the i-th time, evaluated as the i-th."""
    return velocity_to_x1(velocity(i), state(i), times[i], path)


def eps(i: int, times: Sequence[float], path: Path) -> Rule:
    """The noise predicted at the i-th time, evaluated as the i-th."""
    return velocity_to_eps(velocity(i), state(i), times[i], path)


def step(i: int, times: Sequence[float], path: Path) -> Rule:
    """The rule of the i-th step, of one evaluation each."""
    end = path.at(times[i + 1])
    return end.alpha * x1(i, times, path) + end.sigma * eps(i, times, path)


def recipe(times: Sequence[float], path: Path) -> tuple[Sequence[float], list[Rule]]:
    return times, [step(i, times, path) for i in range(len(times) - 1)]


SOLVER = Solver("ddim", order=1, evaluations=1, recipe=recipe)
