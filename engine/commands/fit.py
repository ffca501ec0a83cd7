"""Fit a solver or guidance to a model; without a name, list what can be fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from reelstep.engine.commands.table import command_of
from reelstep.registry import Registry

EXAMPLES = "  reelstep fit\n  reelstep fit bns reel-tiny --nfe 5 -o bns_5.json\n"


def table() -> Registry[Callable[[Sequence[str]], None]]:
    from reelstep.training.fits import FITS

    return FITS


COMMAND = command_of(__doc__ or "", EXAMPLES, table, "of that fit; all take MODEL, -o FILE and --help")
