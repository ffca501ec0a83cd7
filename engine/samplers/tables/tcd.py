"""TCD's strategic stochastic sampling: DDIM beyond the next time, to its noise time (1 - t) times 1 - gamma, and noised back.

    x_s = alpha_s x1 + sigma_s eps,   s = 1 - (1 - gamma) (1 - t')
    x[i+1] = (alpha' / alpha_s) x_s + sqrt(sigma'^2 - (alpha' / alpha_s)^2 sigma_s^2) z[i]

gamma = 0.3, the authors' choice; 0 is DDIM, 1 is lcm. For networks distilled to few steps. No division by 0: s > 0, and a
step to t = 1 has s = 1 and adds no noise. Zheng et al. 2024, arXiv:2402.19159.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from reelstep.engine.samplers.fold import Rule, Solver, noise
from reelstep.engine.samplers.paths import Path
from reelstep.engine.samplers.tables import ddim

GAMMA = 0.3


def recipe(times: Sequence[float], path: Path) -> tuple[Sequence[float], list[Rule]]:
    return times, [step(i, times, path, GAMMA) for i in range(len(times) - 1)]


def step(i: int, times: Sequence[float], path: Path, gamma: float) -> Rule:
    """The rule of the i-th step."""
    end, beyond = path.at(times[i + 1]), path.at(1 - (1 - gamma) * (1 - times[i + 1]))
    back = end.alpha / beyond.alpha
    ahead = beyond.alpha * ddim.x1(i, times, path) + beyond.sigma * ddim.eps(i, times, path)
    return back * ahead + math.sqrt(end.sigma**2 - (back * beyond.sigma) ** 2) * noise(i)


SOLVER = Solver("tcd", order=0, evaluations=1, recipe=recipe, stochastic=True)
