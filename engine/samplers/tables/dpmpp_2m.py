"""DPM-Solver++(2M): DDIM with the predicted data extrapolated from the last two in lambda = log(alpha / sigma).

    x[i+1] = (sigma' / sigma) x[i] + k (x1[i] + w (x1[i] - x1[i-1])),  k = alpha' (1 - exp(-h)),  w = h / (2 h_prev)

The ends, without an epsilon:
- The first step has no past: w = 0, a DDIM step.
- A past at alpha = 0 (lambda = -inf) gives h_prev = inf and so w = 0 in the limit: the second step from t = 0 is DDIM too.
- A step to sigma = 0 (lambda = inf) has h = inf, where w diverges and the rule has no limit. That last step is DDIM, as in the
  authors' code ("lower order final").

Order 2 where lambda is bounded; with these ends, on all of [0, 1], the error of our toy fell with order 1.4 from 32 to 256 steps.

Lu et al. 2022, arXiv:2211.01095, algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from reelstep.engine.samplers.fold import Rule, Solver
from reelstep.engine.samplers.paths import Path
from reelstep.engine.samplers.tables import ddim


def recipe(times: Sequence[float], path: Path) -> tuple[Sequence[float], list[Rule]]:
    rules = []
    for i in range(len(times) - 1):
        now, after = path.at(times[i]), path.at(times[i + 1])
        k = after.alpha * -math.expm1(now.half_log_snr - after.half_log_snr)
        rules.append(ddim.step(i, times, path) + extrapolation(i, times, path, k))
    return times, rules


def extrapolation(i: int, times: Sequence[float], path: Path, k: float) -> Rule:
    """k w (x1[i] - x1[i-1]) of the i-th step; nothing at the ends."""
    if i == 0:
        return Rule()
    before, now, after = (path.at(t) for t in times[i - 1 : i + 2])
    h, h_prev = after.half_log_snr - now.half_log_snr, now.half_log_snr - before.half_log_snr
    if math.isinf(h) or math.isinf(h_prev):
        return Rule()
    return k * h / (2 * h_prev) * (ddim.x1(i, times, path) - ddim.x1(i - 1, times, path))


SOLVER = Solver("dpmpp_2m", order=2, evaluations=1, recipe=recipe)
