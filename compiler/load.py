"""A bundle becomes engines."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from reelstep.compiler.backends import AT_WORK, BACKENDS, Backend, Executable, Graph
from reelstep.compiler.bundle import Bundle
from reelstep.compiler.plan import RUN_BY, canonical_json
from reelstep.compiler.program import FLOAT_BYTES, Precision
from reelstep.compiler.signature import Signature
from reelstep.compiler.skus import SKUS, Sku, detect, device_here, is_gpu
from reelstep.compiler.sources import made_of
from reelstep.errors import CompileError, NotFound
from reelstep.parallel.mesh import Mesh, in_words

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with what begins, how many steps are done, and how many there are; 0 where nobody knows, as of what is made only if it is called."""


def silent(stage: str, done: int, total: int) -> None:
    """Nobody watches."""


class Later(Executable):
    """An executable that is made when it is first called, or ahead of that, with `AT_WORK` held. find: where it need not be made."""

    def __init__(self, signature: Signature, make: Callable[[], Executable], find: Callable[[], Executable | None]) -> None:
        self.signature, self._make, self._find = signature, make, find
        self._made: Executable | None = None

    @property
    def found(self) -> bool:
        """Whether it is made, or can be without work."""
        with AT_WORK:
            self._made = self._made or self._find()
        return self._made is not None

    @property
    def made(self) -> Executable:
        if self._made is None:  # what is there need not wait while another is made
            with AT_WORK:
                if self._made is None:
                    self._made = self._make()
        return self._made

    def open(self, rows: int) -> None:
        self.made.open(rows)

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.made(inputs)


def load(
    bundle: Bundle, cache: Path | None, backend: str | None = None, precision: Precision | None = None, progress: Progress = silent
) -> Mapping[tuple[str, str], Executable]:
    """An executable for every (program, profile) of the bundle; what `finalize` has not left in the cache is built now.

    backend, precision: the plan's if None; with another backend, that one's default precision. Programs that the plan keeps
    in float32 stay there. Raises NotFound for an unknown backend, CompileError if this machine cannot run the choice or the bundle is for a mesh.
    """
    chosen, wanted = choose_alone(bundle, backend, precision)
    check_memory(bundle, chosen, wanted)
    keys, engines = list(bundle.signatures), {}
    if chosen.weights_apart:  # the largest last: what has to leave weights on the host sees by then what all else takes of the device
        needs = weights_of_engines(bundle, keys, wanted)
        keys.sort(key=needs.__getitem__)
    for done, key in enumerate(keys):
        stage = f"{chosen.name}: {key[0]} {key[1]}"
        progress(stage, done, len(keys))
        engines[key] = build_engine(bundle, key, telling(chosen, progress, stage, done, len(keys)), wanted, cache)
    progress(f"{chosen.name}: ready", len(engines), len(engines))
    return {key: engines[key] for key in bundle.signatures}


def load_later(
    bundle: Bundle, cache: Path | None, backend: str | None = None, precision: Precision | None = None, progress: Progress = silent
) -> Mapping[tuple[str, str], Later]:
    """As `load`, but each is made when it is first called, for who will not call them all. Progress is of those that were not found in the cache before."""
    chosen, wanted = choose_alone(bundle, backend, precision)
    done = count()

    def make(key: tuple[str, str]) -> Executable:
        stage, before = f"{chosen.name}: {key[0]} {key[1]}", next(done)
        progress(stage, before, 0)
        return build_engine(bundle, key, telling(chosen, progress, stage, before, 0), wanted, cache)

    def find(key: tuple[str, str]) -> Executable | None:
        try:
            return build_engine(bundle, key, chosen, wanted, cache, graph=not_read)
        except NotInCacheError:
            return None

    return {key: Later(signature, partial(make, key), partial(find, key)) for key, signature in bundle.signatures.items()}


class NotInCacheError(Exception):
    """A backend asked for the graph, which one that has its engine does not."""


def not_read() -> ExportedProgram:
    """A graph for who only looks. Raises NotInCacheError."""
    raise NotInCacheError


def telling(backend: Backend, progress: Progress, stage: str, done: int, total: int) -> Backend:
    """The backend, which tells of the phases of a build as they begin: of their steps there may be thousands."""
    return backend.watched(lambda phase, step, _: None if step else progress(f"{stage}: {phase}", done, total))


def choose_alone(bundle: Bundle, backend: str | None, precision: Precision | None) -> tuple[Backend, Precision]:
    """As `choose`, on one device. Raises CompileError for a bundle for a mesh too, unless nothing is computed."""
    chosen, wanted = choose(bundle, backend, precision)
    if chosen.runs:
        check_mesh(bundle, None)
    else:
        log.warning("backend %r computes nothing: whatever is asked of %s comes out as zeros", chosen.name, bundle.path)
    return chosen, wanted


def choose(bundle: Bundle, backend: str | None, precision: Precision | None) -> tuple[Backend, Precision]:
    """What executes the bundle here, and how. Raises as `load`."""
    name = backend or bundle.plan.backend
    chosen = BACKENDS[name]
    check_weights(bundle, chosen)
    if chosen.runs and name == bundle.plan.backend:
        check_sku(bundle)
    chosen = chosen.on(arch_here(bundle, chosen))
    schemes = {p.quantised.scheme for p in bundle.plan.programs if p.quantised}
    for scheme in schemes:
        if name not in (good := dict.fromkeys((*RUN_BY[scheme], "eager"))):  # which runs whatever PyTorch does
            raise CompileError(f"{bundle.path} is quantised to {scheme}, of which backend {name!r} makes nothing; use {' or '.join(good)}")
    default = bundle.plan.precision if name == bundle.plan.backend else chosen.default_precision()[0]
    wanted = precision or default
    check_precision(chosen, wanted)
    return chosen, wanted


