"""Ancestral Euler, the same as DDIM with eta = 1 and as SDE-DPM-Solver++(1): DDIM to less noise than the next time has, then fresh noise.

    x[i+1] = alpha' x1 + sigma' (q eps + sqrt(1 - q^2) z[i]),   q = (sigma' / alpha') / (sigma / alpha)

No logarithm and no division by 0: from alpha = 0, q = 0 and all noise is fresh; at sigma' = 0 none is added. On every path that
is the ancestral step of its noise / signal ratio; the variant for straight lines that splits sigma' itself is another one.
Order 1, weak. Song et al. 2021, arXiv:2010.02502, equations 12 and 16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from reelstep.engine.samplers.fold import Rule, Solver, noise
from reelstep.engine.samplers.paths import Path
from reelstep.engine.samplers.tables import ddim


def step(i: int, times: Sequence[float], path: Path) -> Rule:
    """The rule of the i-th step, of one evaluation each."""
    now, end = path.at(times[i]), path.at(times[i + 1])
    q = end.sigma * now.alpha / (end.alpha * now.sigma)
    kept = q * ddim.eps(i, times, path) + math.sqrt(1 - q * q) * noise(i)
    return end.alpha * ddim.x1(i, times, path) + end.sigma * kept


def recipe(times: Sequence[float], path: Path) -> tuple[Sequence[float], list[Rule]]:
    return times, [step(i, times, path) for i in range(len(times) - 1)]


SOLVER = Solver("euler_ancestral", order=1, evaluations=1, recipe=recipe, stochastic=True)
