"""A model's programs become a bundle: capture, passes, plan, files, engines."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reelstep.compiler.backends import BACKENDS
from reelstep.compiler.bundle import Bundle
from reelstep.compiler.capture import capture
from reelstep.compiler.cost import graph_flops, graph_parameters
from reelstep.compiler.cubins import with_kernels
from reelstep.compiler.graphs import asked_at, dump_graph, ops_of, refused
from reelstep.compiler.load import Progress, check_precision, on_this_machine, silent
from reelstep.compiler.passes import apply_passes
from reelstep.compiler.plan import Plan, ProgramPlan, Quality, RankPlan
from reelstep.compiler.program import Precision, Profile, Program
from reelstep.compiler.quantisation import Quantisation, quantise_programs
from reelstep.compiler.signature import Signature
from reelstep.compiler.skus import SKUS, Sku, is_gpu
from reelstep.compiler.write_bundle import Captured, write_bundle
from reelstep.errors import CompileError, ConfigError
from reelstep.parallel.mesh import Mesh

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def compile_model(
    *,
    model: str,
    version: str,
    settings: Mapping[str, Any],
    programs: Sequence[Program],
    backend: str,
    sku: str = "cpu",
    precision: Precision | None = None,
    out: Path,
    solvers: Mapping[str, Any],
    fitted: Mapping[str, Any] | None = None,
    card: str,
    cache: Path | None = None,
    quantisation: Quantisation | None = None,
    mesh: Mesh | None = None,
    ranks: Sequence[RankPlan] = (),
    portable: bool = False,
    progress: Progress = silent,
) -> Bundle:
    """Write the bundle `out` and give it back, opened and verified.

    settings, solvers, fitted: plain JSON values. sku: what it shall run on; this machine need not be one. precision: the backend's default here if
    None, or for another machine, and a portable bundle for GPUs, the SKU's. cache: of compiled kernels; engines are for `load` or `finalize` to make.
    quantisation: if given, nothing is written unless its limits are met. mesh, ranks: that the bundle is for, with its `plan_ranks`. Raises ConfigError,
    CompileError, StorageError, NotFound (backend, SKU).
    """
    target = SKUS[sku]
    wanted, reason = choose_precision(backend, target, precision, mesh, portable)  # before the work
    if quantisation is not None:
        quantisation.check(backend, target)
    captured, drafts = capture_all(programs, progress, BACKENDS[backend].keeps(target.arch))
    for item in captured:  # here, and not by whoever opens the bundle
        if (why := refused(json.loads(item.graph))) is not None:
            raise CompileError(f"program {item.signature.program!r} at profile {item.signature.profile!r} {why}{asked_at(item.exported, why)}")
    quality = None
    if quantisation is not None:
        here = BACKENDS[backend].runs and not is_gpu(target.arch) and on_this_machine(sku)  # requests run on the CPU, also where a GPU is
        captured, drafts, quality = quantise_programs(
            captured, drafts, quantisation, backend if here else "eager", wanted if here else "float32", progress
        )  # fmt: skip
    plan = make_plan(model, version, backend, target, wanted, reason, drafts, quality)
    plan = with_kernels(replace(plan, mesh=mesh.axes if mesh else {}, ranks=tuple(ranks)), cache)
    progress(f"write {out}", len(drafts), len(drafts) + 1)
    write_bundle(out, plan=plan, captured=captured, settings=settings, solvers=solvers, fitted=fitted or {}, card=card)
    return Bundle.open(out)


def choose_precision(backend: str, sku: Sku, precision: Precision | None, mesh: Mesh | None = None, portable: bool = False) -> tuple[Precision, str]:
    """The precision of a plan, and why. portable: of engines for a GPU that are built elsewhere or later, whatever this machine can build.

    Raises NotFound (backend), ConfigError for a backend that does not run on the SKU or not on its mesh, CompileError for a precision.
    """
    chosen = BACKENDS[backend].on(sku.arch)
    if not chosen.runs_on(sku.arch):
        fitting = sorted(name for name, other in BACKENDS.items() if other.runs_on(sku.arch))
        raise ConfigError(f"backend {backend!r} does not run on {sku.name}; choose {' or '.join(fitting)}, or another SKU")
    if mesh is not None and (lacks := chosen.refuses(mesh, sku.arch)):
        raise ConfigError(f"backend {backend!r} on mesh {mesh} of {sku.name}: {lacks}")
    if mesh is not None and not is_gpu(sku.arch):
        if precision == "bfloat16":
            raise CompileError(f"bfloat16 on mesh {mesh} of {sku.name}: ranks on a CPU run float32; leave --precision out")
        return "float32", "ranks on a CPU run it"
    if on_this_machine(sku.name) and not (is_gpu(sku.arch) and (portable or mesh is not None)):
        wanted, reason = (precision, "asked for") if precision else chosen.default_precision()
        check_precision(chosen, wanted)
        return wanted, reason
    if precision == "bfloat16" and not sku.bf16:
        raise CompileError(f"{sku.name} ({sku.arch}) has no native bfloat16; use float32")
    if precision:
        return precision, "asked for"
    return ("bfloat16", f"{sku.name} has native bfloat16") if sku.bf16 else ("float32", f"{sku.name} has no native bfloat16")


def capture_all(programs: Sequence[Program], progress: Progress = silent, keep: Iterable[str] = ()) -> tuple[tuple[Captured, ...], tuple[ProgramPlan, ...]]:
    """Every program at every profile after the passes, and what is known of it before a precision is chosen. keep: ops that stay whole.

    Raises ConfigError, CompileError.
    """
    pairs = [(program, profile) for program in programs for profile in program.profiles]
    _check_unique(pairs)
    made = []
    for done, (program, profile) in enumerate(pairs):
        progress(f"capture: {program.name} {profile.name}", done, len(pairs) + 1)
        made.append(_capture(program, profile, keep))
    return tuple(item for item, _ in made), tuple(draft for _, draft in made)


def make_plan(
    model: str, version: str, backend: str, sku: Sku, precision: Precision, reason: str, drafts: Sequence[ProgramPlan], quality: Quality | None = None
) -> Plan:
    plans = tuple(replace(draft, precision=draft.own_precision(precision)) for draft in drafts)
    return Plan(model, version, backend, sku.name, sku.arch, {}, precision, reason, plans, quality)


def _capture(program: Program, profile: Profile, keep: Iterable[str]) -> tuple[Captured, ProgramPlan]:
    with collector_off():
        exported = capture(program, profile)
        try:
            return _planned(program, profile, *apply_passes(exported, keep))
        except CompileError as error:
            raise CompileError(f"program {program.name!r} at profile {profile.name!r} cannot be compiled: {error}") from error


def _planned(program: Program, profile: Profile, exported: ExportedProgram, applied: tuple[str, ...]) -> tuple[Captured, ProgramPlan]:
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
        precision="float32",
        passes=applied,
    )
    return item, plan


@contextmanager
def collector_off() -> Iterator[None]:
    """Inside, nobody looks for cycles: a graph of 48 layers is millions of objects that live, and looking through them takes a third of a capture."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _check_unique(pairs: Sequence[tuple[Program, Profile]]) -> None:
    names = [(program.name, profile.name) for program, profile in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        raise ConfigError(f"programs and profiles need distinct names; twice: {twice}" if twice else "a model needs at least one program with one profile")
