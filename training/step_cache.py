"""Calibration of step caches: how the change of a rule's signal tells the change of what it would reuse, and the threshold that skips a wanted share.

Paths run whole show, for any two evaluations of a branch, how far the signal and the residual of the blocks have changed between them. For TeaCache
a polynomial takes the one to the other, by least squares; then the rule itself is played through the recorded changes, and the threshold is the one
at which it skips nearest to the share. Last it is run on other paths, beside the same solver with fewer steps, against what no cache gives.
Liu et al. 2024, arXiv:2411.19108, for the polynomial; the threshold and the trial are ours.

P paths, B of them at once, n evaluations, R = records: a branch of a path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from reelstep.engine.samplers.guidance import GuidanceState, guided
from reelstep.engine.samplers.guidance import Rule as GuidanceRule
from reelstep.engine.samplers.ns import Table, drive, sample, start
from reelstep.engine.samplers.step_cache import STEP_CACHES, Edges, Evaluation, Memory, Outcome, Rule, relative_change, whole
from reelstep.errors import ConfigError, InternalError
from reelstep.training.field import score_db

Progress = Callable[[str, int, int], None]
"""Hears what is run, how many paths are done, and of how many."""

Changes = npt.NDArray[np.float64]
"""[R, n, n]: relative change from evaluation i to a later j; 0 elsewhere."""

DEGREE = 4
CANDIDATES = 256  # thresholds that are tried
SAME = 1e-6  # of a distance: what rounding alone may tell apart


@dataclass(frozen=True)
class Split:
    """A network in pieces, with the conditions of some samples.

    inputs: (x [B, ...], t, branch) -> the inputs of `denoise`. run: (program, inputs) -> its outputs. to_velocity: (output, x, t) -> velocity.
    """

    inputs: Callable[[Tensor, float, str], Edges]
    run: Callable[[str, Edges], Edges]
    to_velocity: Callable[[Tensor, Tensor, float], Tensor]


Splits = Callable[[Tensor], Split]
"""From the indices [B] of samples to the network with their conditions."""


@dataclass(frozen=True)
class Records:
    """How what a rule compares, and what it reuses, change."""

    signals: Changes
    residuals: Changes


@dataclass(frozen=True)
class Calibration:
    """options: all of the rule's. r2: share of the residual's change, from one evaluation to the next, that the signal's explains as the rule takes it.

    expected: share of the branches' evaluations that is skipped on the recorded paths; cached: on the held-out ones. score_db: of those against
    what they are without a cache, mean; fewer_db: of the same solver with fewer steps, against the same. pairs: changes (signal, residual).
    """

    rule: str
    options: Mapping[str, float]
    r2: float
    expected: float
    cached: float
    score_db: float
    fewer_db: float
    pairs: tuple[tuple[float, float], ...]


@torch.no_grad()
def calibrate(
    name: str,
    share: float,
    table: Table,
    fewer: Table,
    guidance: GuidanceRule,
    train: tuple[Splits, Tensor],
    held_out: tuple[Splits, Tensor],
    rows: int = 8,
    progress: Progress = lambda what, done, of: None,
) -> Calibration:
    """Calibrate step cache `name` for a network to skip `share` of the evaluations, on paths from noises [P, ...] under `guidance`, which asks the same
    branches at every evaluation. fewer: the table to compare with. Raises ConfigError for a share that the rule cannot reach."""
    cache = STEP_CACHES[name]
    plain = built(name, table.n, {})
    reach = (table.n - plain.first - plain.last) / table.n
    if not 0 < share <= reach:
        raise ConfigError(f"skip {share:g} of {table.n} evaluations; above 0, and at most {reach:g}, since the first and the last always run")
    records = record(name, table, guidance, *train, rows, progress)
    x, y = (changes[:, range(table.n - 1), range(1, table.n)].ravel() for changes in (records.signals, records.residuals))
    coefficients = {f"c{k}": c for k, c in enumerate(fit_polynomial(x, y))} if "c0" in cache.options else {}
    rescaled = [built(name, table.n, coefficients).grow(0.0, float(change)) for change in x]
    threshold, expected = choose_threshold(built(name, table.n, coefficients), records.signals, share)
    options = cache.complete({**coefficients, "threshold": threshold})
    truth, _ = attempt(table, guidance, *held_out, None, lambda done, of: progress("no cache", done, of))
    with_cache, cached = attempt(table, guidance, *held_out, built(name, table.n, options), lambda done, of: progress(name, done, of))
    with_fewer, _ = attempt(fewer, guidance, *held_out, None, lambda done, of: progress("fewer steps", done, of))
    score, rival = (float(score_db(ends, truth).mean()) for ends in (with_cache, with_fewer))
    explained = 1 - float(np.square(y - rescaled).sum() / np.square(y - y.mean()).sum())
    return Calibration(name, options, explained, expected, cached, score, rival, tuple(zip(x.tolist(), y.tolist(), strict=True)))


def built(name: str, evaluations: int, options: Mapping[str, float]) -> Rule:
    """The rule at its threshold, whatever branches guidance asks for."""
    rule = STEP_CACHES[name].build(evaluations, False, options)
    assert rule is not None, "a threshold above 0"
    return rule


@dataclass
class Asked:
    """A network in pieces as a guided sampler asks it, through `evaluate` (`Rule.evaluate`). outcomes: of every branch, by evaluation."""

    split: Split
    evaluate: Callable[[Edges, int, int, Memory | None], Evaluation]
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)

    def __call__(self, x: Tensor, t: float, branches: tuple[str, ...]) -> tuple[Tensor, ...]:
        return tuple(self.split.to_velocity(self._branch(self.split.inputs(x, t, branch), branch, len(branches)), x, t) for branch in branches)

    def _branch(self, inputs: Edges, branch: str, branches: int) -> Tensor:
        past = self.outcomes.setdefault(branch, [])
        outcome = drive(self.evaluate(inputs, len(past), branches, past[-1].memory if past else None), self.split.run)
        past.append(outcome)
        return outcome.velocity


def record(name: str, table: Table, guidance: GuidanceRule, splits: Splits, noises: Tensor, rows: int, progress: Progress) -> Records:
    """Run paths whole, and compare what the rule would compare and reuse at every two of their evaluations. Raises InternalError for ends not finite."""
    rule = built(name, table.n, {"last": 0.0})  # so that every evaluation leaves its memory
    signals, residuals, ends = [], [], []
    for index in torch.arange(len(noises)).split(rows):
        asked = Asked(splits(index), lambda inputs, at, branches, memory: rule.evaluate(inputs, at, branches, None))
        ends.append(drive(guided(sample(table, start(table, noises[index])), guidance, GuidanceState()), asked))
        for outcomes in asked.outcomes.values():
            memories = [outcome.memory for outcome in outcomes if outcome.memory is not None]
            signals.append(compare([memory.signal for memory in memories]))
            residuals.append(compare([memory.residual for memory in memories]))
        progress("whole", int(index[-1]) + 1, len(noises))
    if not all(bool(x.isfinite().all()) for x in ends):
        raise InternalError("paths without a cache ended in numbers that are not finite; look at the network's velocities")
    return Records(np.concatenate(signals), np.concatenate(residuals))


def compare(tensors: list[Tensor]) -> Changes:
    """[B, n, n] of n tensors [B, ...]."""
    n = len(tensors)
    changes = np.zeros((len(tensors[0]), n, n))
    for i in range(n):
        for j in range(i + 1, n):
            changes[:, i, j] = relative_change(tensors[i], tensors[j]).double().numpy()
    return changes


def fit_polynomial(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], degree: int = DEGREE) -> tuple[float, ...]:
    """Coefficients [DEGREE + 1], from the constant upwards, of the least-squares polynomial of the highest degree up to `degree` that begins at 0 or above
    and rises for all x > 0.

    One that falls would skip where the change is largest, one below 0 would take many small changes for none. If not even the straight line will
    do, the line through the origin.
    """
    for d in range(min(degree, len(np.unique(x)) - 1), 0, -1):
        found = Polynomial.fit(x, y, d).convert()
        if rises(found):
            return (*map(float, found.coef), *[0.0] * (DEGREE + 1 - len(found.coef)))
    return (0.0, float(x @ y / (x @ x)), *[0.0] * (DEGREE - 1))


def rises(polynomial: Polynomial) -> bool:
    """Whether it is at least 0 at x = 0 and its slope is above 0 at every x > 0 but single points."""
    slope = polynomial.deriv()
    roots = [complex(root) for root in slope.roots()]
    turns = sorted(root.real for root in roots if root.real > 0 and abs(root.imag) <= 1e-9 * abs(root))
    between = [*((a + b) / 2 for a, b in pairwise([0.0, *turns])), 2 * turns[-1] if turns else 1.0]
    return bool(polynomial(0.0) >= 0) and all(slope(point) > 0 for point in between)


def choose_threshold(rule: Rule, signals: Changes, share: float) -> tuple[float, float]:
    """The threshold at which `rule` skips as nearly `share` of the evaluations as it can, and the share that it then skips.

    It lies half way between two distances that the rule may meet, so that rounding does not decide; the lowest of equals.
    """
    met = np.unique([0.0, *(distance for changes in signals for distance in distances(rule, changes))])
    apart = np.diff(met) > SAME * met[1:]
    edges = np.concatenate([met[:1], met[1:][apart], [2 * met[-1]]])
    thresholds = (edges[:-1] + edges[1:]) / 2
    if len(thresholds) > CANDIDATES:
        thresholds = thresholds[np.linspace(0, len(thresholds) - 1, CANDIDATES).round().astype(int)]
    shares = np.array([skipped(rule, signals, float(threshold)) for threshold in thresholds])
    best = int(np.abs(shares - share).argmin())
    return float(thresholds[best]), float(shares[best])


def distances(rule: Rule, changes: Changes) -> list[float]:
    """What one record [n, n] can show the rule: from every evaluation that may run whole to every later one."""
    found = []
    for i in range(len(changes)):
        distance, reference = 0.0, i
        for j in range(i + 1, len(changes)):
            distance = rule.grow(distance, float(changes[reference, j]))
            reference = j if rule.follows else i
            found.append(distance)
    return found


def skipped(rule: Rule, signals: Changes, threshold: float) -> float:
    """Share of the evaluations of all records [R, n, n] that the rule skips at this threshold."""
    count = 0
    for changes in signals:
        distance, reference = 0.0, 0
        for j in range(1, len(changes)):
            distance = rule.grow(distance, float(changes[reference, j]))
            skip = rule.may_skip(j) and distance < threshold
            count += skip
            distance = distance if skip else 0.0
            reference = j if rule.follows or not skip else reference
    return count / (len(signals) * signals.shape[1])


def attempt(
    table: Table, guidance: GuidanceRule, splits: Splits, noises: Tensor, rule: Rule | None, progress: Callable[[int, int], None]
) -> tuple[Tensor, float]:
    """Run paths one by one, since each skips on its own: their ends [P, ...], and the share of the branches' evaluations that was skipped."""
    ends, outcomes = [], list[Outcome]()
    for k in range(len(noises)):
        asked = Asked(splits(torch.tensor([k])), rule.evaluate if rule else lambda inputs, at, branches, memory: whole(inputs))
        ends.append(drive(guided(sample(table, start(table, noises[k : k + 1])), guidance, GuidanceState()), asked))
        outcomes += [outcome._replace(memory=None) for past in asked.outcomes.values() for outcome in past]
        progress(k + 1, len(noises))
    return torch.cat(ends), sum(outcome.cached for outcome in outcomes) / len(outcomes)
