"""DEIS, tAB-DEIS of order 2 in log rho: DDIM with the predicted noise not held but a line in log rho through the last two.

    x[i+1] = alpha' (x[i] / alpha + integral from rho to rho' of eps(rho) d rho),   rho = sigma / alpha = exp(-lambda)

The line could be in any variable; log rho is the one of diffusers' scheduler. What the line adds to DDIM is
k (eps[i-1] - eps[i]) / h_prev with k = alpha' rho - sigma' (1 + h).

The ends, without an epsilon:
- The first step has no past and is DDIM.
- A past at alpha = 0 (rho = inf) has h_prev = inf, which leaves DDIM.
- A step to sigma = 0 has h = inf and the limit k = alpha' rho, since sigma' h falls to 0.

Order 2. Zhang and Chen 2023, arXiv:2204.13902.
"""

from __future__ import annotations

from collections.abc import Sequence

from reelstep.engine.samplers.fold import Rule, Solver
from reelstep.engine.samplers.paths import Path
from reelstep.engine.samplers.tables import ddim


def recipe(times: Sequence[float], path: Path) -> tuple[Sequence[float], list[Rule]]:
    rules = [ddim.step(i, times, path) for i in range(len(times) - 1)]
    for i in range(1, len(rules)):
        before, now, after = (path.at(t) for t in times[i - 1 : i + 2])
        h, h_prev = after.half_log_snr - now.half_log_snr, now.half_log_snr - before.half_log_snr
        k = after.alpha * now.sigma / now.alpha - (after.sigma * (1 + h) if after.sigma else 0.0)
        rules[i] += k / h_prev * (ddim.eps(i - 1, times, path) - ddim.eps(i, times, path))
    return times, rules


SOLVER = Solver("deis", order=2, evaluations=1, recipe=recipe)
