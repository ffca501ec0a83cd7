"""CFG-Zero*: the null velocity is scaled to fit the prompt's best, and the first evaluations stand still. For flow models. Two forwards; none at rest.

u = r u_null + scale (u_text - r u_null), r = <u_text, u_null> / |u_null|^2, row by row. Fan et al. 2025, arXiv:2503.18886.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reelstep.engine.samplers.guidance import Guidance, GuidanceState, Guided, Option, Query, Rule, rows_dot, text_only
from reelstep.engine.samplers.guidance.cfg import combine
from reelstep.engine.samplers.paths import Path


def cfg_zero(scale: float, path: Path, rest: float) -> Rule:
    """rest: how many of the first evaluations take the velocity to be zero, without asking the network."""
    if scale == 1:
        return text_only

    def rule(x: Tensor, t: float, state: GuidanceState) -> Guided:
        if state.nfe < rest:
            return torch.zeros_like(x)
        text, null = yield Query(x, t, ("text", "null"))
        ratio = rows_dot(text, null) / rows_dot(null, null).clamp_min(1e-12)
        return combine(text, ratio * null, scale)

    return rule


GUIDANCE = Guidance("cfg_zero", cfg_zero, {"rest": Option(0.0, 0.0, 16.0, "evaluations at the start that stand still; the paper rests 4 % of the steps")})
