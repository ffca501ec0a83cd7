"""Owns a device: calls in, outputs out. Knows programs, not requests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from reelstep.engine.request import Call

Outputs = Mapping[str, Tensor]
Executable = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


class Runner:
    """Runs calls of one loaded model. Calls of one key are stacked along their rows and split again.

    whole: of a rank, the keys that it runs without the others.
    """

    def __init__(
        self, executables: Mapping[tuple[str, str], Executable], max_batch: Mapping[tuple[str, str], int], whole: Collection[tuple[str, str]] = ()
    ) -> None:
        self.executables = executables
        self.max_batch = max_batch
        self.whole = whole

    def run(self, calls: Sequence[Call]) -> list[Outputs]:
        """Outputs of each call, in order. All calls have the same key; more rows than a batch holds run in several."""
        key = calls[0].key
        assert all(call.key == key for call in calls), f"a batch holds one key, got {[call.key for call in calls]}"
        if len(calls) == 1:
            return [self._run_rows(key, calls[0].inputs)]
        stacked = {name: torch.cat([call.inputs[name] for call in calls]) for name in calls[0].inputs}
        outputs = self._run_rows(key, stacked)
        rows = [call.rows for call in calls]
        parts = {name: value.split(rows) for name, value in outputs.items()}
        return [{name: parts[name][i] for name in parts} for i in range(len(calls))]

    def _run_rows(self, key: tuple[str, str], inputs: Mapping[str, Tensor]) -> Outputs:
        limit = self.max_batch[key]
        rows = len(next(iter(inputs.values())))
        if rows <= limit:
            return self.executables[key](inputs)
        chunks = [self.executables[key]({n: x[i : i + limit] for n, x in inputs.items()}) for i in range(0, rows, limit)]
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
