"""Calibration of Adaptive Guidance: the cosine at which a model may drop guidance, what that costs, and whether the cosine is worth anything.

Full guidance shows the cosine of the branches at every evaluation; the threshold is what they reach, on average, after a wanted share of
the evaluations. Then the rule is run, beside a plain interval of the same cost, against full guidance from the same noises.
Castillo et al. 2023, arXiv:2312.12487, equations 7 and 8; how the threshold is chosen, and the interval, are ours.

P paths, B of them at once, n evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from reelstep.engine.samplers.convert import ToVelocity, velocity_to_velocity, velocity_to_x1
from reelstep.engine.samplers.guidance import GUIDANCE, GuidanceState, Rule, guided
from reelstep.engine.samplers.guidance.adaptive import cosine
from reelstep.engine.samplers.ns import Table, drive, sample, start
from reelstep.engine.samplers.paths import Path
from reelstep.errors import ConfigError, InternalError, unknown
from reelstep.training.field import Network, Networks, ends_under, score_db

Progress = Callable[[str, int, int], None]
"""Hears what is run, how many paths are done, and of how many."""

COMPARED: Mapping[str, ToVelocity] = {"adaptive": velocity_to_velocity, "adaptive_x1": velocity_to_x1}
"""What each rule takes the cosine of."""


@dataclass(frozen=True)
class Trial:
    """A rule against full guidance. forwards: of a path, mean. score_db: mean over paths; pooled_db: of the square error of all paths, which the worst rule."""

    forwards: float
    score_db: float
    pooled_db: float


@dataclass(frozen=True)
class Calibration:
    """threshold and guided: the options of `rule`. cosines [P][n]: under full guidance. expected: mean forwards that follow from them.

    adaptive: the rule with these options. interval: CFG at all times before `stop` and at none after, its cost as near as it comes.
    Raises ConfigError for numbers that are not finite, rows of different lengths and options that the rule refuses, NotFound for another rule.
    """

    rule: str
    table: str  # hash
    scale: float
    threshold: float
    guided: int
    cosines: tuple[tuple[float, ...], ...]
    expected: float
    adaptive: Trial
    stop: float
    interval: Trial

    def __post_init__(self) -> None:
        check_rule(self.rule)
        GUIDANCE[self.rule].complete(self.options)
        if len({len(row) for row in self.cosines}) != 1:
            raise ConfigError(f"a calibration with cosines of {sorted({len(row) for row in self.cosines})} evaluations; every path has as many")
        numbers = (self.scale, self.expected, self.stop, *vars(self.adaptive).values(), *vars(self.interval).values())
        if not all(map(math.isfinite, (*numbers, *(c for row in self.cosines for c in row)))):
            raise ConfigError("a calibration holds a number that is not finite; calibrate again")

    @property
    def options(self) -> dict[str, float]:
        """To build the rule with."""
        return {"threshold": self.threshold, "guided": float(self.guided)}

    def to_json(self) -> dict[str, Any]:
        """Plain values. Floats survive `json` exactly."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Calibration:
        """The calibration of `to_json`. Raises ConfigError for missing, unknown or ill-typed fields and as the constructor does."""
        known = {f.name for f in fields(cls)}
        if data.keys() != known:
            raise ConfigError(f"a calibration has the fields {sorted(known)}; got {sorted(data)}")
        try:
            scale, threshold, expected, stop = (float(data[k]) for k in ("scale", "threshold", "expected", "stop"))
            adaptive, interval = (Trial(**{name: float(v) for name, v in data[k].items()}) for k in ("adaptive", "interval"))
            cosines = tuple(tuple(map(float, row)) for row in data["cosines"])
            return cls(str(data["rule"]), str(data["table"]), scale, threshold, int(data["guided"]), cosines, expected, adaptive, stop, interval)
        except (AttributeError, TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"a calibration holds something of another type: {error}") from error


def check_rule(name: str) -> None:
    """Raises NotFound for a rule that has no threshold."""
    if name not in COMPARED:
        raise unknown("guidance with a threshold", name[:80], COMPARED)


