"""Which waiting calls step together, and how long a request will take. Plain Python: tickets, no tensors, no device.

The unit of scheduling is one network call. Calls of different requests with the same key (program and profile) share a batch whatever
step they are at, because time and guidance are inputs of each row. Cancelling and deadlines act between calls.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

Key = tuple[str, str, str]
"""Model, program, profile."""
Round = tuple[tuple[Key, int], ...]
"""Calls of one request that may run together: key and rows of each."""

MARGIN = 1.25
"""What is expected has to fit so many times. Where load rises more come than there are, and Python between the calls, encoding the files and the way to the
client come on top: without it, many that were expected to be in time would not be."""

SMOOTHING = 0.2  # weight of the newest call in the running mean of a key's seconds
MEMORY = 0.95  # what a batch weighs once another one has run, in the line of seconds over rows: twenty count, so one that was held up is soon outweighed


@dataclass(frozen=True)
class Ticket:
    """One waiting call. `slot` says which of its request's concurrent calls it is."""

    request_id: str
    slot: int
    key: Key
    rows: int
    priority: int  # smaller goes first
    deadline: float  # seconds on the clock of `now`; inf for none
    arrival: float
    number: int  # breaks ties in order of coming


@dataclass
class Estimate:
    """What a batch of one key takes: a running mean whatever its rows, and a line over the rows. weight, rows, ...: sums over the batches."""

    seconds: float = 0.0
    calls: int = 0
    weight: float = 0.0
    rows: float = 0.0
    rows_2: float = 0.0
    total_s: float = 0.0
    rows_s: float = 0.0

    def note(self, seconds: float, rows: int) -> None:
        self.seconds = seconds if not self.calls else (1 - SMOOTHING) * self.seconds + SMOOTHING * seconds
        self.calls += 1
        self.weight = MEMORY * self.weight + 1
        self.rows = MEMORY * self.rows + rows
        self.rows_2 = MEMORY * self.rows_2 + rows * rows
        self.total_s = MEMORY * self.total_s + seconds
        self.rows_s = MEMORY * self.rows_s + rows * seconds

    def of(self, rows: int) -> float:
        """Seconds of a batch of so many rows, infinite before any ran. On the least-squares line, of which neither the start nor the slope is negative;
        where all batches had as many rows, as long as those for fewer, and in proportion for more."""
        if not self.calls:
            return math.inf
        mean_rows, mean_s = self.rows / self.weight, self.total_s / self.weight
        spread = self.rows_2 / self.weight - mean_rows**2
        if spread <= 1e-9 * mean_rows**2:  # what rounding leaves of nothing
            return mean_s * max(1.0, rows / mean_rows)
        slope = (self.rows_s / self.weight - mean_rows * mean_s) / spread
        return mean_s + min(max(slope, 0.0), mean_s / mean_rows) * (rows - mean_rows)


