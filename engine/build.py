"""From a registered model to its bundle."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reelstep.compiler.backends import BACKENDS
from reelstep.compiler.bundle import Bundle, is_bundle
from reelstep.compiler.compile import choose_precision, compile_model
from reelstep.compiler.cubins import compiled_by
from reelstep.compiler.load import Progress, in_gb, load, on_this_machine, silent
from reelstep.compiler.lora import Layout, adapted_too, layers_of
from reelstep.compiler.part import Part
from reelstep.compiler.plan import canonical_json
from reelstep.compiler.program import Precision
from reelstep.compiler.quantisation import Quantisation
from reelstep.compiler.sharded import check_even, check_part, plan_ranks
from reelstep.compiler.skus import SKUS
from reelstep.compiler.sources import source_hash
from reelstep.compiler.storage import check_replaceable, check_writable, free_bytes, replace_file
from reelstep.engine.lora import fuse, read_adapter
from reelstep.engine.models import MODELS
from reelstep.engine.models.spec import Fused, ModelSettings, ModelSpec, hash_weights
from reelstep.engine.request import bad_strength, check_choice, complete, inert
from reelstep.engine.samplers.fitted import Fitted, FittedRule, RuleOptions
from reelstep.engine.samplers.guidance import GUIDANCE
from reelstep.engine.samplers.ns import Table
from reelstep.engine.samplers.step_cache import CacheOptions
from reelstep.engine.samplers.tables import SOLVERS
from reelstep.engine.served import ServedModel, build_table, schedules_of, table_name
from reelstep.errors import BundleError, CompileError, ConfigError, InvalidRequest, NotFound, StorageError
from reelstep.parallel.mesh import Mesh

log = logging.getLogger(__name__)

LEAST_OF_QUANTISED = 8
"""Times that weights in float32 are larger than in 4 bits, the fewest that a scheme has."""


def default_tables(settings: ModelSettings) -> dict[str, Table]:
    """The tables of a model's defaults, or of all grids of a distilled one, which go into its bundle."""
    grids = () if settings.distilled is None else settings.distilled.grids
    choices = [(d.solver, d.schedule, steps) for d in settings.defaults.values() for steps in grids or (d.steps,)]
    return {table_name(*choice): build_table(settings, *choice) for choice in choices}


def load_fitted(files: Sequence[Path], spec: ModelSpec, model_hash: str) -> dict[str, Fitted]:
    """Artifacts by name, checked. A calibration, whose name is its rule's, takes the place of the one that the model ships with.

    Raises ConfigError naming the file that is not one, is for another model or has a name that is taken; any for a student.
    """
    if files and spec.settings.distilled is not None:
        raise ConfigError(f"{files[0]}: {spec.name!r} is a student of few steps and no velocity field, so nothing can be fitted to it; compile it without")
    found: dict[str, Fitted] = {}
    shipped: set[str] = set()
    for file in files:
        try:
            fitted = Fitted.from_json(json.loads(file.read_bytes()))
            fitted.check_model(spec.name, model_hash)
            if isinstance(fitted.artifact, FittedRule):
                fit = fitted.fit
                fitted.artifact.check(build_table(spec.settings, fit.solver, fit.schedule, fit.steps), fit.scale)
        except OSError as error:
            raise ConfigError(f"cannot read {file}: {error.strerror}; `reelstep fit` writes such a file") from error
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:  # the first would print the whole file
            raise ConfigError(f"{file} is not a JSON file; `reelstep fit` writes such a file") from error
        except (ValueError, NotFound) as error:  # ConfigError is one
            raise ConfigError(f"{file}: {error}") from error
        calibrates = isinstance(fitted.artifact, RuleOptions | CacheOptions)
        if calibrates and fitted.name in shipped and file not in spec.fitted:
            shipped.remove(fitted.name)
            del found[fitted.name]
        if fitted.name in (*found, *SOLVERS, *(() if calibrates else GUIDANCE)):
            raise ConfigError(f"{file}: something called {fitted.name!r} is there already; fit it under another name")
        found[fitted.name] = fitted
        if file in spec.fitted:
            shipped.add(fitted.name)
    return found


