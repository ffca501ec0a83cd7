"""A fleet of simulated replicas, each with the engine's own scheduler, on a simulated clock.

A replica does what `engine.loop.Engine` does on every tick: expire, take the scheduler's batch, run it, send the answers on. Only the clock, the seconds of a
batch and the pipelines' calls are not real. What the engine does not have (yet) is the simulation's own and named so: the router, saved states.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from reelstep.benchmarks.traces import Arrival
from reelstep.engine.scheduler import Key, Round, Scheduler, Ticket, first_in_time, usual
from reelstep.errors import ConfigError

Outcome = Literal["finished", "expired", "refused", "failed"]
"""failed: a server's error, known to live runs only."""
WARM_ROWS = (1, 4)
"""Of the batches that a replica has run before its first request where it chooses steps, as in the engine's warm-up."""


@dataclass(frozen=True)
class Policy:
    """What the engine is told and allowed; the scheduler is the same in all. max_running and max_queued are the engine's own limits per replica."""

    words: str
    max_running: int = 32
    max_queued: int = 256
    batching: bool = True
    deadlines: bool = True  # else the engine hears of none: neither order nor expiry follow them
    degrade: bool = False


POLICIES: Mapping[str, Policy] = {
    "scheduler": Policy("the engine as it is: batches, deadlines, priorities"),
    "fifo": Policy("one request at a time, one call at a time, in order of arrival", max_running=1, max_queued=287, batching=False, deadlines=False),
    "batching": Policy("batches, but nobody hears of deadlines and priorities", deadlines=False),
    "degrade": Policy("as scheduler, but a request that would be late starts with fewer steps of the menu, as one of quality `auto`", degrade=True),
}


@dataclass(frozen=True)
class Failures:
    """Replicas die at random moments, mostly in the middle of a call. Raises ConfigError.

    between_s: mean from a replica's start to its death, exponential. repair_s: until it starts again, empty. notice_s: until its requests go on elsewhere.
    checkpoint: rounds of calls between two saved states of a request, saving being free; 0 saves nothing.
    """

    between_s: float
    repair_s: float
    notice_s: float
    checkpoint: int
    seed: int

    def __post_init__(self) -> None:
        if not (self.between_s > 0 and 0 <= self.notice_s <= self.repair_s < math.inf and self.checkpoint >= 0):
            raise ConfigError(f"{self}: between_s is above 0, notice_s from 0 to repair_s, checkpoint 0 or more")


@dataclass(slots=True)
class Job:
    """One request. Times on the simulated clock. executed: calls begun for it, of which failures wasted `lost`."""

    number: int
    arrival_s: float
    deadline: float
    priority: int
    task: str
    steps: int
    asked_steps: int
    rounds: Sequence[Round]
    round: int = 0  # that runs now
    saved: int = 0  # that a saved state goes on with
    since: int = 0  # calls begun after that state
    open: int = 0  # calls of this round without an answer
    executed: int = 0
    lost: int = 0
    resumed: int = 0
    outcome: Outcome | None = None
    end_s: float = math.nan

    @property
    def in_time(self) -> bool:
        return self.outcome == "finished" and self.end_s <= self.deadline


@dataclass(slots=True)
class Replica:
    """One device and its engine. epoch: rises with every death, so that what was to happen before does not."""

    index: int
    scheduler: Scheduler
    running: dict[str, Job] = field(default_factory=dict)
    queued: list[tuple[int, float, float, int, Job]] = field(default_factory=list)  # a heap
    due: list[tuple[float, int, Job]] = field(default_factory=list)  # a heap of deadlines
    batch: list[Ticket] | None = None
    rows: int = 0
    seconds: float = 0.0  # of the batch
    began: float = 0.0
    epoch: int = 0
    up_since: float = 0.0


@dataclass
class Run:
    """What a simulation did. batches: how often each (key, rows) ran to its end. jobs_s: integral of the requests in the system over time.

    alive: (second, replicas alive from then on).
    """

    jobs: list[Job] = field(default_factory=list)
    span_s: float = 0.0
    up_s: float = 0.0  # of all replicas
    busy_s: float = 0.0  # of that, running batches
    lost_s: float = 0.0  # of that, in batches that a death cut short
    jobs_s: float = 0.0
    batches: Counter[tuple[Key, int]] = field(default_factory=Counter)
    alive: list[tuple[float, int]] = field(default_factory=list)


Event = tuple[float, int, Callable[[], None]]
"""When, a number that keeps the order, what."""


