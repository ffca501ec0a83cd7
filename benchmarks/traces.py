"""What arrives when: drawn by a seed, or recorded. A trace file holds one JSON object a line, the fields of an `Arrival`."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from reelstep.errors import ConfigError


@dataclass(frozen=True)
class Arrival:
    """One request of a trace. steps: evaluations of the solver. Raises ConfigError for what no request can have."""

    arrival_s: float
    task: str
    steps: int
    quality: str = ""  # whose steps these are; empty where the steps were asked for
    deadline_s: float | None = None  # from the arrival on; None for none
    priority: int = 0  # smaller goes first

    def __post_init__(self) -> None:
        deadline = 1.0 if self.deadline_s is None else self.deadline_s
        if not (math.isfinite(self.arrival_s) and self.arrival_s >= 0 and self.steps >= 1 and deadline > 0 and self.priority >= 0):
            raise ConfigError(f"{self}: an arrival has arrival_s of 0 or more, steps of 1 or more, deadline_s above 0 or null, priority of 0 or more")


@dataclass(frozen=True)
class Kind:
    """One sort of request in a mix; all are equally frequent."""

    task: str
    steps: int
    quality: str


@dataclass(frozen=True)
class Burst:
    """Arrivals are `factor` times as dense in the first `length_s` of every `every_s` as in the rest of it. The mean rate stays. Raises ConfigError."""

    factor: float
    every_s: float
    length_s: float

    def __post_init__(self) -> None:
        if not (self.factor >= 1 and 0 < self.length_s < self.every_s < math.inf and self.factor < math.inf):
            raise ConfigError(f"{self}: factor is at least 1, and length_s lies between 0 and every_s")

    def when(self, expected: float, per_s: float) -> float:
        """The second by which `expected` arrivals are due at a mean of `per_s`: the inverse of the rate's integral."""
        whole, rest = divmod(expected, per_s * self.every_s)
        calm = per_s * self.every_s / (self.every_s + (self.factor - 1) * self.length_s)
        dense = calm * self.factor * self.length_s
        return whole * self.every_s + (rest / (calm * self.factor) if rest < dense else self.length_s + (rest - dense) / calm)


def draw(
    count: int,
    per_s: float,
    kinds: Sequence[Kind],
    alone_s: Callable[[str, int], float],
    slack: tuple[float, float],
    burst: Burst | None,
    seed: int,
) -> list[Arrival]:
    """A Poisson process of `count` requests. A deadline is `slack` (uniform in it) times what the request takes alone.

    One seed draws the same requests at every rate, only denser: what is compared over loads differs in nothing else. Raises ConfigError.
    """
    low, high = slack
    if not (count >= 1 and 0 < per_s < math.inf and kinds and 0 < low <= high):
        raise ConfigError(f"{count} requests at {per_s:g}/s of {len(kinds)} kinds, slack {low:g} to {high:g}: all are above 0, and slack does not fall")
    alone = {kind: alone_s(kind.task, kind.steps) for kind in kinds}
    drawn = random.Random(seed)
    due = 0.0
    arrivals = []
    for _ in range(count):
        due += drawn.expovariate(1.0)
        kind = drawn.choice(kinds)
        at = due / per_s if burst is None else burst.when(due, per_s)
        arrivals.append(Arrival(at, kind.task, kind.steps, kind.quality, drawn.uniform(low, high) * alone[kind]))
    return arrivals


def write(path: Path, arrivals: Sequence[Arrival]) -> None:
    """A trace file, in order of arrival."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(asdict(arrival)) + "\n" for arrival in arrivals))


def read(path: Path) -> list[Arrival]:
    """A trace file's arrivals in order of time. Raises ConfigError with the line that is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error.strerror}") from error
    arrivals = [parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not arrivals:
        raise ConfigError(f"{path} holds no arrival; write one JSON object a line, such as {json.dumps(asdict(Arrival(0.0, 'text_to_video', 8)))}")
    return sorted(arrivals, key=lambda arrival: arrival.arrival_s)


def parse(line: str, where: str) -> Arrival:
    """One line of a trace file. Raises ConfigError, which begins with `where`."""
    try:
        return Arrival(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {error}; a line is a JSON object with arrival_s, task, steps, and where wanted quality, deadline_s, priority") from error
