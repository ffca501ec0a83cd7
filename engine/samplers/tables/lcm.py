"""Multistep consistency sampling: take the predicted data, noise it anew to the next time. x[i+1] = alpha' x1 + sigma' z[i].

For networks distilled to predict the end of the path in few steps (LCM, and DMD with its list of times); an undistilled network
loses detail in it, with more steps too. The step to sigma = 0 adds no noise and gives x1. No division: both ends are exact.
Song et al. 2023, arXiv:2303.01469, algorithm 1; Luo et al. 2023, arXiv:2310.04378; DMD2, Yin et al. 2024, arXiv:2405.14867.
"""

from __future__ import annotations

from collections.abc import Sequence

from reelstep.engine.samplers.fold import Rule, Solver, noise
from reelstep.engine.samplers.paths import Path
from reelstep.engine.samplers.tables import ddim


def recipe(times: Sequence[float], path: Path) -> tuple[Sequence[float], list[Rule]]:
    rules = []
    for i in range(len(times) - 1):
        end = path.at(times[i + 1])
        rules.append(end.alpha * ddim.x1(i, times, path) + end.sigma * noise(i))
    return times, rules


SOLVER = Solver("lcm", order=0, evaluations=1, recipe=recipe, stochastic=True)
