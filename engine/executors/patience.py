"""How long a call may take before its replica counts as hung: many times what such calls took.

A rank in an endless loop of native code, or a driver that never answers, still has a heartbeat; nothing but the time tells it from a long call.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from queue import SimpleQueue
from statistics import median
from typing import TypeVar

from reelstep.errors import ConfigError

T = TypeVar("T")

Kind = tuple[str, str, str, int]
"""Model, program, profile, rows: calls of one kind do the same work."""

RECENT = 100
"""Calls of a kind that are remembered, so that one slow one does not count for ever."""


@dataclass(frozen=True)
class Allowance:
    """What a call may take. Raises ConfigError for times out of order."""

    first_s: float = 600.0  # the first of its kind, which may compile
    least_s: float = 5.0  # later ones, however short they are
    times: float = 20.0  # later ones, of the slowest lately: a machine that others load as well is a few times slower, not twenty

    def __post_init__(self) -> None:
        if not (0 < self.least_s <= self.first_s and self.times >= 1):
            raise ConfigError(f"{self}: a call may take more than 0 s, its first one no less than later ones, and those at least 1 time the slowest")


class Usual:
    """What calls took, on all replicas of the same programs, and so what one may take. Thread-safe.

    fresh: it is the first of its kind on its replica; it may compile again and is compared with other such calls.
    A limit that was too short for a machine is not met for ever: it doubles with every call that did not end, until one does.
    """

    def __init__(self, allowance: Allowance) -> None:
        self.allowance = allowance
        self._lock = threading.Lock()
        self._took: defaultdict[tuple[Kind, bool], deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._cut: Counter[tuple[Kind, bool]] = Counter()

    def limit_s(self, kind: Kind, fresh: bool) -> float:
        allowance = self.allowance
        with self._lock:
            own = self._took[kind, fresh]
            known = own or self._took[kind, True]
            limit_s = max(allowance.least_s, allowance.times * max(known)) if known else allowance.first_s
            if fresh or not own:  # it was compared with calls that compiled
                limit_s = min(limit_s, allowance.first_s)
            return limit_s * 2.0 ** self._cut[kind, fresh]

    def note(self, kind: Kind, fresh: bool, seconds: float) -> None:
        """A call has ended."""
        with self._lock:
            self._took[kind, fresh].append(seconds)
            self._cut.pop((kind, fresh), None)

    def note_cut(self, kind: Kind, fresh: bool) -> str:
        """A call has not ended within its limit. Returns what is usual, in words."""
        with self._lock:
            self._cut[kind, fresh] += 1
            known = self._took[kind, fresh] or self._took[kind, True]
            return f"usually {median(known):.3g} s, at most {max(known):.3g} s in {len(known)} calls" if known else "and none like it has ended before"


class Hand:
    """A thread that runs one thing after another for somebody who can leave: what never returns holds up nobody but this thread."""

    def __init__(self, name: str) -> None:
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def run(self, work: Callable[[], T], limit_s: float) -> Future[T]:
        """What became of `work`; not done if it takes longer than `limit_s`."""
        future: Future[T] = Future()

        def do() -> None:
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001  # whoever waits is told, whatever it is
                future.set_exception(error)

        self._work.put(do)
        wait([future], limit_s)
        return future

    def close(self) -> None:
        """The thread ends after what it does now, and is not waited for. Idempotent."""
        self._work.put(None)

    def _run(self) -> None:
        while (do := self._work.get()) is not None:
            do()