@dataclass
class Scheduler:
    """The waiting calls and the policy.

    Among keys: a ticket that waited longer than `patience_s` goes first; then the best priority; then the key whose calls are the
    shortest. Short programs (text, picture, time) so let a newcomer reach the denoiser quickly, where it joins the others' batch; and a
    finished request is decoded before the next long step. Within a key: priority, deadline, arrival, until `max_rows` is full.
    at_once: rows that a replica runs at the same time, on parts of its mesh (`cfg`): whoever gets fewer leaves a part idle.
    """

    max_rows: Mapping[Key, int]
    at_once: int = 1
    patience_s: float = 1.0
    waiting: dict[Key, list[Ticket]] = field(default_factory=lambda: defaultdict(list))
    estimates: dict[Key, Estimate] = field(default_factory=lambda: defaultdict(Estimate))
    numbers: Iterator[int] = field(default_factory=count)

    def push(self, request_id: str, slot: int, key: Key, rows: int, priority: int, deadline: float, now: float) -> None:
        """Add a waiting call."""
        self.waiting[key].append(Ticket(request_id, slot, key, rows, priority, deadline, now, next(self.numbers)))

    def remove(self, request_id: str) -> None:
        """Forget every call of a request."""
        for key in list(self.waiting):
            self.waiting[key] = [t for t in self.waiting[key] if t.request_id != request_id]

    def next_batch(self, now: float, replicas: int = 1) -> list[Ticket]:
        """The calls to run now, all of one key; empty when nothing waits. They no longer wait afterwards.

        replicas: that are free: the batch is for one of them, and leaves the others as much, in rows that keep every part of one at work.
        """
        keys = [k for k, tickets in self.waiting.items() if tickets]
        if not keys:
            return []
        key = min(keys, key=lambda k: self._rank(k, now))
        queue = sorted(self.waiting[key], key=lambda t: (t.priority, t.deadline, t.number))
        batch, rows = [queue[0]], queue[0].rows
        share = sum(t.rows for t in queue) / replicas
        most = min(self.max_rows[key], math.ceil(share / self.at_once) * self.at_once)
        for ticket in queue[1:]:
            if rows + ticket.rows <= most:
                batch.append(ticket)
                rows += ticket.rows
        chosen = {t.number for t in batch}
        self.waiting[key] = [t for t in queue if t.number not in chosen]
        return batch

    def note(self, key: Key, seconds: float, rows: int) -> None:
        """Learn how long a batch of `key` took."""
        self.estimates[key].note(seconds, rows)

    def batch_s(self, key: Key, rows: int, replicas: int = 1) -> float:
        """Expected for so many waiting rows, cut evenly for the replicas; more than a batch holds run one batch after the other. Infinite before `key` ran."""
        whole, rest = divmod(math.ceil(rows / replicas), self.max_rows[key])
        estimate = self.estimates[key]
        return (whole * estimate.of(self.max_rows[key]) if whole else 0.0) + (estimate.of(rest) if rest else 0.0)

    def _rank(self, key: Key, now: float) -> tuple[float, int, float, float, int]:
        tickets = self.waiting[key]
        oldest = min(t.arrival for t in tickets)
        impatient = oldest if now - oldest > self.patience_s else float("inf")
        return impatient, min(t.priority for t in tickets), self.estimates[key].seconds, min(t.deadline for t in tickets), min(t.number for t in tickets)


def rounds_of(
    model: str,
    profile: str,
    evaluations: int,
    forwards: float,
    *,
    count: int = 1,
    picture: bool = False,
    tiles: int = 1,
    preview_every: int = 0,
    denoiser: str = "denoise",
) -> tuple[Round, ...]:
    """All that a request asks for, in turn, as its pipeline does; of a step cache as if it never skipped.

    evaluations: of the solver's table. forwards: rows of the denoiser for one output, evenly over the evaluations where guidance decides as it goes.
    tiles: that an output is decoded in. denoiser: the program.
    """
    first = (("encode_text", "any", 2), ("embed_time", "any", evaluations), *((("encode_image", "image", 1),) if picture else ()))
    decode = (("decode", profile, count),) * tiles
    rounds = [first]
    for j in range(evaluations):
        if preview_every and j and not j % preview_every:
            rounds.append(decode)
        branches = round(forwards * (j + 1) / evaluations) - round(forwards * j / evaluations)
        rounds.append(((denoiser, profile, 1),) * (branches * count))
    return tuple(tuple(((model, program, sizes), rows) for program, sizes, rows in calls) for calls in (*rounds, decode))


def usual(rounds: Sequence[Round]) -> Round:
    """What a request asks for most of the time: the denoiser's calls, after what is constant over the steps."""
    return rounds[min(1, len(rounds) - 1)]


def expected_s(mine: Sequence[Round], others: Sequence[Round], seconds: Callable[[Key, int], float]) -> float:
    """Seconds until `mine` are done, if in each of them every other that runs asks for its usual round too: calls of one key share a batch, batches follow each
    other, and whoever ends is followed by another like it.

    seconds: of a batch of so many rows; infinite where nobody knows, and then so is the result. Not in it: that there may be more or fewer later, priorities,
    and that the scheduler may prefer one key over another for a while.
    """
    always = rows_of(call for calls in others for call in calls)
    return sum(seconds(key, rows) for calls in mine for key, rows in (rows_of(calls) + always).items())


def first_in_time(options: Sequence[Sequence[Round]], others: Sequence[Round], seconds: Callable[[Key, int], float], left_s: float) -> int:
    """The place of the first of several ways to run a request that is expected to end within `left_s` with a margin; of the last one where none is. others,
    seconds: as above."""
    for place, rounds in enumerate(options):
        if MARGIN * expected_s(rounds, others, seconds) <= left_s:
            return place
    return len(options) - 1


def rows_of(calls: Iterable[tuple[Key, int]]) -> Counter[Key]:
    """Rows of each key."""
    rows: Counter[Key] = Counter()
    for key, number in calls:
        rows[key] += number
    return rows
