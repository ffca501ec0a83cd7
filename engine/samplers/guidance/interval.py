"""CFG inside an interval of times only, the prompt's velocity outside. Two forwards inside, one outside.

Kynkaanniemi et al. 2024, arXiv:2404.07724: guidance harms near the noise and is wasted near the data.
"""

from __future__ import annotations

from torch import Tensor

from reelstep.engine.samplers.guidance import Guidance, GuidanceState, Guided, Option, Rule, cfg, text_only
from reelstep.engine.samplers.paths import Path
from reelstep.errors import ConfigError


def interval(scale: float, path: Path, start: float, stop: float) -> Rule:
    """Guided where start <= t < stop. Raises ConfigError for an interval that holds no time."""
    if start >= stop:
        raise ConfigError(f"the guidance interval from start={start:g} to stop={stop:g} is empty; start must be below stop")
    inside = cfg.cfg(scale, path, 0.0)

    def rule(x: Tensor, t: float, state: GuidanceState) -> Guided:
        u = yield from (inside if start <= t < stop else text_only)(x, t, state)
        return u

    return rule


GUIDANCE = Guidance(
    "interval",
    interval,
    {"start": Option(0.0, 0.0, 1.0, "the first time with guidance"), "stop": Option(0.5, 0.0, 1.0, "the first time without it again")},
    is_field=True,
)
