"""The command line, a file for each command: its text, its options, what it does. It imports what it needs when it runs, so that help is quick."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from reelstep.registry import Registry

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


@dataclass(frozen=True)
class Command:
    text: str
    """What it does."""
    examples: str
    """Lines for the end of its help."""
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
    """Raises ReelstepError; `reelstep.__main__` makes a line and an exit status of it."""

    def add_to(self, subparsers: Subparsers, name: str) -> None:
        parser = subparsers.add_parser(
            name, help=self.text, description=self.text, epilog=f"examples:\n{self.examples}", formatter_class=argparse.RawDescriptionHelpFormatter
        )
        parser.set_defaults(run=self.run)
        self.add_arguments(parser)


COMMANDS: Registry[Command] = Registry(
    "command",
    {
        "compile": "reelstep.engine.commands.compile:COMMAND",
        "finalize": "reelstep.engine.commands.finalize:COMMAND",
        "sign": "reelstep.engine.commands.sign:COMMAND",
        "keygen": "reelstep.engine.commands.keygen:COMMAND",
        "inspect": "reelstep.engine.commands.inspect:COMMAND",
        "plan": "reelstep.engine.commands.plan:COMMAND",
        "serve": "reelstep.engine.commands.serve:COMMAND",
        "generate": "reelstep.engine.commands.generate:COMMAND",
        "lora": "reelstep.engine.commands.lora:COMMAND",
        "sample": "reelstep.engine.commands.sample:COMMAND",
        "fit": "reelstep.engine.commands.fit:COMMAND",
        "bench": "reelstep.engine.commands.bench:COMMAND",
    },
)
