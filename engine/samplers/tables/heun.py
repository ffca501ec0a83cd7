"""Heun's rule (explicit trapezoid): a step by Euler, then again with the mean of the velocities at its two ends.

It evaluates at t = 1, where VP has no velocity and data predictions give none. Karras et al. 2022, arXiv:2206.00364, algorithm 1,
falls back to Euler for that last step; this one does not.
"""

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
        nodes += [s, t]
        rules += [state(i) + h * velocity(i), state(i) + (h / 2) * velocity(i) + (h / 2) * velocity(i + 1)]
    return [*nodes, times[-1]], rules


SOLVER = Solver("heun", order=2, evaluations=2, recipe=recipe)
