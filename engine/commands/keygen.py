"""Make a pair of ed25519 keys: NAME.key signs bundles and is secret, NAME.pub goes to those who serve them."""

from __future__ import annotations

import argparse
from pathlib import Path

from reelstep.engine.commands import Command
from reelstep.errors import ConfigError

EXAMPLES = "  reelstep keygen release\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", type=Path, metavar="NAME")


def run(args: argparse.Namespace) -> None:
    from reelstep.compiler.signing import make_keys

    if args.name.name in ("", ".."):
        raise ConfigError(f"{str(args.name)!r} is no name for a pair of keys; give a file's name without a suffix, such as `release`")
    private, public = (args.name.with_name(args.name.name + suffix) for suffix in (".key", ".pub"))
    made = make_keys(private, public)
    print(f"{private}  keep it secret: who has it signs in your name\n{public}  give it to those who serve your bundles: {made}")


COMMAND = Command(__doc__ or "", EXAMPLES, add_arguments, run)
