"""FOLD: the steps of any linear solver, written as its textbook does, become one non-stationary table.

A rule gives the next state from all states, velocities and noises so far, x[i+1] = sum_j c[j] x[j] + sum_j d[j] u[j] + sum_j e[j] z[j];
folding removes the inner states, x[i+1] = a[i] x[0] + sum_j b[i][j] u[j] + sum_j noise[i][j] z[j]. Float64 throughout.
Shaul et al. 2024, arXiv:2403.01329, equations 10 and 11, proposition 3.1; the noises are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from reelstep.engine.samplers.ns import Rows, Table
from reelstep.engine.samplers.paths import Path
from reelstep.errors import ConfigError


@dataclass(frozen=True)
class Rule:
    """A linear combination, by step: c over states x[j], d over velocities u[j], e over noises z[j]. Adds and scales like a vector."""

    c: Mapping[int, float] = field(default_factory=dict)
    d: Mapping[int, float] = field(default_factory=dict)
    e: Mapping[int, float] = field(default_factory=dict)

    def __add__(self, other: Rule) -> Rule:
        return Rule(_sum(self.c, other.c), _sum(self.d, other.d), _sum(self.e, other.e))

    def __mul__(self, factor: float) -> Rule:
        return self._each(lambda v: v * factor)

    __rmul__ = __mul__

    def __sub__(self, other: Rule) -> Rule:
        return self + other * -1.0

    def __truediv__(self, divisor: float) -> Rule:
        return self._each(lambda v: v / divisor)

    def _each(self, change: Callable[[float], float]) -> Rule:
        return Rule(*({j: change(v) for j, v in part.items()} for part in (self.c, self.d, self.e)))


def _sum(left: Mapping[int, float], right: Mapping[int, float]) -> dict[int, float]:
    return {j: left.get(j, 0.0) + right.get(j, 0.0) for j in sorted({*left, *right})}


def state(j: int) -> Rule:
    """The symbol x[j]."""
    return Rule(c={j: 1.0})


def velocity(j: int) -> Rule:
    """The symbol u[j], the velocity at x[j]."""
    return Rule(d={j: 1.0})


def noise(j: int) -> Rule:
    """The symbol z[j], standard normal, drawn at step j and independent of all others."""
    return Rule(e={j: 1.0})


def fold(rules: Sequence[Rule]) -> tuple[tuple[float, ...], Rows, Rows]:
    """a, b and noise (() if nothing is drawn) of the same solver, as in `Table`. rules[i] makes x[i+1] from x, u and z of 0..i."""
    for i, rule in enumerate(rules):
        if any(not 0 <= j <= i for j in (*rule.c, *rule.d, *rule.e)):
            raise ConfigError(f"rule {i} uses a later step than {i}; a rule may use x, u and z of 0..{i} only")
    a = [1.0]  # of x[0] itself
    for rule in rules:
        a.append(sum(c * a[j] for j, c in rule.c.items()))
    drawn = any(v for rule in rules for v in rule.e.values())
    return tuple(a[1:]), _fold_rows(rules, [rule.d for rule in rules]), _fold_rows(rules, [rule.e for rule in rules]) if drawn else ()


def _fold_rows(rules: Sequence[Rule], own: Sequence[Mapping[int, float]]) -> Rows:
    """Of each x[i+1] over all u (or z) of 0..i: the rule's own, and what the inner states bring."""
    steps = range(len(rules))
    rows = [[0.0] * len(rules)]  # of x[0]
    for rule, direct in zip(rules, own, strict=True):
        rows.append([direct.get(k, 0.0) + sum(c * rows[j][k] for j, c in rule.c.items()) for k in steps])
    return tuple(tuple(row[: i + 1]) for i, row in enumerate(rows[1:]))


Recipe = Callable[[Sequence[float], Path], tuple[Sequence[float], Sequence[Rule]]]
"""From the schedule [steps + 1] and the path to the times evaluated with the final one [n + 1], and a rule for each [n]."""


@dataclass(frozen=True)
class Solver:
    """A solver that makes a table for any schedule. order: as in `Table`. evaluations: velocities per step.

    stochastic: its tables add fresh noise, unless the schedule leaves no step for it.
    """

    name: str
    order: int
    evaluations: int
    recipe: Recipe
    stochastic: bool = False

    def build(self, times: Sequence[float], path: Path) -> Table:
        """The table for `times` [steps + 1]. Raises ConfigError unless they increase within [0, 1]."""
        if len(times) < 2 or not all(s < t for s, t in pairwise(times)):
            raise ConfigError(f"a schedule needs at least two times that increase; got {len(times)}: {list(times)}")
        nodes, rules = self.recipe(times, path)
        a, b, noises = fold(rules)
        return Table(self.name, path.name, self.order, tuple(nodes), a, b, noises)


def gaps(times: Sequence[float]) -> Iterator[float]:
    """h[i] = t[i+1] - t[i]."""
    return (t - s for s, t in pairwise(times))
