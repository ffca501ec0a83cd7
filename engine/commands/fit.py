"""Fit a solver or guidance to a model; without a name, list what can be fitted."""

from __future__ import annotations

import argparse

from reelstep.engine.commands import Command

EXAMPLES = "  reelstep fit\n  reelstep fit bns reel-tiny --nfe 5 -o bns_5.json\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="of that fit; all take MODEL, -o FILE and --help")


def run(args: argparse.Namespace) -> None:
    from reelstep.training.fits import FITS

    if args.name is None:
        print(FITS.listing())
    else:
        FITS[args.name](args.arguments)


COMMAND = Command(__doc__ or "", EXAMPLES, add_arguments, run)
