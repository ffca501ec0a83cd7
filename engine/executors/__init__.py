"""Where ranks live. `inline` runs in the process that asks; processes and clusters answer the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from reelstep.engine.request import Call
from reelstep.engine.runner import Outputs
from reelstep.engine.scheduler import Key

LOOK_S = 0.1
"""How often it is looked whether what runs elsewhere lives."""
RETRY_S = 5.0
"""After which a caller of a lost replica may come again."""


class Executor(Protocol):
    """Runs batches of calls, each of one model and one key."""

    @property
    def max_rows(self) -> dict[Key, int]:
        """Rows that one batch may have, for every key it can run."""
        ...

    inline: bool
    """Whether the caller's own thread does the work: a caller that waits on another one gains nothing."""

    @property
    def capacity(self) -> int:
        """Batches that it runs at once now, each on a replica of its own; at least 1, so that a caller hears what became of the last one."""
        ...

    def run(self, model: str, calls: Sequence[Call]) -> list[Outputs]:
        """Outputs of each call, in order. Blocks until they are there. Called from as many threads as `capacity` says."""
        ...
