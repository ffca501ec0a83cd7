"""Runs calls in the thread that asks, one batch at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reelstep.engine.request import Call
from reelstep.engine.runner import Outputs, Runner
from reelstep.engine.scheduler import Key


class Inline:
    """One runner per model, all on this process's device."""

    inline, capacity = True, 1

    def __init__(self, runners: Mapping[str, Runner]) -> None:
        self.runners = runners

    @property
    def max_rows(self) -> dict[Key, int]:
        return {(model, *key): rows for model, runner in self.runners.items() for key, rows in runner.max_batch.items()}

    def run(self, model: str, calls: Sequence[Call]) -> list[Outputs]:
        return self.runners[model].run(calls)
