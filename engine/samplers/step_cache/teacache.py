"""TeaCache: the change of the first block's modulated input, rescaled by a polynomial, is summed up over evaluations; below a threshold all blocks are skipped.

The polynomial takes the change of that input to the change of what the blocks add; it belongs to the model, and `reelstep fit step-cache` finds it.
Liu et al. 2024, arXiv:2411.19108.
"""

from __future__ import annotations

from reelstep.engine.samplers.guidance import Option
from reelstep.engine.samplers.step_cache import OPTIONS, Rule, StepCache


def teacache(evaluations: int, fresh_pairs: bool, threshold: float, first: float, last: float, *coefficients: float) -> Rule:
    """coefficients: of the polynomial, from the constant upwards. Where it is negative nothing is added, since no evaluation comes nearer to the past."""

    def grow(so_far: float, change: float) -> float:
        rescaled = 0.0
        for c in reversed(coefficients):
            rescaled = rescaled * change + c
        return so_far + max(rescaled, 0.0)

    return Rule(evaluations, threshold, first, last, False, True, grow, fresh_pairs)


STEP_CACHE = StepCache(
    "teacache",
    teacache,
    {
        "threshold": Option(0.1, 0.0, 10.0, "summed change from which on the network runs; 0 is no cache. Calibrate it for the model"),
        **OPTIONS,
        **{f"c{k}": Option(float(k == 1), -1e9, 1e9, f"coefficient of the change to the power {k}") for k in range(5)},
    },
)
