"""What of a bundle can only be made where it will run, made there ahead of time: the native engines of its backend.

Each engine goes into the cache as soon as it is built, under a name that says what it was made of and for: so a second run finds it, and
one that was killed goes on where it stopped.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reelstep.compiler.backends import BACKENDS, Backend
from reelstep.compiler.bundle import Bundle
from reelstep.compiler.load import (
    NotInCacheError,
    Progress,
    build_engine,
    check_memory,
    check_weights,
    choose,
    in_gb,
    not_read,
    silent,
    telling,
    weights_of_engines,
)
from reelstep.compiler.program import Precision
from reelstep.compiler.skus import SKUS
from reelstep.compiler.storage import check_writable, free_bytes, watch_seals
from reelstep.errors import CompileError, StorageError

Key = tuple[str, str]


@dataclass(frozen=True)
class Finalized:
    """What was done for one program at one profile. stateless: its backend compiles nothing ahead, so there was nothing to do."""

    program: str
    profile: str
    state: Literal["built", "rebuilt", "cached", "stateless"]
    seconds: float
    engine_bytes: int

    def __str__(self) -> str:
        notes = {"rebuilt": "what was in the cache was damaged or not made here", "stateless": "nothing to compile ahead"}
        note = f"  ({notes[self.state]})" if self.state in notes else ""
        return f"{self.program} {self.profile}  {self.state}  {self.seconds:.2f} s  {self.engine_bytes / 1e6:.1f} MB{note}"


def finalize(
    bundle: Bundle, cache: Path, backend: str | None = None, precision: Precision | None = None, progress: Progress = silent
) -> tuple[Finalized, ...]:  # fmt: skip
    """Build every engine of the bundle that `cache` lacks for this machine. In the order of the plan.

    backend, precision: as for `load`. Raises CompileError if this machine is not what the bundle is for or has too little memory, or for a mesh's bundle, and
    StorageError if `cache` cannot be written or its disk has too little room (where engines hold their weights), all before anything is built; and whatever
    the backend raises.
    """
    check_weights(bundle, BACKENDS[backend or bundle.plan.backend])
    if bundle.plan.mesh:
        text = f"was planned for mesh {bundle.plan.mesh_name}: its ranks build their own engines when it is opened, so there is nothing to finalize"
        raise CompileError(f"{bundle.path} {text}. Open it with `reelstep serve {bundle.path} --mesh {bundle.plan.mesh_name}`")
    chosen, wanted = choose(bundle, backend, precision)
    check_memory(bundle, chosen, wanted)
    found: dict[Key, Finalized] = {}
    missing: dict[Key, Sequence[Path]] = {}
    for done, key in enumerate(bundle.signatures):
        progress(f"look for {key[0]} {key[1]}", done, len(bundle.signatures))
        looked = _look(bundle, key, chosen, wanted, cache)
        if isinstance(looked, Finalized):
            found[key] = looked
        else:
            missing[key] = looked
    if missing:
        check_writable(cache)
    if not chosen.weights_apart:
        _check_room(bundle, list(missing), wanted, cache)
    for done, (key, damaged) in enumerate(missing.items()):
        stage = f"{chosen.name}: build {key[0]} {key[1]}"
        progress(stage, done, len(missing))
        found[key] = _build(bundle, key, telling(chosen, progress, stage, done, len(missing)), wanted, cache, damaged)
    progress(f"{chosen.name}: ready", len(missing), len(missing))
    return tuple(found[key] for key in bundle.signatures)


def _look(bundle: Bundle, key: Key, chosen: Backend, wanted: Precision, cache: Path) -> Finalized | Sequence[Path]:
    """The engine in the cache, loaded to see that it can be; else the damaged files that lie there."""
    began = time.monotonic()
    with watch_seals() as seals, suppress(NotInCacheError):
        build_engine(bundle, key, chosen, wanted, cache, not_read)
        if seals:
            return Finalized(*key, "cached", time.monotonic() - began, _size([path for path, _ in seals]))
    return [path for path, what in seals if what == "damaged"] if seals else Finalized(*key, "stateless", 0.0, 0)


def _build(bundle: Bundle, key: Key, chosen: Backend, wanted: Precision, cache: Path, damaged: Sequence[Path]) -> Finalized:
    began = time.monotonic()
    for path in damaged:  # it was warned of
        with suppress(OSError):
            path.unlink()
    with watch_seals() as seals:
        build_engine(bundle, key, chosen, wanted, cache)
    made = [path for path, what in seals if what == "made"]
    return Finalized(*key, "rebuilt" if damaged else "built" if made else "cached", time.monotonic() - began, _size([path for path, _ in seals]))


def _size(paths: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in {*paths})


def _check_room(bundle: Bundle, missing: Sequence[Key], wanted: Precision, cache: Path) -> None:
    """Engines hold their weights, each its own: less room than that is too little. More may be needed, which only the backend finds out."""
    needs = weights_of_engines(bundle, missing, wanted)
    total, largest = sum(needs.values()), max(needs, key=lambda key: needs[key], default=("", ""))
    memory = SKUS[bundle.plan.sku].memory_bytes  # 0 where it is not known
    if memory and needs.get(largest, 0) > memory:
        text = f"{' '.join(largest)} holds {in_gb(needs[largest])} of weights, and {bundle.plan.sku} has {in_gb(memory)} of memory"
        raise CompileError(f"{text}; compile with a smaller --precision, or for a SKU or mesh with more")
    if total > (free := free_bytes(cache)):
        names = ", ".join(" ".join(key) for key in missing)
        text = f"{cache} has {in_gb(free)} free, and the engines to build ({names}) hold {in_gb(total)} of weights"
        raise StorageError(f"{text}. Nothing was built; free some space or choose a larger disk with --cache")


def explain(done: Sequence[Finalized], cache: Path) -> str:
    """A line for each program, and what it comes to."""
    built = [each for each in done if each.state in ("built", "rebuilt")]
    cached = [each for each in done if each.state == "cached"]
    lines = [*map(str, done)]
    if built:
        lines.append(f"{len(built)} built in {sum(each.seconds for each in built):.1f} s, {len(cached)} from the cache {cache}")
    elif cached:
        lines.append(f"nothing to do: all {len(cached)} engines are in {cache}")
    else:
        lines.append("nothing to do: this backend compiles nothing ahead")
    return "\n".join(lines) + "\n"
