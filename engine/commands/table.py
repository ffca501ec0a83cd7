"""Commands that run an entry of a table by its name, and list the table without one."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from reelstep.engine.commands import Command
from reelstep.registry import Registry


def command_of(text: str, examples: str, table: Callable[[], Registry[Callable[[Sequence[str]], None]]], arguments: str) -> Command:
    """table: gives it when the command runs. arguments: help for those that an entry takes."""

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("name", nargs="?", metavar="NAME")
        parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help=arguments)

    def run(args: argparse.Namespace) -> None:
        entries = table()
        if args.name is None:
            print(entries.listing())
        else:
            entries[args.name](args.arguments)

    return Command(text, examples, add_arguments, run)
