"""Sign a bundle: its manifest, and by the hashes there every file of it."""

from __future__ import annotations

import argparse

from reelstep.engine.commands import Command
from reelstep.engine.commands.options import parse_path

EXAMPLES = "  reelstep sign reel-tiny.reel --key release.key\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=parse_path, metavar="BUNDLE")
    parser.add_argument("--key", type=parse_path, required=True, metavar="KEY", help="the private one of `reelstep keygen`")


def run(args: argparse.Namespace) -> None:
    from reelstep.compiler.bundle import sign_bundle
    from reelstep.compiler.signing import read_private_key

    bundle = sign_bundle(args.bundle, read_private_key(args.key))
    print(f"{bundle.path}  signed by {bundle.signed_by}")


COMMAND = Command(__doc__ or "", EXAMPLES, add_arguments, run)
