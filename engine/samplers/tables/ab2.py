"""Adams-Bashforth 2 with variable steps: a line through the last two velocities, integrated over the step. Begins with Euler."""

from __future__ import annotations

from collections.abc import Sequence

from reelstep.engine.samplers.fold import Rule, Solver, gaps, state, velocity
from reelstep.engine.samplers.paths import Path


def recipe(times: Sequence[float], path: Path) -> tuple[Sequence[float], list[Rule]]:
    h = list(gaps(times))
    rules = [state(0) + h[0] * velocity(0)]
    for i in range(1, len(h)):
        q = h[i] / (2 * h[i - 1])
        rules.append(state(i) + h[i] * (1 + q) * velocity(i) - h[i] * q * velocity(i - 1))
    return times, rules


SOLVER = Solver("ab2", order=2, evaluations=1, recipe=recipe)
