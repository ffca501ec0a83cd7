"""Run a benchmark; without a name, list them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from reelstep.engine.commands.table import command_of
from reelstep.registry import Registry

EXAMPLES = "  reelstep bench\n  reelstep bench engine --json engine.json\n"


def table() -> Registry[Callable[[Sequence[str]], None]]:
    from reelstep.benchmarks import BENCHMARKS

    return BENCHMARKS


COMMAND = command_of(__doc__ or "", EXAMPLES, table, "of that benchmark; all take --json FILE and --help")
