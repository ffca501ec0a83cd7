"""UniPC-2 with B2(h) = exp(h) - 1 on predicted data: DPM-Solver++(2M) predicts, and the data found where it arrives corrects the
state that it came to before the next step sets out. The correction costs no evaluation; the last step has none.

With x the corrected state, m[j] the data predicted at the j-th time, k = alpha' (1 - exp(-h)), r = h_prev / h:

    x[i+1]    = (sigma' / sigma) x + k (m[i] + (m[i] - m[i-1]) / (2 r))
    corrected = (sigma' / sigma) x + the integral of the parabola through m[i-1], m[i] and m[i+1]

In the first step there is no m[i-1] and the correction is k (m[0] + (m[1] - m[0]) / 2).

The ends, without an epsilon:
- A first step from alpha = 0 (lambda = -inf) has h = inf and k = alpha', the limit of both lines.
- A past at alpha = 0 has r = inf: the second predictor is DDIM, and its parabola the line through m[1] and m[2].
- A step to sigma = 0 (lambda = inf) is DDIM, as in dpmpp_2m: the predictor has no limit there.

Order 3 where lambda is bounded: the corrector's, one above the predictor's. Zhao et al. 2023, arXiv:2302.04867.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from reelstep.engine.samplers.fold import Rule, Solver, state
from reelstep.engine.samplers.paths import Path
from reelstep.engine.samplers.tables import ddim, dpmpp_2m


def recipe(times: Sequence[float], path: Path) -> tuple[Sequence[float], list[Rule]]:
    x, rules = state(0), []
    for i in range(len(times) - 1):
        now, after = path.at(times[i]), path.at(times[i + 1])
        k = after.alpha * -math.expm1(now.half_log_snr - after.half_log_snr)
        extrapolation = dpmpp_2m.extrapolation(i, times, path, k)
        rules.append(after.sigma / now.sigma * x + k * ddim.x1(i, times, path) + extrapolation)
        if i + 2 < len(times):
            x = state(i + 1) - extrapolation + _correction(i, times, path, k)
    return times, rules


def _correction(i: int, times: Sequence[float], path: Path, k: float) -> Rule:
    """What the i-th step adds to DDIM's, with the data predicted where it arrived."""
    m, arrived = ddim.x1(i, times, path), ddim.x1(i + 1, times, path)
    if i == 0:
        return k / 2 * (arrived - m)
    before, now, after = (path.at(t) for t in times[i - 1 : i + 2])
    h, h_prev = after.half_log_snr - now.half_log_snr, now.half_log_snr - before.half_log_snr
    r = h_prev / h
    rise = 1 + math.expm1(-h) / h  # of the integrals of theta and theta^2, theta = (lambda - lambda[i]) / h, over the step
    bend = 1 - 2 * rise / h
    curvature = (arrived - m + (ddim.x1(i - 1, times, path) - m) / r) / (1 + r)
    return after.alpha * (rise * (arrived - m) + (bend - rise) * curvature)


SOLVER = Solver("unipc", order=3, evaluations=1, recipe=recipe)
