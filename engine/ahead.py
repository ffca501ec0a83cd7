"""A bundle opened for one request, while the engine that will run it is still imported: torch alone takes longer than the engines take to open.

So nothing that is imported here, or used before torch is there, may import torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from reelstep.compiler.bundle import Bundle
from reelstep.compiler.load import Later, Progress, load_later
from reelstep.compiler.program import Precision
from reelstep.engine.resolve import Ask
from reelstep.engine.scheduler import rounds_of, rows_of

if TYPE_CHECKING:
    from reelstep.compiler.signing import PublicKey

STEPS = 2
"""Of a request that says nothing of steps: more than one evaluate the times of all in one call, and one call of the denoiser opens it for all of them."""


@dataclass(frozen=True)
class Ahead:
    """engines: by (program, profile), each made when it is first called unless it was found in the cache."""

    bundle: Bundle
    engines: Mapping[tuple[str, str], Later]


def open_ahead(
    path: Path, ask: Ask, *, cache: Path, backend: str | None, precision: Precision | None, progress: Progress, trusted: Sequence[PublicKey]
) -> Ahead:
    """Returns at once; beside it, what the request will probably call is opened, as far as the cache has it. A wrong guess costs time alone, and what cannot
    be opened says so when it is called. Raises as `Bundle.open` and `load`."""
    bundle = Bundle.open(path, trusted)
    engines = load_later(bundle, cache, backend, precision, progress)
    guess = [(engines[key], rows) for key, rows in likely(bundle, ask) if key in engines]
    Thread(target=_open, args=(guess,), name="reelstep-ahead").start()
    return Ahead(bundle, engines)


def likely(bundle: Bundle, ask: Ask) -> list[tuple[tuple[str, str], int]]:
    """Programs at profiles, in the order of their first call, and rows of a call, if the request is guided unless it or the model says otherwise."""
    guided = ask.guidance != "none" and ask.scale not in (0, 1) and not bundle.settings.get("distilled")
    limits, profile = bundle.settings["limits"], "image" if ask.frames == 1 else "video"
    steps, count = min(ask.steps or STEPS, limits["max_steps"]), min(ask.count or 1, limits["max_count"])  # more will be refused
    frames = ask.frames or max(each["frames"] for each in bundle.settings["defaults"].values())
    tiles = 1 if frames <= bundle.settings["tile_frames"] * bundle.settings["temporal_stride"] else 2  # or more: it matters whether rows are several
    rounds = rounds_of(bundle.plan.model, profile, steps, steps * (2 if guided else 1), count=count, picture=ask.image is not None, tiles=tiles)
    return [((program, sizes), rows) for (_, program, sizes), rows in {key: rows for calls in rounds for key, rows in rows_of(calls).items()}.items()]


def _open(engines: Iterable[tuple[Later, int]]) -> None:
    for engine, rows in engines:
        with suppress(Exception):
            if engine.found:
                engine.open(rows)
