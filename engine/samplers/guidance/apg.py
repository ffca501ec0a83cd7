"""Adaptive projected guidance: of the guidance, the part along the prompt's own prediction is damped, which oversaturates. Two forwards.

Sadat, Hilliges and Weber 2024, arXiv:2410.02416, algorithm 1: differences of predicted data, with a norm limit and negative momentum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reelstep.engine.samplers.convert import velocity_to_x1
from reelstep.engine.samplers.guidance import Guidance, GuidanceState, Guided, Option, Query, Rule, rows_dot, text_only
from reelstep.engine.samplers.paths import Path
from reelstep.errors import ConfigError


def apg(scale: float, path: Path, eta: float, limit: float, momentum: float) -> Rule:
    """eta: share of the parallel part that stays (1 is plain CFG). limit: highest norm of a row's difference, 0 for none. momentum: of past differences."""
    if scale == 1:
        return text_only

    def rule(x: Tensor, t: float, state: GuidanceState) -> Guided:
        point = path.at(t)
        if point.sigma == 0:
            raise ConfigError(f"guidance 'apg' has no predicted data at t={t} of path {path.name!r}; use a solver that does not evaluate there")
        text, null = yield Query(x, t, ("text", "null"))
        x1 = velocity_to_x1(text, x, t, path)
        delta = x1 - velocity_to_x1(null, x, t, path)
        if momentum != 0:
            delta = delta + momentum * state.memory.get("delta", torch.zeros_like(delta))
            state.memory["delta"] = delta
        if limit > 0:
            delta = delta * (limit / rows_dot(delta, delta).sqrt().clamp_min(1e-12)).clamp_max(1.0)
        parallel = rows_dot(delta, x1) / rows_dot(x1, x1).clamp_min(1e-12) * x1
        update = delta - (1 - eta) * parallel
        return text + (scale - 1) * update * (point.determinant / point.sigma)  # a difference of data, as one of velocities

    return rule


GUIDANCE = Guidance(
    "apg",
    apg,
    {
        "eta": Option(0.0, 0.0, 1.0, "share of the parallel part that stays; 1 is plain guidance"),
        "limit": Option(0.0, 0.0, 1e6, "highest norm of the difference of predicted data; 0 for no limit"),
        "momentum": Option(0.0, -0.95, 0.95, "weight of past differences; the paper uses -0.5 to -0.75"),
    },
)