def build_bundle(
    name: str,
    *,
    backend: str,
    sku: str = "cpu",
    precision: Precision | None,
    out: Path,
    cache: Path | None,
    portable: bool = False,
    fitted: Sequence[Path] = (),
    step_cache: bool = False,
    loras: Sequence[tuple[Path, float]] = (),
    lora_rank: int | None = None,
    quantisation: Quantisation | None = None,
    mesh: Mesh | None = None,
    progress: Progress = silent,
) -> Bundle:
    """Compile the registered model `name` for `sku` into the bundle `out`, with the artifacts `fitted`; step_cache: and with the pieces that step caches need.

    loras: files and strengths, fused into the weights; what was fitted to the model without them is left out. lora_rank: of a program beside `denoise`,
    that takes adapters up to this rank with each request. quantisation: of `denoise`. mesh: of ranks that share the model, which
    the plan then describes, and no other mesh opens the bundle. With a cache, what lies at `out` and was made of all the same is left as it is, and engines
    for this machine are built, unless it shall be portable.
    Raises NotFound, ConfigError, CompileError, StorageError.
    """
    spec, target = MODELS[name], SKUS[sku]
    mesh = mesh if mesh is not None and mesh.world > 1 else None
    choice = choose_precision(backend, target, precision, mesh, portable)  # before the work, as all that follows
    if step_cache and spec.pieces is None:
        raise ConfigError(f"model {name!r} does not come in the pieces that a step cache needs; compile it without")
    if spec.adaptable is None and (loras or lora_rank is not None):
        raise ConfigError(f"model {name!r} names no layers that a LoRA may change; compile it without")
    if quantisation is not None and (step_cache or lora_rank is not None):
        other = "--step-cache" if step_cache else "--lora-rank"
        raise ConfigError(f"--quantise with {other}, whose programs read the denoiser's float weights: all would be there twice. Leave one of the two out")
    if mesh is not None and loras:
        instead = "give LoRAs with requests, by --lora-rank"
        raise ConfigError(f"--mesh {mesh} with --lora, which ranks know nothing of: they read the weights that the model came with; {instead}")
    if mesh is not None and (other := "--step-cache" if step_cache else "--quantise" if quantisation else ""):
        raise ConfigError(f"--mesh {mesh} with {other}, whose programs no rank can share; leave one of the two out")
    parts = sharded_parts(spec) if mesh is not None else ()
    if mesh is not None:
        for part in parts:
            check_part(part, mesh, name)
        if BACKENDS[backend].even_exchange:
            check_even(parts, mesh, backend)
    module = spec.build()
    builds = BACKENDS[backend].runs and on_this_machine(sku) and not portable and mesh is None  # ranks build their own
    engines = cache if builds else None  # where they go
    if engines is not None and any(weight.is_meta for weight in module.parameters()):
        raise ConfigError(f"model {name!r} comes without weights, so backend {backend!r} has no engine to build of it here; plan it with --backend null")
    linears = spec.adaptable(module) if spec.adaptable else {}
    layout = None if lora_rank is None else Layout(lora_rank, layers_of(linears))
    settings, own = replace(spec.settings, lora=layout), spec.fitted
    programs = adapted_too(spec.programs(module), linears.__getitem__, layout)
    if loras:
        settings, own = fuse_loras(settings, spec.name, linears, loras), ()
        progress(f"fused {', '.join(map(str, settings.fused))}; left out: {', '.join(path.stem for path in spec.fitted) or 'no'} fits, and the menus", 0, 1)
    model_hash = hash_weights(module)
    made = load_fitted((*own, *fitted), spec, model_hash)
    added = [*made.values()][len(made) - len(fitted) :]
    if useless := [each.name for each in added if isinstance(each.artifact, CacheOptions) and not step_cache]:
        raise ConfigError(f"{', '.join(useless)} is a fit of a step cache, which this bundle could not run; compile with --step-cache, or leave it out")
    card = card_of(spec, settings.fused)
    tables = default_tables(settings) | menu_tables(ServedModel(spec.name, spec.version, settings, schedules_of(settings), {}, made))
    stamp = None
    if cache is not None:
        kernels_by = compiled_by(target.arch) if BACKENDS[backend].keeps(target.arch) else ""
        asked = [name, spec.version, model_hash, settings.to_json(), card, backend, choice, kernels_by, str(mesh), step_cache]
        machine = [target.name, target.arch, target.model, *sorted(target.features)]
        stamp = stamp_of(cache, [*asked, machine, [each.to_json() for each in made.values()], quantisation and quantisation.identity])
        if (kept := unchanged(out, stamp)) is not None:
            progress(f"{out} is what would be made: nothing to compile", 0, 1)
            if engines is not None:
                load(kept, engines, progress=progress)
            return kept
    check_replaceable(out, is_bundle)  # after that: what is done may lie where nothing can be written
    _check_room(out, module, quantised=quantisation is not None)
    if engines is not None:
        check_writable(engines)
        if lacks := BACKENDS[backend].on(target.arch).lacks():
            raise CompileError(f"backend {backend!r} can build no engine here: {lacks}")
    bundle = compile_model(
        model=spec.name,
        version=spec.version,
        settings=settings.to_json(),
        programs=(*programs, *(spec.pieces(module) if step_cache and spec.pieces else ())),
        backend=backend,
        sku=sku,
        precision=precision,
        out=out,
        solvers={key: table.to_json() for key, table in tables.items()},
        fitted={key: each.to_json() for key, each in made.items()},
        card=card,
        cache=cache,
        quantisation=quantisation,
        mesh=mesh,
        portable=portable,
        ranks=plan_ranks(parts, mesh, choice[0], BACKENDS[backend].keeps(target.arch), progress, layout) if mesh is not None else (),
        progress=progress,
    )
    if cache is not None and stamp is not None:
        try:  # before the engines: who stops while they are built need not quantise again
            stamp.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # a backend that compiles nothing here has not made it
            replace_file(stamp, bundle.manifest["sha256"].encode())
        except (OSError, StorageError) as error:
            log.warning("%s is done, but compiling it again will do all the work again: %s", out, error)
    if engines is not None:
        load(bundle, engines, progress=progress)
    return bundle