class Fleet:
    """Replicas of one model, and a router that gives a request to the replica with the fewest. Deterministic.

    seconds: of one batch of a key and so many rows, asked once for each batch. rounds: of a task and steps. menu: steps that `degrade` may choose, by task.
    """

    def __init__(
        self,
        max_rows: Mapping[Key, int],
        seconds: Callable[[Key, int], float],
        rounds: Callable[[str, int], Sequence[Round]],
        replicas: int,
        policy: Policy,
        failures: Failures | None = None,
        menu: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        if replicas < 1:
            raise ConfigError(f"a fleet of {replicas} replicas; it has 1 or more")
        self.max_rows = dict(max_rows) if policy.batching else dict.fromkeys(max_rows, 1)
        self.seconds, self.rounds, self.policy, self.failures, self.menu = seconds, rounds, policy, failures, menu or {}
        self.now = 0.0
        self.result = Run()
        self.replicas = [Replica(i, self._scheduler()) for i in range(replicas)]
        self.loads: list[float] = [0.0] * replicas  # requests of each; infinite for the dead
        self.lobby: list[Job] = []  # come while nobody lives
        self._events: list[Event] = []
        self._numbers = 0
        self._open = 0  # requests that have come and not ended
        self._awaited = False  # another one is to come
        self._changed: dict[int, Replica] = {}  # that may begin a batch now
        self._known_rounds: dict[tuple[str, int], Sequence[Round]] = {}

    def run(self, arrivals: Iterable[Arrival]) -> Run:
        """All of a trace, to the end of its last request. Call it once."""
        coming = iter(arrivals)
        self._expect(coming)
        self.result.alive.append((0.0, len(self.replicas)))
        for replica in self.replicas:
            self._doom(replica, random.Random(f"{self.failures.seed} {replica.index}") if self.failures else None)
        while self._events and (self._open or self._awaited):
            time = self._events[0][0]
            self.result.jobs_s += self._open * (time - self.now)
            self.now = time
            while self._events and self._events[0][0] == time:  # all that happens now, before anybody decides
                heapq.heappop(self._events)[2]()
            for replica in self._changed.values():
                self._tick(replica)
            self._changed.clear()
        for replica in self.replicas:
            if self.loads[replica.index] < math.inf:
                self.result.up_s += self.now - replica.up_since
        self.result.span_s = self.now
        return self.result

    def _scheduler(self) -> Scheduler:
        """Of a replica that starts."""
        made = Scheduler(self.max_rows)
        if self.policy.degrade:
            for key, most in self.max_rows.items():
                for rows in sorted({min(rows, most) for rows in WARM_ROWS}):
                    made.note(key, self.seconds(key, rows), rows)
        return made

    def _at(self, time: float, what: Callable[[], None]) -> None:
        self._numbers += 1
        heapq.heappush(self._events, (time, self._numbers, what))

    def _expect(self, coming: Iterator[Arrival]) -> None:
        arrival = next(coming, None)
        self._awaited = arrival is not None
        if arrival is not None:
            self._at(arrival.arrival_s, lambda: self._arrive(arrival, coming))

    def _arrive(self, arrival: Arrival, coming: Iterator[Arrival]) -> None:
        rounds = self._rounds(arrival.task, arrival.steps)
        deadline = math.inf if arrival.deadline_s is None else arrival.arrival_s + arrival.deadline_s
        job = Job(len(self.result.jobs), arrival.arrival_s, deadline, arrival.priority, arrival.task, arrival.steps, arrival.steps, rounds)
        self.result.jobs.append(job)
        self._open += 1
        self._route(job)
        self._expect(coming)

    def _rounds(self, task: str, steps: int) -> Sequence[Round]:
        if (task, steps) not in self._known_rounds:
            self._known_rounds[task, steps] = self.rounds(task, steps)
        return self._known_rounds[task, steps]

    def _route(self, job: Job) -> None:
        """To the replica with the fewest requests. Who comes anew is refused where even that one is full; who was resumed is not."""
        fewest = min(self.loads)
        if fewest == math.inf:
            self.lobby.append(job)
        elif fewest >= self.policy.max_running + self.policy.max_queued and not job.resumed:
            self._end(job, "refused")
        else:
            self._enqueue(job, self.replicas[self.loads.index(fewest)])

    def _enqueue(self, job: Job, replica: Replica) -> None:
        self.loads[replica.index] += 1
        heard = (job.priority, job.deadline) if self.policy.deadlines else (0, math.inf)
        heapq.heappush(replica.queued, (*heard, job.arrival_s, job.number, job))
        if heard[1] < math.inf:
            heapq.heappush(replica.due, (job.deadline, job.number, job))
        self._fill(replica)
        self._changed[replica.index] = replica

    def _fill(self, replica: Replica) -> None:
        """Free places go to the queued, by priority, deadline, arrival."""
        while replica.queued and len(replica.running) < self.policy.max_running:
            job = heapq.heappop(replica.queued)[-1]
            if job.outcome is None:
                replica.running[str(job.number)] = job
                if self.policy.degrade and job.round == 0:
                    self._shorten(job, replica)
                self._push(job, replica)

    def _shorten(self, job: Job, replica: Replica) -> None:
        """The most steps on the menu, at most what was asked, that are expected to be done in time, as the engine expects it; else the fewest."""
        options = [job.steps, *sorted((steps for steps in self.menu.get(job.task, ()) if steps < job.steps), reverse=True)]
        rounds = [self._rounds(job.task, steps) for steps in options]
        others = [usual(other.rounds) for other in replica.running.values() if other is not job]
        place = first_in_time(rounds, others, replica.scheduler.batch_s, job.deadline - self.now)
        job.steps, job.rounds = options[place], rounds[place]

    def _push(self, job: Job, replica: Replica) -> None:
        """The calls of a job's next round wait."""
        calls = job.rounds[job.round]
        job.open = len(calls)
        priority, deadline = (job.priority, job.deadline) if self.policy.deadlines else (0, math.inf)
        for slot, (key, rows) in enumerate(calls):
            replica.scheduler.push(str(job.number), slot, key, rows, priority, deadline, self.now)

    def _tick(self, replica: Replica) -> None:
        """Fail what is past its deadline, then run what the scheduler chooses."""
        if replica.batch is not None or self.loads[replica.index] == math.inf:
            return
        while replica.due and replica.due[0][0] <= self.now:
            job = heapq.heappop(replica.due)[-1]
            if job.outcome is None:
                self._leave(job, replica, "expired")
        batch = replica.scheduler.next_batch(self.now)
        if not batch:
            return
        for ticket in batch:
            job = replica.running[ticket.request_id]
            job.executed += 1
            job.since += 1
        rows = sum(ticket.rows for ticket in batch)
        seconds = self.seconds(batch[0].key, rows)
        replica.batch, replica.rows, replica.began, replica.seconds = batch, rows, self.now, seconds
        epoch = replica.epoch
        self._at(self.now + seconds, lambda: self._done(replica, epoch))

    def _done(self, replica: Replica, epoch: int) -> None:
        if epoch != replica.epoch:
            return
        batch = replica.batch
        assert batch is not None
        replica.batch = None
        self.result.busy_s += replica.seconds
        self.result.batches[batch[0].key, replica.rows] += 1
        replica.scheduler.note(batch[0].key, replica.seconds, replica.rows)
        for ticket in batch:
            job = replica.running[ticket.request_id]
            job.open -= 1
            if not job.open:
                self._advance(job, replica)
        self._changed[replica.index] = replica

    def _advance(self, job: Job, replica: Replica) -> None:
        job.round += 1
        if self.failures is not None and self.failures.checkpoint and job.round - job.saved >= self.failures.checkpoint:
            job.saved, job.since = job.round, 0
        if job.round == len(job.rounds):
            self._leave(job, replica, "finished")
        else:
            self._push(job, replica)

    def _leave(self, job: Job, replica: Replica, outcome: Outcome) -> None:
        self.loads[replica.index] -= 1
        if replica.running.pop(str(job.number), None) is not None and outcome == "expired":
            replica.scheduler.remove(str(job.number))
        self._end(job, outcome)
        self._fill(replica)

    def _end(self, job: Job, outcome: Outcome) -> None:
        assert job.outcome is None, f"request {job.number} ended twice"
        job.outcome, job.end_s = outcome, self.now
        self._open -= 1

    def _doom(self, replica: Replica, drawn: random.Random | None) -> None:
        """Fix the moment of a replica's death."""
        if self.failures is not None and drawn is not None:
            self._at(self.now + drawn.expovariate(1 / self.failures.between_s), lambda: self._die(replica, drawn))

    def _die(self, replica: Replica, drawn: random.Random) -> None:
        """The batch in the middle of which it happens is lost, and so is all since the last saved states."""
        assert self.failures is not None
        if replica.batch is not None:
            self.result.busy_s += self.now - replica.began
            self.result.lost_s += self.now - replica.began
        for job in replica.running.values():
            job.lost += job.since
            job.round, job.since = job.saved, 0
        homeless = [*replica.running.values(), *(entry[-1] for entry in sorted(replica.queued, key=lambda entry: entry[:4]) if entry[-1].outcome is None)]
        self.result.up_s += self.now - replica.up_since
        self.loads[replica.index] = math.inf
        replica.scheduler, replica.running, replica.queued, replica.due = self._scheduler(), {}, [], []
        replica.batch, replica.epoch = None, replica.epoch + 1
        self._note_alive()
        self._at(self.now + self.failures.notice_s, lambda: self._resume(homeless))
        self._at(self.now + self.failures.repair_s, lambda: self._repair(replica, drawn))

    def _resume(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            job.resumed += 1
            self._route(job)

    def _repair(self, replica: Replica, drawn: random.Random) -> None:
        replica.up_since, self.loads[replica.index] = self.now, 0.0
        self._note_alive()
        waiting, self.lobby = self.lobby, []
        for job in waiting:
            self._route(job)
        self._doom(replica, drawn)

    def _note_alive(self) -> None:
        self.result.alive.append((self.now, sum(load < math.inf for load in self.loads)))
