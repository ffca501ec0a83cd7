"""Midpoint rule (Runge-Kutta 2): half a step by Euler, then the whole step with the velocity found there."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from reelstep.engine.samplers.fold import Rule, Solver, state, velocity
from reelstep.engine.samplers.paths import Path


def recipe(times: Sequence[float], path: Path) -> tuple[list[float], list[Rule]]:
    nodes: list[float] = []
    rules: list[Rule] = []
    for s, t in pairwise(times):
        i, h = len(nodes), t - s
        nodes += [s, s + h / 2]
        rules += [state(i) + (h / 2) * velocity(i), state(i) + h * velocity(i + 1)]
    return [*nodes, times[-1]], rules


SOLVER = Solver("midpoint", order=2, evaluations=2, recipe=recipe)
