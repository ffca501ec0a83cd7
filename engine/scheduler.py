"""Which waiting calls step together. Plain Python: tickets, no tensors, no device.

The unit of scheduling is one network call. Calls of different requests with the same key (program and profile) share a batch whatever
step they are at, because time and guidance are inputs of each row. Cancelling and deadlines act between calls.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count

Key = tuple[str, str, str]
"""Model, program, profile."""

SMOOTHING = 0.2  # weight of the newest call in the running mean of a key's seconds


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
    """Running mean of what a call of one key takes."""

    seconds: float = 0.0
    calls: int = 0

    def note(self, seconds: float) -> None:
        self.seconds = seconds if not self.calls else (1 - SMOOTHING) * self.seconds + SMOOTHING * seconds
        self.calls += 1


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

    def note(self, key: Key, seconds: float) -> None:
        """Learn how long a call of `key` took."""
        self.estimates[key].note(seconds)

    def _rank(self, key: Key, now: float) -> tuple[float, int, float, float, int]:
        tickets = self.waiting[key]
        oldest = min(t.arrival for t in tickets)
        impatient = oldest if now - oldest > self.patience_s else float("inf")
        return impatient, min(t.priority for t in tickets), self.estimates[key].seconds, min(t.deadline for t in tickets), min(t.number for t in tickets)
