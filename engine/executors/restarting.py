"""Keeps replicas alive: calls that were running when one died are run again, on another one or on the same one started anew.

Their number may change while they run, and one whose machine shall go is replaced first and then closed.

A sampler's state lies in the engine's process, so a death costs one evaluation: the same calls give the same numbers again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from typing import Literal, Protocol

from reelstep.engine.executors import LOOK_S, RETRY_S, Executor
from reelstep.engine.executors.patience import Allowance, Hand, Kind, Usual
from reelstep.engine.request import Call
from reelstep.engine.runner import Outputs
from reelstep.engine.scheduler import Key
from reelstep.errors import ConfigError, Unavailable

log = logging.getLogger(__name__)

LAST_START_S = 5.0
"""For which a start is waited for when all is closed."""


class Replica(Executor, Protocol):
    """An executor that may die. Its `run` then raises Unavailable, now and for good."""

    @property
    def failure(self) -> str | None:
        """Why it has died; also of a death while nothing ran. None while it lives."""
        ...

    @property
    def leaving(self) -> str | None:
        """Why another shall take its place although it lives, as when its machine is drained. None where it may stay."""
        ...

    def give_up(self, why: str) -> str:
        """Its call takes too long: it has died. Returns why, and which rank keeps the others waiting. The call itself may never return."""
        ...

    def close(self) -> None:
        """Free what it holds, dead or alive, whatever a call that was given up still does. Idempotent."""
        ...


@dataclass(frozen=True)
class Bounds:
    """How much is tried before an error is given on. Raises ConfigError for negative numbers, and a window of no time."""

    starts: int  # of one replica within `window_s`, beside its first one; those that fail count
    window_s: float
    reruns: int  # of the same calls: what ends one replica after another may be they themselves
    calls: Allowance = field(default_factory=Allowance)  # what one may take; then its replica counts as hung

    def __post_init__(self) -> None:
        if self.starts < 0 or self.reruns < 0 or self.window_s <= 0:
            raise ConfigError(f"{self}: starts and reruns are at least 0, and the window is longer than 0 s")


@dataclass(eq=False)
class Place:
    """Where one replica lives. Only who made it "running", "starting" or "closing" touches the replica.

    ends: when it died or did not start, and why. retired: why it is not wanted any more. hand: runs the replica's calls. ran: kinds of them that ended.
    """

    number: int
    start: Callable[[], Replica]
    replica: Replica | None
    state: Literal["live", "running", "ended", "starting", "closing"]
    ends: deque[tuple[float, str]] = field(default_factory=deque)
    retired: str | None = None
    hand: Hand | None = None
    ran: set[Kind] = field(default_factory=set)

    @property
    def lives(self) -> bool:
        return self.state == "running" or self.idle

    @property
    def idle(self) -> bool:
        return self.state == "live" and self.replica is not None and self.replica.failure is None


class Restarting:
    """One or several replicas of the same programs as one executor. Thread-safe.

    starts: one function for each replica, called here, all at once, and again after every death; replicas that hold a process's only group of ranks
    (`Processes`) can be one at a time. A thread of its own looks after them and has the dead started anew while the others go on: `run` takes one
    that lives and waits only where there is none. A call that takes much longer than such calls do (`bounds.calls`) ends its replica. restarts, reruns:
    how many times a replica was started anew, and calls run again.
    Raises ConfigError for no replica and for replicas of different programs; what the first start of any raises.
    """

    inline = False

    def __init__(self, starts: Sequence[Callable[[], Replica]], bounds: Bounds) -> None:
        if not starts:
            raise ConfigError("no replica to run on; give a function that starts one")
        self.bounds, self.restarts, self.reruns = bounds, 0, 0
        self._usual = Usual(bounds.calls)
        self._changed = threading.Condition()
        self._closed = False
        self._wanted, self._start, self._numbers = len(starts), starts[0], count()
        self._places = [Place(next(self._numbers), start, None, "starting") for start in starts]
        with ThreadPoolExecutor(len(starts), "reelstep-start") as pool:
            started = [pool.submit(start) for start in starts]
        for place, future in zip(self._places, started, strict=True):
            if future.exception() is None:
                place.replica, place.state = future.result(), "live"
        try:
            self._rows = next(future.result().max_rows for future in started)
            for future in started:
                self._check_rows(future.result())
        except BaseException:
            for place in self._places:
                _close(place)
            raise
        self._keeper = threading.Thread(target=self._keep, name="reelstep-replicas", daemon=True)
        self._keeper.start()

    @property
    def max_rows(self) -> dict[Key, int]:
        return self._rows

    @property
    def capacity(self) -> int:
        with self._changed:
            return max(1, len(self._taking()))

    @property
    def wanted(self) -> int:
        """Replicas that there shall be; those that live now may be fewer."""
        return self._wanted

    def resize(self, wanted: int) -> None:
        """How many replicas there shall be: more are started with the first start, those that are too many end when they are idle. Returns at once."""
        if wanted < 1:
            raise ConfigError(f"{wanted} replicas; at least 1")
        with self._changed:
            self._wanted = wanted
            self._changed.notify_all()

    def run(self, model: str, calls: Sequence[Call]) -> list[Outputs]:
        """Outputs of each call. Waits for a replica that is being started.

        Raises Unavailable with all that was tried once no replica may be started again in the window, or when the calls have ended one more than
        `reruns` of them; what a replica raises otherwise.
        """
        ended: list[str] = []
        while True:
            place = self._claim()
            try:
                outputs = self._run(place, model, calls)
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

    def _run(self, place: Place, model: str, calls: Sequence[Call]) -> list[Outputs]:
        """On the place's replica. Raises what it raises, and Unavailable where the calls take too long; the replica has then ended."""
        replica = place.replica
        assert replica is not None
        kind = (model, *calls[0].key, sum(call.rows for call in calls))
        fresh = kind not in place.ran
        limit_s, began = self._usual.limit_s(kind, fresh), time.monotonic()
        place.hand = place.hand or Hand(f"reelstep-replica-{place.number}")
        future = place.hand.run(lambda: replica.run(model, calls), limit_s)
        seconds = time.monotonic() - began
        if not future.done():
            what = f"{kind[1]} {kind[2]} of {model!r} with {kind[3]} rows has run for {seconds:.1f} s on replica {place.number}"
            raise Unavailable(replica.give_up(f"{what} ({self._usual.note_cut(kind, fresh)})"), retry_after_s=RETRY_S)
        outputs = future.result()
        self._usual.note(kind, fresh, seconds)
        place.ran.add(kind)
        return outputs

    def close(self) -> None:
        """Stop all replicas. Waits for a call that is under way, and not for long for a start, which then ends what it started itself. Idempotent."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._keeper.join()
        with self._changed:
            self._changed.wait_for(lambda: all(place.state != "running" for place in self._places))
            self._changed.wait_for(lambda: all(place.state in ("live", "ended") for place in self._places), LAST_START_S)
            places = [place for place in self._places if place.state in ("live", "ended")]
        for place in places:
            _close(place)

    def _taking(self) -> list[Place]:
        """Those that take batches: that live and may stay, and only where there is none of them, those that live and shall go."""
        living = [place for place in self._places if place.lives]
        return [place for place in living if place.retired is None] or living

    def _claim(self) -> Place:
        """A replica that lives, for the caller alone: the one that has waited longest."""
        with self._changed:
            while not self._closed:
                for place in self._taking():
                    if place.idle:
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
        """The keeper's life: sees who has died while nothing ran, who shall go and who is missing; whatever takes long is done on threads of its own."""
        with self._changed:
            while not self._closed:
                for place in list(self._places):
                    self._look_at(place)
                self._count()
                self._changed.wait(LOOK_S)

    def _look_at(self, place: Place) -> None:
        replica = place.replica
        if place.state == "live" and replica is not None and replica.failure is not None:
            self._end(place, replica.failure)
        if place.retired is None and place.lives and replica is not None and replica.leaving is not None:
            place.retired = replica.leaving
            log.warning("replica %d shall go, another takes its place: %s", place.number, place.retired)
        if place.retired is None and place.state == "ended" and self._may_start(place):
            self._begin(place, "starting", self._restart)
        elif place.retired is not None and (place.state == "ended" or (place.state == "live" and self._enough())):
            self._begin(place, "closing", self._remove)

    def _count(self) -> None:
        """As many places that stay as are wanted."""
        staying = [place for place in self._places if place.retired is None]
        for _ in range(self._wanted - len(staying)):
            self._places.append(Place(next(self._numbers), self._start, None, "ended"))
        for place in sorted(staying, key=lambda place: ("ended", "starting", "live", "running").index(place.state))[: max(0, len(staying) - self._wanted)]:
            place.retired = f"{self._wanted} are wanted"

    def _enough(self) -> bool:
        return sum(place.lives for place in self._places if place.retired is None) >= self._wanted

    def _begin(self, place: Place, state: Literal["starting", "closing"], work: Callable[[Place], None]) -> None:
        place.state = state
        threading.Thread(target=work, args=(place,), name=f"reelstep-{state}", daemon=True).start()

    def _restart(self, place: Place) -> None:
        try:
            _close(place)
            place.replica = place.start()
            self._check_rows(place.replica)
        except Exception as error:  # ranks may fail with anything their programs do; whoever waits is told
            log.exception("replica %d did not start", place.number)
            why: str | None = f"did not start: {error}"
        else:
            why = None
            log.warning("replica %d was started", place.number)
        with self._changed:
            self.restarts += why is None
            late = self._closed and place.state == "starting"
        if late:
            _close(place)
        self._release(place, why)

    def _remove(self, place: Place) -> None:
        _close(place)
        with self._changed:
            self._places.remove(place)
            self._changed.notify_all()
        log.info("replica %d was closed: %s", place.number, place.retired)

    def _check_rows(self, replica: Replica) -> None:
        """All replicas, and the same one later, run the same."""
        if replica.max_rows != self._rows:
            raise ConfigError(f"a replica runs {replica.max_rows}, another {self._rows}; give all the same programs")


def _close(place: Place) -> None:
    if place.replica is not None:
        place.replica.close()
        place.replica = None
    if place.hand is not None:
        place.hand.close()
        place.hand = None
    place.ran.clear()


def _listed(reasons: Sequence[str]) -> str:
    return ", ".join(f"({number}) {why}" for number, why in enumerate(reasons, 1))
