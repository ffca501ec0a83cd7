"""DDIM (eta = 0), the same as DPM-Solver-1: x[i+1] = alpha' x1 + sigma' eps, with the data and noise that u[i] points to.

No logarithm and no division by alpha or sigma, so a start at alpha = 0 and an end at sigma = 0 need no special case. On CondOT
it is Euler. Song et al. 2021, arXiv:2010.02502, equation 12.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from reelstep.engine.samplers.convert import velocity_to_eps, velocity_to_x1
from reelstep.engine.samplers.fold import Rule, Solver, state, velocity
from reelstep.engine.samplers.paths import Path


def step(i: int, s: float, t: float, path: Path) -> Rule:
    """The rule from time s, the i-th evaluated, to t."""
    x, u, end = state(i), velocity(i), path.at(t)
    return end.alpha * velocity_to_x1(u, x, s, path) + end.sigma * velocity_to_eps(u, x, s, path)


def recipe(times: Sequence[float], path: Path) -> tuple[Sequence[float], list[Rule]]:
    return times, [step(i, s, t, path) for i, (s, t) in enumerate(pairwise(times))]


SOLVER = Solver("ddim", order=1, evaluations=1, recipe=recipe)
