"""FOLD: the steps of any linear solver, written as its textbook does, become one non-stationary table.

A rule gives the next state from all states and velocities so far, x[i+1] = sum_j c[j] x[j] + sum_j d[j] u[j]; folding removes the
inner states, x[i+1] = a[i] x[0] + sum_j b[i][j] u[j]. Float64 throughout.
Shaul et al. 2024, arXiv:2403.01329, equations 10 and 11, proposition 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from reelstep.engine.samplers.ns import Table
from reelstep.engine.samplers.paths import Path
from reelstep.errors import ConfigError


@dataclass(frozen=True)
class Rule:
    """A linear combination of states and velocities, by step: c over x[j], d over u[j]. Adds and scales like a vector."""

    c: Mapping[int, float]
    d: Mapping[int, float]

    def __add__(self, other: Rule) -> Rule:
        return Rule(_sum(self.c, other.c), _sum(self.d, other.d))

    def __mul__(self, factor: float) -> Rule:
        return Rule({j: v * factor for j, v in self.c.items()}, {j: v * factor for j, v in self.d.items()})

    __rmul__ = __mul__

    def __sub__(self, other: Rule) -> Rule:
        return self + other * -1.0

    def __truediv__(self, divisor: float) -> Rule:
        return Rule({j: v / divisor for j, v in self.c.items()}, {j: v / divisor for j, v in self.d.items()})


def _sum(left: Mapping[int, float], right: Mapping[int, float]) -> dict[int, float]:
    return {j: left.get(j, 0.0) + right.get(j, 0.0) for j in sorted({*left, *right})}


def state(j: int) -> Rule:
    """The symbol x[j]."""
    return Rule({j: 1.0}, {})


def velocity(j: int) -> Rule:
    """The symbol u[j], the velocity at x[j]."""
    return Rule({}, {j: 1.0})


def fold(rules: Sequence[Rule]) -> tuple[tuple[float, ...], tuple[tuple[float, ...], ...]]:
    """a [n] and b [n][n] lower-triangular of the same solver. rules[i] makes x[i+1] and may use x[0..i], u[0..i]."""
    a, b = [1.0], [[0.0] * len(rules)]  # of x[0] itself
    for i, rule in enumerate(rules):
        if any(not 0 <= j <= i for j in (*rule.c, *rule.d)):
            raise ConfigError(f"rule {i} uses a later step than {i}; a rule may use x[0..{i}] and u[0..{i}] only")
        a.append(sum(c * a[j] for j, c in rule.c.items()))
        b.append([rule.d.get(k, 0.0) + sum(c * b[j][k] for j, c in rule.c.items()) for k in range(len(rules))])
    return tuple(a[1:]), tuple(tuple(row[: i + 1]) for i, row in enumerate(b[1:]))


Recipe = Callable[[Sequence[float], Path], tuple[Sequence[float], Sequence[Rule]]]
"""From the schedule [steps + 1] and the path to the times evaluated with the final one [n + 1], and a rule for each [n]."""


@dataclass(frozen=True)
class Solver:
    """A solver that makes a table for any schedule. order: of the global error. evaluations: velocities per step."""

    name: str
    order: int
    evaluations: int
    recipe: Recipe

    def build(self, times: Sequence[float], path: Path) -> Table:
        """The table for `times` [steps + 1]. Raises ConfigError unless they increase within [0, 1]."""
        if len(times) < 2 or not all(s < t for s, t in pairwise(times)):
            raise ConfigError(f"a schedule needs at least two times that increase; got {len(times)}: {list(times)}")
        nodes, rules = self.recipe(times, path)
        a, b = fold(rules)
        return Table(self.name, path.name, self.order, tuple(nodes), a, b)


def gaps(times: Sequence[float]) -> Iterator[float]:
    """h[i] = t[i+1] - t[i]."""
    return (t - s for s, t in pairwise(times))
