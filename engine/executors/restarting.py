"""Keeps replicas alive: calls that were running when one died are run again, on another one or on the same one started anew.

A sampler's state lies in the engine's process, so a death costs one evaluation: the same calls give the same numbers again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from reelstep.engine.executors import LOOK_S, RETRY_S, Executor
from reelstep.engine.request import Call
from reelstep.engine.runner import Outputs
from reelstep.engine.scheduler import Key
from reelstep.errors import ConfigError, Unavailable

log = logging.getLogger(__name__)


class Replica(Executor, Protocol):
    """An executor that may die. Its `run` then raises Unavailable, now and for good."""

    @property
    def failure(self) -> str | None:
        """Why it has died; also of a death while nothing ran. None while it lives."""
        ...

    def close(self) -> None:
        """Free what it holds, dead or alive. Idempotent."""
        ...


@dataclass(frozen=True)
class Bounds:
    """How much is tried before an error is given on. Raises ConfigError for negative numbers, and a window of no time."""

    starts: int  # of one replica within `window_s`, beside its first one; those that fail count
    window_s: float
    reruns: int  # of the same calls: what ends one replica after another may be they themselves

    def __post_init__(self) -> None:
        if self.starts < 0 or self.reruns < 0 or self.window_s <= 0:
            raise ConfigError(f"{self}: starts and reruns are at least 0, and the window is longer than 0 s")


@dataclass(eq=False)
class Place:
    """Where one replica lives. Only who made it "running" or "starting" touches the replica. ends: when it died or did not start, and why."""

    number: int
    start: Callable[[], Replica]
    replica: Replica
    state: Literal["live", "running", "ended", "starting"] = "live"
    ends: deque[tuple[float, str]] = field(default_factory=deque)


class Restarting:
    """One or several replicas of the same programs as one executor. Thread-safe.

    starts: one function for each replica, called here and again after every death; replicas that hold a process's only group of ranks (`Processes`)
    can be one at a time. A thread of its own looks after them and starts the dead anew, one after another, so that the others go on meanwhile: `run`
    takes one that lives and waits only where there is none. restarts, reruns: how many times a replica was started anew, and calls run again.
    Raises ConfigError for no replica and for replicas of different programs; what the first start of any raises.
    """

    def __init__(self, starts: Sequence[Callable[[], Replica]], bounds: Bounds) -> None:
        if not starts:
            raise ConfigError("no replica to run on; give a function that starts one")
        self.bounds, self.restarts, self.reruns = bounds, 0, 0
        self._changed = threading.Condition()
        self._closed = False
        self._rows: dict[Key, int] | None = None
        self._places: list[Place] = []
        try:
            for number, start in enumerate(starts):
                self._places.append(Place(number, start, start()))
                self._check_rows(self._places[-1].replica)
        except BaseException:
            for place in self._places:
                place.replica.close()
            raise
        self._keeper = threading.Thread(target=self._keep, name="reelstep-replicas", daemon=True)
        self._keeper.start()

    @property
    def max_rows(self) -> dict[Key, int]:
        assert self._rows is not None
        return self._rows

    def run(self, model: str, calls: Sequence[Call]) -> list[Outputs]:
        """Outputs of each call. Waits for a replica that is being started.

        Raises Unavailable with all that was tried once no replica may be started again in the window, or when the calls have ended one more than
        `reruns` of them; what a replica raises otherwise.
        """
        ended: list[str] = []
        while True:
            place = self._claim()
            try:
                outputs = place.replica.run(model, calls)
            except Unavailable as error:
                self._release(place, str(error))
                ended.append(str(error))
                if len(ended) > self.bounds.reruns:
                    text = f"calls of {calls[0].key[0]!r} ran {len(ended)} times and each time the replica ended: {_listed(ended)}"
                    raise Unavailable(text, retry_after_s=RETRY_S) from error
                log.warning("%d calls of %s are run again: %s", len(calls), calls[0].key[0], error)
                with self._changed:
                    self.reruns += len(calls)
            except BaseException:
                self._release(place, None)
                raise
            else:
                self._release(place, None)
                return outputs

    def close(self) -> None:
        """Stop all replicas. Waits for a call and for a start that is under way. Idempotent."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._keeper.join()
        with self._changed:
            self._changed.wait_for(lambda: all(place.state != "running" for place in self._places))
        for place in self._places:
            place.replica.close()

    def _claim(self) -> Place:
        """A replica that lives, for the caller alone: the one that has waited longest."""
        with self._changed:
            while not self._closed:
                for place in self._places:
                    if place.state == "live" and place.replica.failure is None:
                        place.state = "running"
                        self._places.remove(place)
                        self._places.append(place)
                        return place
                if all(place.state == "ended" and not self._may_start(place) for place in self._places):
                    raise self._given_up()
                self._changed.wait(LOOK_S)
        raise Unavailable("the replicas have been stopped; start them again", retry_after_s=RETRY_S)

    def _release(self, place: Place, failure: str | None) -> None:
        with self._changed:
            place.state = "live"
            if failure is not None:
                self._end(place, failure)
            self._changed.notify_all()

    def _end(self, place: Place, why: str) -> None:
        place.state = "ended"
        place.ends.append((time.monotonic(), why))
        log.error("replica %d ended: %s", place.number, why)
        if not self._may_start(place):
            log.error("replica %d has ended %d times in %g s and is left alone for now", place.number, len(place.ends), self.bounds.window_s)

    def _may_start(self, place: Place) -> bool:
        while place.ends and time.monotonic() - place.ends[0][0] > self.bounds.window_s:
            place.ends.popleft()
        return len(place.ends) <= self.bounds.starts

    def _given_up(self) -> Unavailable:
        now = time.monotonic()
        wait_s = min(place.ends[0][0] for place in self._places) + self.bounds.window_s - now
        tried = [
            f"replica {place.number} ended {len(place.ends)} times in {self.bounds.window_s:g} s: {_listed([why for _, why in place.ends])}"
            for place in sorted(self._places, key=lambda place: place.number)
        ]
        text = f"{'; '.join(tried)}. The next start is in {wait_s:.0f} s; see what ends it"
        return Unavailable(text, retry_after_s=max(wait_s, RETRY_S))

    def _keep(self) -> None:
        """The keeper's life: sees who has died while nothing ran, and starts again who may be."""
        while (place := self._next_dead()) is not None:
            try:
                place.replica.close()
                place.replica = place.start()
                self._check_rows(place.replica)
            except Exception as error:  # ranks may fail with anything their programs do; whoever waits is told
                log.exception("replica %d did not start", place.number)
                why: str | None = f"did not start: {error}"
            else:
                why = None
                log.warning("replica %d was started again", place.number)
            with self._changed:
                self.restarts += why is None
            self._release(place, why)

    def _next_dead(self) -> Place | None:
        """The next place to start, marked so; None at the end."""
        with self._changed:
            while not self._closed:
                for place in self._places:
                    if place.state == "live" and (failure := place.replica.failure) is not None:
                        self._end(place, failure)
                    if place.state == "ended" and self._may_start(place):
                        place.state = "starting"
                        return place
                self._changed.wait(LOOK_S)
        return None

    def _check_rows(self, replica: Replica) -> None:
        """All replicas, and the same one later, run the same."""
        rows = replica.max_rows
        if self._rows is None:
            self._rows = rows
        if rows != self._rows:
            raise ConfigError(f"a replica runs {rows}, another {self._rows}; give all the same programs")


def _listed(reasons: Sequence[str]) -> str:
    return ", ".join(f"({number}) {why}" for number, why in enumerate(reasons, 1))
