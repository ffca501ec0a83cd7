"""Noise correction: the first step goes to the predicted data and the noise that was really drawn, not the noise that the network predicts there.

    x[1] = alpha' x1 + sigma' x[0]        instead of        x[1] = alpha' x1 + sigma' eps

At the first time there is little but noise, so predicting it is trivial, and what the prediction misses acts as a bias: colours and contrast come out
weaker. It needs no training. Where alpha is 0 at the first time (flow models, zero terminal SNR) the predicted noise is the drawn one, and nothing changes.
Kohler et al. 2024, arXiv:2405.05224; as a change of any solver with one velocity a step, ours: later steps keep the predicted data of
the first for their history.
"""

from __future__ import annotations

from collections.abc import Sequence

from reelstep.engine.samplers.fold import Rule, Solver, state
from reelstep.engine.samplers.paths import Path
from reelstep.engine.samplers.tables import ddim
from reelstep.errors import ConfigError


def noise_corrected(solver: Solver) -> Solver:
    """The same solver with its first step corrected. Only for runs that begin with pure noise of deviation 1.

    Raises ConfigError for a solver with more velocities in a step, or one that draws fresh noise and so uses no predicted noise.
    """
    if solver.evaluations != 1 or solver.stochastic:
        raise ConfigError(f"noise correction of {solver.name!r}: it corrects the predicted noise of a first step with one velocity, which this solver has not")

    def recipe(times: Sequence[float], path: Path) -> tuple[Sequence[float], Sequence[Rule]]:
        nodes, rules = solver.recipe(times, path)
        end = path.at(times[1])
        return nodes, [end.alpha * ddim.x1(0, times, path) + end.sigma * state(0), *rules[1:]]

    return Solver(f"{solver.name}_nc", solver.order, 1, recipe)
