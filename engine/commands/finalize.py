"""Build the native engines of a bundle on the machine that will run it. What is in the cache stays, so it may be stopped and run again."""

from __future__ import annotations

import argparse

from reelstep.engine.commands import Command
from reelstep.engine.commands.options import PRECISIONS, add_engine_options, cache_dir, parse_path, tell_stage, trusted_keys

EXAMPLES = "  reelstep finalize reel-tiny.reel\n  reelstep finalize reel-tiny.reel --require-signature release.pub --cache engines\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=parse_path, metavar="BUNDLE")
    add_engine_options(parser)


def run(args: argparse.Namespace) -> None:
    from reelstep.compiler.bundle import Bundle
    from reelstep.compiler.finalize import explain, finalize

    bundle, cache = Bundle.open(args.bundle, trusted_keys(args)), cache_dir(args)
    done = finalize(bundle, cache, args.backend, PRECISIONS.get(args.precision), tell_stage)
    print(explain(done, cache), end="")


COMMAND = Command(__doc__ or "", EXAMPLES, add_arguments, run)
