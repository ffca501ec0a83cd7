"""A bundle becomes engines."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from reelstep.compiler.backends import BACKENDS, Backend, Executable
from reelstep.compiler.bundle import Bundle
from reelstep.compiler.program import Precision
from reelstep.errors import CompileError

Progress = Callable[[str, int, int], None]
"""Called with what begins, how many steps are done, and how many there are."""


def silent(stage: str, done: int, total: int) -> None:
    """Nobody watches."""


def load(
    bundle: Bundle, cache: Path | None, backend: str | None = None, precision: Precision | None = None, progress: Progress = silent
) -> Mapping[tuple[str, str], Executable]:
    """An executable for every (program, profile) of the bundle.

    backend, precision: the plan's if None; with another backend, that one's default precision. Programs that the plan keeps
    in float32 stay there. Raises NotFound for an unknown backend, CompileError if this machine cannot run the choice.
    """
    name = backend or bundle.plan.backend
    chosen = BACKENDS[name]
    default = bundle.plan.precision if name == bundle.plan.backend else chosen.default_precision()[0]
    wanted = precision or default
    check_precision(chosen, wanted)
    if chosen.runs and not bundle.has_weights:
        raise CompileError(f"bundle {bundle.path} has no weights (it was compiled on the meta device); only backend 'null' can load it")
    engines: dict[tuple[str, str], Executable] = {}
    for done, (key, signature) in enumerate(bundle.signatures.items()):
        progress(f"{name}: {key[0]} {key[1]}", done, len(bundle.signatures))
        own: Precision = "float32" if bundle.plan.program(*key).keep_f32 else wanted
        engines[key] = chosen.build(partial(bundle.program, *key), signature, own, cache, engine_key(bundle, *key, own))
    progress(f"{name}: ready", len(engines), len(engines))
    return engines


def check_precision(backend: Backend, precision: Precision) -> None:
    if precision not in backend.precisions:
        raise CompileError(f"backend {backend.name!r} cannot run {precision} on this machine; it can run {', '.join(backend.precisions)}")


def engine_key(bundle: Bundle, program: str, profile: str, precision: Precision) -> str:
    """What an engine depends on besides the backend and the machine: graph, weights, choices."""
    return hashlib.sha256("\n".join([bundle.plan.hash, bundle.weights_hash, program, profile, precision]).encode()).hexdigest()
