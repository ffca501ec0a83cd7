"""Classifier-free guidance, u = u_null + scale * (u_text - u_null). Two forwards; one at scales 1 and 0.

Ho and Salimans 2022, arXiv:2207.12598, in the convention where 1 is unguided.
"""

from __future__ import annotations

from torch import Tensor

from reelstep.engine.samplers.guidance import Guidance, GuidanceState, Guided, Option, Query, Rule, null_only, text_only
from reelstep.engine.samplers.paths import Path


def combine(text: Tensor, null: Tensor, scale: float) -> Tensor:
    """The formula that the other rules share."""
    return null + scale * (text - null)


def cfg(scale: float, path: Path, rescale: float) -> Rule:
    """rescale mixes in the guided velocity at the deviation of the prompt's own, row by row: against the glare of high scales.

    Lin et al. 2023, arXiv:2305.08891, section 3.4, on the velocity.
    """
    if scale == 1:
        return text_only
    if scale == 0:
        return null_only

    def rule(x: Tensor, t: float, state: GuidanceState) -> Guided:
        text, null = yield Query(x, t, ("text", "null"))
        u = combine(text, null, scale)
        if rescale == 0:
            return u
        return u * (1 - rescale + rescale * deviation(text) / deviation(u).clamp_min(1e-12))

    return rule


def deviation(u: Tensor) -> Tensor:
    """Standard deviation of each row, [B, 1, ...]."""
    return u.std(dim=tuple(range(1, u.ndim)), keepdim=True)


GUIDANCE = Guidance(
    "cfg", cfg, {"rescale": Option(0.0, 0.0, 1.0, "share of the velocity that keeps the unguided deviation; 0.7 is common")}, is_field=True
)
