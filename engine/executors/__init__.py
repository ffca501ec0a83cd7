"""Where ranks live. `inline` runs in the engine's own thread; processes and clusters answer the same two methods."""

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
    """Runs a batch of calls of one model and one key."""

    @property
    def max_rows(self) -> dict[Key, int]:
        """Rows that one batch may have, for every key it can run."""
        ...

    def run(self, model: str, calls: Sequence[Call]) -> list[Outputs]:
        """Outputs of each call, in order. Blocks until they are there."""
        ...
