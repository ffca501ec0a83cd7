"""A model's programs become a bundle: capture, passes, plan, files, engines."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reelstep.compiler.backends import BACKENDS
from reelstep.compiler.bundle import Bundle, Captured, write_bundle
from reelstep.compiler.capture import capture
from reelstep.compiler.cost import graph_flops, graph_parameters
from reelstep.compiler.graphs import dump_graph, ops_of
from reelstep.compiler.load import Progress, check_precision, load, silent
from reelstep.compiler.passes import apply_passes
from reelstep.compiler.plan import Plan, ProgramPlan
from reelstep.compiler.program import Precision, Profile, Program
from reelstep.compiler.signature import Signature
from reelstep.compiler.skus import SKUS
from reelstep.errors import ConfigError


def compile_model(
    *,
    model: str,
    version: str,
    settings: Mapping[str, Any],
    programs: Sequence[Program],
    backend: str,
    precision: Precision | None = None,
    out: Path,
    solvers: Mapping[str, Any],
    fitted: Mapping[str, Any] | None = None,
    card: str,
    cache: Path | None = None,
    progress: Progress = silent,
) -> Bundle:
    """Write the bundle `out` and give it back, opened and verified.

    settings, solvers, fitted: plain JSON values. precision: the backend's default here if None. cache: if given, engines are built
    into it, so that the first load is quick. Raises ConfigError, CompileError, StorageError, NotFound (backend).
    """
    chosen = BACKENDS[backend]
    wanted, reason = (precision, "asked for") if precision else chosen.default_precision()
    check_precision(chosen, wanted)
    pairs = [(program, profile) for program in programs for profile in program.profiles]
    _check_unique(pairs)
    captured: list[Captured] = []
    plans: list[ProgramPlan] = []
    for done, (program, profile) in enumerate(pairs):
        progress(f"capture: {program.name} {profile.name}", done, len(pairs) + 1)
        item, choices = _capture(program, profile, wanted)
        captured.append(item)
        plans.append(choices)
    sku = SKUS["cpu"]
    plan = Plan(model, version, backend, sku.name, sku.arch, {}, wanted, reason, tuple(plans))
    progress(f"write {out}", len(pairs), len(pairs) + 1)
    write_bundle(out, plan=plan, captured=tuple(captured), settings=settings, solvers=solvers, fitted=fitted or {}, card=card)
    bundle = Bundle.open(out)
    if cache is not None:
        load(bundle, cache, progress=progress)
    return bundle


def _capture(program: Program, profile: Profile, precision: Precision) -> tuple[Captured, ProgramPlan]:
    exported, applied = apply_passes(capture(program, profile))
    item = Captured(Signature.of(program, profile), exported, dump_graph(exported))
    plan = ProgramPlan(
        program=program.name,
        profile=profile.name,
        graph_hash=hashlib.sha256(item.graph).hexdigest(),
        ops=ops_of(exported),
        parameters=graph_parameters(exported),
        flops=graph_flops(exported),
        max_batch=profile.max_batch,
        keep_f32=program.keep_f32,
        precision="float32" if program.keep_f32 else precision,
        passes=applied,
    )
    return item, plan


def _check_unique(pairs: Sequence[tuple[Program, Profile]]) -> None:
    names = [(program.name, profile.name) for program, profile in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise ConfigError(f"programs and profiles need distinct names; twice: {twice}" if twice else "a model needs at least one program with one profile")
