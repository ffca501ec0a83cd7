"""The classical Runge-Kutta method of order 4: u at the start, twice at the middle and at the end, weighted 1, 2, 2, 1.

It evaluates at t = 1, where VP has no velocity and data predictions give none. Kutta 1901.
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
        x, u = state(i), [velocity(i + k) for k in range(4)]
        nodes += [s, s + h / 2, s + h / 2, t]
        rules += [x + (h / 2) * u[0], x + (h / 2) * u[1], x + h * u[2], x + (h / 6) * (u[0] + 2 * u[1] + 2 * u[2] + u[3])]
    return [*nodes, times[-1]], rules


SOLVER = Solver("rk4", order=4, evaluations=4, recipe=recipe)
