"""How many replicas there shall be: more where rows wait for long, fewer where some are idle for long. The decision knows no clock of its own."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from reelstep.compiler.bundle import Bundle
from reelstep.engine.executors.restarting import Restarting
from reelstep.errors import ConfigError

log = logging.getLogger(__name__)

ROWS, WINDOW_S, IDLE_S = 8.0, 10.0, 300.0
"""A replica takes minutes to start and to pay for itself, so one is closed much later than one is started."""
LOOKS = 10
"""In a window."""


@dataclass(frozen=True)
class Scaling:
    """Between which numbers, and when. Raises ConfigError for numbers out of order."""

    least: int
    most: int
    rows: float = ROWS  # that wait, for each replica, above which another one is wanted
    window_s: float = WINDOW_S  # for which they must have waited
    idle_s: float = IDLE_S  # for which one fewer would have done, before one is closed

    def __post_init__(self) -> None:
        if not (1 <= self.least <= self.most and self.rows > 0 and 0 < self.window_s <= self.idle_s):
            asked = f"{self.least} to {self.most} replicas, one more above {self.rows:g} rows each for {self.window_s:g} s, one fewer after {self.idle_s:g} s"
            raise ConfigError(f"{asked}: there is at least 1, at most as many as the second number, more than 0 rows, and the second time is no shorter")

    @classmethod
    def parse(cls, text: str) -> Scaling:
        """N, or LEAST:MOST. Raises ConfigError."""
        numbers = [int(each) if each.isdecimal() else 0 for each in text.split(":")]
        if len(numbers) > 2 or not 1 <= numbers[0] <= numbers[-1]:
            raise ConfigError(f"replicas {text!r}; a number of at least 1, or LEAST:MOST from 1 upwards, such as 2 or 1:4")
        return cls(numbers[0], numbers[-1])


@dataclass(frozen=True)
class Load:
    """What an engine has at one moment."""

    waiting_rows: int  # of calls that no replica has taken
    busy: int  # replicas that run a batch


@dataclass
class Decision:
    """What was seen since the last change, by time."""

    scaling: Scaling
    seen: list[tuple[float, Load]] = field(default_factory=list)

    def wanted(self, now: float, load: Load, replicas: int, living: int, room: int) -> int:
        """How many replicas there shall be from now on.

        replicas: that are wanted so far, and how many of them live: while one is being started nobody asks for more. room: for how many more the
        cluster has resources. More at once where even the fewest rows that waited in the window need them; one fewer at a time.
        """
        scaling = self.scaling
        self.seen.append((now, load))
        self.seen = [(at, seen) for at, seen in self.seen if now - at <= scaling.idle_s]
        wanted = replicas
        recent = [seen for at, seen in self.seen if now - at <= scaling.window_s]
        fewest = min(seen.waiting_rows for seen in recent)
        if self._covers(now, scaling.window_s) and living >= replicas and fewest > scaling.rows * replicas:
            wanted = min(math.ceil(fewest / scaling.rows), replicas + max(0, room))
        elif self._covers(now, scaling.idle_s) and all(seen.waiting_rows == 0 and seen.busy < replicas for _, seen in self.seen):
            wanted = replicas - 1
        wanted = min(max(wanted, scaling.least), scaling.most)
        if wanted != replicas:
            self.seen.clear()
        return wanted

    def _covers(self, now: float, seconds: float) -> bool:
        """Whether it has been looked for so long, but for the time between two looks."""
        return now - self.seen[0][0] >= seconds - self.scaling.window_s / LOOKS


class Elsewhere(Protocol):
    """Replicas that an engine's programs run on, outside its process."""

    @property
    def scaling(self) -> Scaling: ...

    def open(self, bundles: Sequence[Bundle]) -> Restarting:
        """As many as `scaling` says at least, each of all bundles."""
        ...

    def room(self) -> int:
        """For how many more there are resources now."""
        ...


class Scaler:
    """Looks at an engine's load from a thread of its own, and sizes its replicas. Does nothing where their number is fixed."""

    def __init__(self, elsewhere: Elsewhere, replicas: Restarting, load: Callable[[], Load]) -> None:
        self.elsewhere, self.replicas, self.load = elsewhere, replicas, load
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="reelstep-scaler", daemon=True)
        if elsewhere.scaling.least < elsewhere.scaling.most:
            self._thread.start()

    def close(self) -> None:
        """And the replicas. Idempotent."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.replicas.close()

    def _watch(self) -> None:
        decision, replicas = Decision(self.elsewhere.scaling), self.replicas
        while not self._stop.wait(self.elsewhere.scaling.window_s / LOOKS):
            try:
                room = self.elsewhere.room()
            except Exception:  # whoever counts may be away for a while
                log.exception("it is unknown how much room there is; no replica is added")
                room = 0
            load = self.load()
            wanted = decision.wanted(time.monotonic(), load, replicas.wanted, replicas.capacity, room)
            if wanted != replicas.wanted:
                log.warning("%d replicas instead of %d: %d rows wait, %d replicas are busy", wanted, replicas.wanted, load.waiting_rows, load.busy)
                replicas.resize(wanted)