def check_weights(bundle: Bundle, backend: Backend) -> None:
    """Raises CompileError for a bundle without weights, but for a backend that computes nothing."""
    if backend.runs and not bundle.has_weights:
        raise CompileError(f"bundle {bundle.path} has no weights (it was compiled on the meta device); only backend 'null' can load it")


def build_engine(
    bundle: Bundle, key: tuple[str, str], chosen: Backend, wanted: Precision, cache: Path | None, graph: Graph | None = None
) -> Executable:  # fmt: skip
    """The executable of one (program, profile). graph: what the backend calls to read it, the bundle's own if None."""
    own, keep = bundle.plan.program(*key).own_precision(wanted), chosen.keeps(arch_here(bundle, chosen))

    def read() -> ExportedProgram:  # ops that were kept for the plan's backend, another may not run
        exported = (graph or partial(bundle.program, *key))()
        from reelstep.compiler.passes.decompose_ops import decompose_ops  # here: an engine from the cache is not read, and start-up is spared all passes

        return decompose_ops(exported, keep)

    return chosen.build(read, bundle.signatures[key], own, cache, engine_key(bundle, *key, own))


def arch_here(bundle: Bundle, backend: Backend) -> str:
    """What a backend runs a bundle on here: this machine's GPU if both are for GPUs, else the CPU. The plan's for one that computes nothing."""
    planned = bundle.plan.arch
    if not backend.runs or not is_gpu(planned):
        return planned
    return arch if backend.runs_on(planned) and is_gpu(arch := here().arch) else SKUS["cpu"].arch


def here() -> Sku:
    """What engines can be built for on this machine: its GPU, or its CPU where that is in no table, or there is none."""
    try:
        return detect()
    except NotFound:
        return SKUS["cpu"]


def on_this_machine(sku: str) -> bool:
    """Whether engines for this SKU can be built and run here: every machine has a CPU. Raises NotFound for an unknown SKU."""
    return sku == "cpu" or SKUS[sku].name == here().name


def check_sku(bundle: Bundle) -> None:
    """Raises CompileError for a bundle that was planned for something that is not here."""
    plan = bundle.plan
    if not on_this_machine(plan.sku):
        found, device = here(), device_here()
        strange = f" with {device}, which is in no table" if device and not is_gpu(found.arch) else ""
        text = f"{bundle.path} was compiled for {plan.sku} ({plan.arch}), and this machine is {found.name} ({found.arch}, {found.model}){strange}"
        other = f"`reelstep compile {plan.model} --sku {found.name}`; `--backend eager` runs this one on the CPU"
        raise CompileError(f"{text}. Use it on {plan.sku}, or compile one for here: {other}")


def able() -> list[str]:
    """Backends that run on this machine."""
    arch = here().arch
    return [name for name, backend in BACKENDS.items() if backend.runs and backend.runs_on(arch) and backend.on(arch).precisions]


def check_memory(bundle: Bundle, chosen: Backend, wanted: Precision) -> None:
    """Engines of a GPU are all loaded at once, and each holds its weights unless its backend keeps those apart. Raises CompileError where they are more than
    it has; more may be needed, which only shows as they run. A CPU opens those that are called, and can swap.
    """
    if chosen.weights_apart or not is_gpu(arch_here(bundle, chosen)):
        return
    sku, needs = here(), weights_of_engines(bundle, bundle.signatures, wanted)
    if (total := sum(needs.values())) > sku.memory_bytes:
        each = ", ".join(f"{' '.join(key)} {in_gb(size)}" for key, size in needs.items())
        text = f"the engines of {bundle.path} hold {in_gb(total)} of weights ({each}), and {sku.name} has {in_gb(sku.memory_bytes)} of memory"
        raise CompileError(f"{text}; compile with a smaller --precision, with --quantise, or for a SKU or mesh with more")


def weights_of_engines(bundle: Bundle, keys: Iterable[tuple[str, str]], wanted: Precision) -> dict[tuple[str, str], int]:
    """Bytes, of engines that each hold their own."""
    return {key: bundle.weights_bytes(*key, FLOAT_BYTES[bundle.plan.program(*key).own_precision(wanted)]) for key in keys}


def in_gb(count: int) -> str:
    return f"{count / 1e9:.3g} GB"


def check_mesh(bundle: Bundle, mesh: Mesh | None) -> None:
    """Raises CompileError for a bundle that was planned for another mesh. One that was planned for one device may be split as anybody likes."""
    planned, asked = bundle.plan.mesh, mesh.axes if mesh else {}
    if not planned or planned == asked:
        return
    option = f" --mesh {mesh}" if asked else ""
    text = f"{bundle.path} was planned for mesh {bundle.plan.mesh_name}, and is to be opened on {in_words(asked)}"
    raise CompileError(f"{text}. Open it with `--mesh {bundle.plan.mesh_name}`, or compile one for here: `reelstep compile {bundle.plan.model}{option}`")


def check_precision(backend: Backend, precision: Precision) -> None:
    if not backend.precisions:
        raise CompileError(f"backend {backend.name!r} does not run on this machine ({here().name}); use one of: {', '.join(able())}")
    if precision not in backend.precisions:
        raise CompileError(f"backend {backend.name!r} cannot run {precision} on this machine; it can run {', '.join(backend.precisions)}")


def engine_key(bundle: Bundle, program: str, profile: str, precision: Precision) -> str:
    """What an engine depends on besides the backend and the machine: graph, weights, choices, which weight goes where, and the code that makes it of these."""
    entry = hashlib.sha256(canonical_json(bundle.manifest["programs"][program][profile])).hexdigest()
    return made_of(bundle.plan.hash, bundle.weights_hash, program, profile, precision, entry)