def _check_room(out: Path, module: nn.Module, quantised: bool) -> None:
    """Raises StorageError where the weights alone are more than the disk has room for."""
    whole = sum(x.nbytes for x in (*module.parameters(), *module.buffers()) if not x.is_meta)
    least = whole // LEAST_OF_QUANTISED if quantised else whole
    if least > (free := free_bytes(out.parent)):
        text = f"{out} would hold {in_gb(least)} of weights, and its disk has {in_gb(free)} free"
        raise StorageError(f"{text}. Nothing was compiled; free some space or choose another place with -o")


def stamp_of(cache: Path, asked: Sequence[Any]) -> Path:
    """Where it stands which bundle was made of all this, by these sources and this torch. asked: JSON values."""
    sources = source_hash("compiler", "engine", "kernels", "parallel")
    return cache / f"compiled-{hashlib.sha256(canonical_json([sources, torch.__version__, *asked])).hexdigest()}"


def unchanged(out: Path, stamp: Path) -> Bundle | None:
    """The bundle at `out` if it is the one that the stamp names, and whole."""
    if not out.exists() or not stamp.exists():
        return None
    try:
        bundle = Bundle.open(out)
    except BundleError:  # of something else, or damaged: it is made again
        return None
    return bundle if bundle.manifest["sha256"].encode() == stamp.read_bytes() else None


def sharded_parts(spec: ModelSpec) -> tuple[Part, ...]:
    """What ranks share of a model. Raises ConfigError for one that does not say."""
    if not spec.sharding:
        able = ", ".join(name for name, other in MODELS.items() if other.sharding)
        raise ConfigError(f"model {spec.name!r} does not say how it is sharded; those that do: {able}. Compile it without a mesh")
    return spec.sharding


def fuse_loras(settings: ModelSettings, model: str, linears: Mapping[str, nn.Linear], loras: Sequence[tuple[Path, float]]) -> ModelSettings:
    """Add them to the weights, and say so in the settings, which lose the menus: their numbers were measured without. Raises ConfigError."""
    layers = layers_of(linears)
    read = [(file, read_adapter(file, model, layers), strength) for file, strength in loras]
    for file, _, strength in read:
        if bad := bad_strength(strength):
            raise ConfigError(f"LoRA {file}: {bad}")
    known: dict[str, Path] = {}
    for file, adapter, _ in read:
        if adapter.fingerprint in known:
            raise ConfigError(f"LoRA {file} is the one of {known[adapter.fingerprint]}; give it once, with the sum of both strengths")
        known[adapter.fingerprint] = file
    fuse(linears, [(adapter, strength) for _, adapter, strength in read])
    fused = tuple(Fused(file.stem, adapter.digest, strength, adapter.rank, len(adapter.pairs)) for file, adapter, strength in read)
    return replace(settings, defaults={task: replace(d, menu={}) for task, d in settings.defaults.items()}, fused=fused)


def card_of(spec: ModelSpec, fused: Sequence[Fused]) -> str:
    card = spec.card.read_text() if spec.card else f"# {spec.name}\n\nNo trained weights.\n"
    if not fused:
        return card
    added = "".join(f"- {each}, sha256 {each.digest}\n" for each in fused)
    return f"{card}\n## LoRA\n\nFused into these weights; what is said above was measured without.\n\n{added}"


def menu_tables(served: ServedModel) -> dict[str, Table]:
    """The training-free tables of all menus, which go into the bundle too.

    Raises ConfigError for the first entry that no request could run: it names what is not in the bundle, or parts that do not go together.
    """
    found, student = dict[str, Table](), served.settings.distilled
    for task, defaults in served.settings.defaults.items():
        for quality in defaults.qualities:
            try:
                if student is not None and (bad := inert(defaults.menu[quality], defaults, student)):
                    raise InvalidRequest(bad)
                choice = complete(defaults.menu[quality], task, defaults, served)
                check_choice(choice, served.settings.limits, served)
                if choice.solver not in served.fitted:
                    found[table_name(choice.solver, choice.schedule, choice.steps)] = served.table(choice.solver, choice.schedule, choice.steps)
            except (ConfigError, NotFound, InvalidRequest) as error:
                text = f"{quality!r} in the menu of {served.name!r} for {task}: {error}; add the fit that it names, or change it in the model's file"
                raise ConfigError(text) from error
    return found
