"""Delta hold: from a time on, the last difference of the branches is used again and again. Two forwards before, one after.

Some engines ship this gate under the name of LinearAG, which fits a regression instead; see `linear_ag`.
"""

from __future__ import annotations

from torch import Tensor

from reelstep.engine.samplers.guidance import Guidance, GuidanceState, Guided, Option, Query, Rule, text_only
from reelstep.engine.samplers.guidance.cfg import combine
from reelstep.engine.samplers.paths import Path


def delta_hold(scale: float, path: Path, stop: float) -> Rule:
    """stop: the first time whose difference is not computed. The first evaluation's always is."""
    if scale == 1:
        return text_only

    def rule(x: Tensor, t: float, state: GuidanceState) -> Guided:
        if t >= stop and "delta" in state.memory:
            (text,) = yield Query(x, t, ("text",))
            return text + (scale - 1) * state.memory["delta"]
        text, null = yield Query(x, t, ("text", "null"))
        state.memory["delta"] = text - null
        return combine(text, null, scale)

    return rule


GUIDANCE = Guidance("delta_hold", delta_hold, {"stop": Option(0.5, 0.0, 1.0, "the time from which on the last difference is held")})
