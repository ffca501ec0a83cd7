"""SDE-DPM-Solver++(2M), eta = 1: ancestral Euler with the predicted data extrapolated as in DPM-Solver++(2M).

    x[i+1] = ancestral step + k w (x1[i] - x1[i-1]),  k = alpha' (1 - exp(-2 h)),  w = h / (2 h_prev)

The ends, without an epsilon, are those of dpmpp_2m with the ancestral step in DDIM's place: the first step, the second from
alpha = 0, and the step to sigma = 0, which adds no noise.

Weak order 2, as measured on a Gaussian where lambda is bounded. Lu et al. 2022, arXiv:2211.01095.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from reelstep.engine.samplers.fold import Rule, Solver
from reelstep.engine.samplers.paths import Path
from reelstep.engine.samplers.tables import dpmpp_2m, euler_ancestral


def recipe(times: Sequence[float], path: Path) -> tuple[Sequence[float], list[Rule]]:
    rules = []
    for i in range(len(times) - 1):
        now, after = path.at(times[i]), path.at(times[i + 1])
        k = after.alpha * -math.expm1(2 * (now.half_log_snr - after.half_log_snr))
        rules.append(euler_ancestral.step(i, times, path) + dpmpp_2m.extrapolation(i, times, path, k))
    return times, rules


SOLVER = Solver("dpmpp_2m_sde", order=2, evaluations=1, recipe=recipe, stochastic=True)
