"""The one schedule of learning rates."""

from __future__ import annotations

import math


def learning_rate(step: int, steps: int, peak: float, warmup: int = 1) -> float:
    """Linear warm-up over `warmup` steps, 1 for none, then a cosine to zero."""
    return peak * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
