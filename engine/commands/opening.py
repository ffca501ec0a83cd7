"""Bundles become an engine of this process, for `serve` and `sample`."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from reelstep.engine.commands.options import PRECISIONS, cache_dir, tell_stage, trusted_keys

if TYPE_CHECKING:
    from reelstep.engine.executors.replicas import Elsewhere
    from reelstep.engine.resolve import Engine


def load_engine(
    args: argparse.Namespace,
    bundles: list[Path],
    max_running: int,
    max_queued: int,
    loras: dict[str, Path],
    elsewhere: Elsewhere | None = None,
    checkpoints: tuple[Path, int] | None = None,
) -> Engine:
    with all_kept():
        from reelstep.engine.loop import open_engine
    from reelstep.parallel.mesh import Mesh

    return open_engine(
        bundles,
        cache=cache_dir(args),
        backend=args.backend,
        precision=PRECISIONS.get(args.precision),
        max_running=max_running,
        max_queued=max_queued,
        progress=tell_stage,
        trusted=trusted_keys(args),
        mesh=Mesh.parse(args.mesh) if args.mesh else None,
        loras=loras,
        elsewhere=elsewhere,
        checkpoints=checkpoints,
    )


@contextmanager
def all_kept() -> Iterator[None]:
    """For imports of what stays to the end: to look for garbage takes a third of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
