"""No guidance: the network's velocity for the prompt. For guidance-distilled and few-step models too. One forward."""

from __future__ import annotations

from reelstep.engine.samplers.guidance import Guidance, Rule, text_only
from reelstep.engine.samplers.paths import Path
from reelstep.errors import ConfigError


def none(scale: float, path: Path) -> Rule:
    """Raises ConfigError unless scale is 1: a scale that nothing would heed is a mistake."""
    if scale != 1:
        raise ConfigError(f"guidance 'none' has no scale, but {scale} was asked; use 'cfg', or scale 1")
    return text_only


GUIDANCE = Guidance("none", none, is_field=True)
