"""Two scales, one for the picture and one for the words. Three forwards.

u = u_bare + picture (u_null - u_bare) + scale (u_text - u_null): `null` keeps the picture without the words, `bare` has neither.
Brooks, Holynski and Efros 2023, arXiv:2211.09800, equation 3.
"""

from __future__ import annotations

from torch import Tensor

from reelstep.engine.samplers.guidance import Guidance, GuidanceState, Guided, Option, Query, Rule, cfg
from reelstep.engine.samplers.paths import Path


def picture_and_text(scale: float, path: Path, picture: float) -> Rule:
    """With picture 1 this is `cfg`, and costs what it costs."""
    if picture == 1:
        return cfg.cfg(scale, path, 0.0)

    def rule(x: Tensor, t: float, state: GuidanceState) -> Guided:
        text, null, bare = yield Query(x, t, ("text", "null", "bare"))
        return bare + picture * (null - bare) + scale * (text - null)

    return rule


GUIDANCE = Guidance(
    "picture_and_text", picture_and_text, {"picture": Option(1.0, 0.0, 20.0, "scale of the picture, as `scale` is of the words")}, is_field=True
)
