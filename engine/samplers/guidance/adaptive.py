"""Adaptive Guidance: CFG until the two branches agree, then the prompt's velocity alone. Two forwards before, one after.

The step at which the cosine of the branches first reaches `threshold` is still guided, since both calls are paid; all later
ones are not, whatever the cosine does then. Castillo et al. 2023, arXiv:2312.12487, equations 7 and 8.

The cosine depends on what is compared, and so does the threshold; neither carries over from model to model. `adaptive`
compares velocities, which fits flow and v models; `adaptive_x1` compares predicted data, for noise models, whose branches
agree near the noise whatever they are asked.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reelstep.engine.samplers.convert import velocity_to_x1
from reelstep.engine.samplers.guidance import Guidance, GuidanceState, Guided, Option, Query, Rule, null_only, rows_dot, text_only
from reelstep.engine.samplers.guidance.cfg import combine
from reelstep.engine.samplers.paths import Path


def adaptive(scale: float, path: Path, threshold: float, guided: float) -> Rule:
    """guided: evaluations that are guided in any case. The latch is for all rows of x: the least sure one counts."""
    return latching(scale, threshold, guided, lambda u, x, t: u)


def adaptive_x1(scale: float, path: Path, threshold: float, guided: float) -> Rule:
    """`adaptive` on predicted data."""
    return latching(scale, threshold, guided, lambda u, x, t: velocity_to_x1(u, x, t, path))


def latching(scale: float, threshold: float, guided: float, view: Callable[[Tensor, Tensor, float], Tensor]) -> Rule:
    """The rule that compares `view` of the branches' velocities."""
    if scale == 1:
        return text_only
    if scale == 0:
        return null_only

    def rule(x: Tensor, t: float, state: GuidanceState) -> Guided:
        if "latched" in state.memory:
            u = yield from text_only(x, t, state)
            return u
        text, null = yield Query(x, t, ("text", "null"))
        if state.nfe + 1 >= guided and float(cosine(view(text, x, t), view(null, x, t)).min()) >= threshold:
            state.memory["latched"] = torch.ones(())
        return combine(text, null, scale)

    return rule


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Of each row, over all its dimensions, in float64; 1 where one of the two is zero, since there is nothing to guide."""
    x, y = x.double(), y.double()
    norms = (rows_dot(x, x) * rows_dot(y, y)).sqrt().flatten()
    return torch.where(norms > 0, rows_dot(x, y).flatten() / norms.clamp_min(1e-300), 1.0)


OPTIONS = {
    "threshold": Option(0.99, -1.0, 2.0, "cosine of the branches from which on guidance is off; above 1 it never is. Calibrate it for the model"),
    "guided": Option(1.0, 1.0, 1000.0, "evaluations that are guided in any case"),
}
GUIDANCE = Guidance("adaptive", adaptive, OPTIONS, measures=True)
GUIDANCE_X1 = Guidance("adaptive_x1", adaptive_x1, OPTIONS, measures=True)