@torch.no_grad()
def calibrate(
    networks: Networks,
    table: Table,
    rule: str,
    path: Path,
    scale: float,
    noises: Tensor,
    share: float = 0.5,
    least: int | None = None,
    held_out: tuple[Networks, Tensor] | None = None,
    rows: int = 8,
    progress: Progress = lambda what, done, of: None,
) -> Calibration:
    """Calibrate `rule`, "adaptive" or "adaptive_x1", for a model, on noises [P, ...].

    share: of the evaluations that are guided on average. least: how many are in any case, a quarter unless given. held_out: other paths to
    try the rule on than those of the threshold. rows: paths of one forward, but for the trial of the rule, in which each path latches alone.
    """
    check_rule(rule)
    if path.name != table.path:
        raise ConfigError(f"solver table {table.name!r} is for path {table.path!r}, not for {path.name!r}; build it for the model's path")
    least = math.ceil(table.n / 4) if least is None else least
    if not 1 <= least <= share * table.n <= table.n:
        raise ConfigError(f"share={share} of {table.n} evaluations, of which {least} are guided in any case; at least 1, and a share that holds them, up to 1")
    cosines, ends = record(networks, table, rule, path, scale, noises, rows, progress)
    threshold, mean = choose_threshold(cosines, least, share * table.n)
    if held_out is not None:
        networks, noises = held_out
        _, ends = record(networks, table, rule, path, scale, noises, rows, progress)
    built = GUIDANCE[rule].build(scale, path, {"threshold": threshold, "guided": float(least)})
    adaptive = attempt(networks, table, built, noises, ends, 1, lambda done, of: progress(rule, done, of))
    stop = nearest_stop(table, adaptive.forwards - table.n)
    built = GUIDANCE["interval"].build(scale, path, {"stop": stop})
    interval = attempt(networks, table, built, noises, ends, rows, lambda done, of: progress("interval", done, of))
    return Calibration(rule, table.hash, scale, threshold, least, tuple(map(tuple, cosines.tolist())), table.n + mean, adaptive, stop, interval)


def full_guidance(
    network: Network, table: Table, path: Path, scale: float, noise: Tensor, see: Callable[[Tensor, float, Tensor, Tensor], Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """CFG from noise [B, ...]: its ends, and what `see` made of x, t and the velocities of text and null at each evaluation.

    Raises ConfigError for a scale that has nothing to save, InternalError for ends that are not finite.
    """
    if not scale > 1:
        raise ConfigError(f"scale {scale:g} has no guidance to save; take the scale of the requests, above 1")
    seen: list[Tensor] = []

    def watched(x: Tensor, t: float, branches: tuple[str, ...]) -> tuple[Tensor, ...]:
        text, null = network(x, t, branches)
        seen.append(see(x, t, text, null))
        return text, null

    ends = drive(guided(sample(table, start(table, noise)), GUIDANCE["cfg"].build(scale, path, {}), GuidanceState()), watched)
    if not ends.isfinite().all():
        raise InternalError("full guidance ended in numbers that are not finite; look at the network's velocities")
    return ends, seen


def record(networks: Networks, table: Table, rule: str, path: Path, scale: float, noises: Tensor, rows: int, progress: Progress) -> tuple[Tensor, Tensor]:
    """Full guidance: the cosine that `rule` would see at each evaluation of each path, [P, n] float64, and the ends."""

    def see(x: Tensor, t: float, text: Tensor, null: Tensor) -> Tensor:
        return cosine(COMPARED[rule](text, x, t, path), COMPARED[rule](null, x, t, path))

    cosines, ends = [], []
    for index in torch.arange(len(noises)).split(rows):
        x, seen = full_guidance(networks(index), table, path, scale, noises[index], see)
        ends.append(x)
        cosines.append(torch.stack(seen, 1))
        progress("cfg", int(index[-1]) + 1, len(noises))
    return torch.cat(cosines), torch.cat(ends)


def choose_threshold(cosines: Tensor, least: int, wanted: float) -> tuple[float, float]:
    """The threshold that guides, on average over the paths, as nearly `wanted` evaluations as possible, and how many it does guide.

    It lies half way between two of the cosines [P, n], so that rounding does not decide. A path is guided up to the evaluation that reaches
    the threshold, that one included, but at least `least` times; all along if only the last one does, or none.
    """
    reached = cosines.clone()
    reached[:, : least - 1] = -math.inf
    reached = reached.cummax(1).values[:, :-1].flatten().sort().values
    edges = torch.cat([torch.tensor([-1.0, 2.0], dtype=reached.dtype), reached[reached.isfinite()]]).unique()
    thresholds = (edges[:-1] + edges[1:]) / 2
    means = 1 + torch.searchsorted(reached, thresholds).double() / len(cosines)
    best = (means - wanted).abs().argmin()
    return float(thresholds[best]), float(means[best])


def nearest_stop(table: Table, evaluations: float) -> float:
    """Of the table's times the one with the number of evaluations before it that is nearest to `evaluations`."""
    return min(sorted(set(table.times))[1:], key=lambda stop: abs(sum(t < stop for t in table.times[: table.n]) - evaluations))


def attempt(networks: Networks, table: Table, rule: Rule, noises: Tensor, truth: Tensor, rows: int, progress: Callable[[int, int], None]) -> Trial:
    """Run `rule` from noises and compare with the ends [P, ...] of full guidance."""
    x, forwards = ends_under(networks, table, rule, noises, rows, progress)
    return Trial(forwards, float(score_db(x, truth).mean()), float(score_db(x.flatten()[None], truth.flatten()[None])))
