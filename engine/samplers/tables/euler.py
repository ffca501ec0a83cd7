"""Explicit Euler: x[i+1] = x[i] + h u[i]. The sampler of Movie Gen (Polyak et al. 2024, arXiv:2410.13720)."""

from __future__ import annotations

from collections.abc import Sequence

from reelstep.engine.samplers.fold import Rule, Solver, gaps, state, velocity
from reelstep.engine.samplers.paths import Path


def recipe(times: Sequence[float], path: Path) -> tuple[Sequence[float], list[Rule]]:
    return times, [state(i) + h * velocity(i) for i, h in enumerate(gaps(times))]


SOLVER = Solver("euler", order=1, evaluations=1, recipe=recipe)
