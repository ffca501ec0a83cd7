"""Run a benchmark; without a name, list them."""

from __future__ import annotations

import argparse

from reelstep.engine.commands import Command

EXAMPLES = "  reelstep bench\n  reelstep bench engine --json engine.json\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="of that benchmark; all take --json FILE and --help")


def run(args: argparse.Namespace) -> None:
    from reelstep.benchmarks import BENCHMARKS

    if args.name is None:
        print(BENCHMARKS.listing())
    else:
        BENCHMARKS[args.name](args.arguments)


COMMAND = Command(__doc__ or "", EXAMPLES, add_arguments, run)
