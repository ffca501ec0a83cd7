"""From a registered model to its bundle, and from a bundle to what a server offers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from reelstep.compiler.bundle import Bundle
from reelstep.compiler.compile import compile_model
from reelstep.compiler.load import Progress, silent
from reelstep.compiler.program import Precision
from reelstep.engine.models import MODELS
from reelstep.engine.models.spec import GRID, ModelSettings, ModelSpec
from reelstep.engine.request import Fit, Request, check_choice, complete, inert
from reelstep.engine.samplers.fitted import Fitted, FittedRule, RuleOptions
from reelstep.engine.samplers.guidance import GUIDANCE, Guidance, Rule
from reelstep.engine.samplers.ns import Table
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.schedules import SCHEDULES
from reelstep.engine.samplers.step_cache import PIECES, STEP_CACHES, CacheOptions
from reelstep.engine.samplers.step_cache import Rule as CacheRule
from reelstep.engine.samplers.tables import SOLVERS
from reelstep.errors import ConfigError, InvalidRequest, NotFound


def table_name(solver: str, schedule: str, steps: int) -> str:
    """How a bundle names a solver table."""
    return f"{solver}.{schedule}.{steps}"


def build_table(settings: ModelSettings, solver: str, schedule: str, steps: int) -> Table:
    """A table made anew for this model's path; of a distilled model on its grid, whatever the schedule. Raises ConfigError for steps that it has no grid of."""
    times = SCHEDULES[schedule](steps) if settings.distilled is None else settings.distilled.times(steps)
    return SOLVERS[solver].build(times, PATHS[settings.path])


def default_tables(settings: ModelSettings) -> dict[str, Table]:
    """The tables of a model's defaults, or of all grids of a distilled one, which go into its bundle."""
    grids = () if settings.distilled is None else settings.distilled.grids
    choices = [(d.solver, d.schedule, steps) for d in settings.defaults.values() for steps in grids or (d.steps,)]
    return {table_name(*choice): build_table(settings, *choice) for choice in choices}


def schedules_of(settings: ModelSettings) -> tuple[str, ...]:
    """All that can be asked for."""
    return tuple(SCHEDULES) if settings.distilled is None else (GRID,)


def hash_weights(model: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of all weights, hex: what an artifact of a fit is bound to."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_fitted(files: Sequence[Path], spec: ModelSpec, model_hash: str) -> dict[str, Fitted]:
    """Artifacts by name, checked. Raises ConfigError naming the file that is not one, is for another model or has a name that is taken; any for a student."""
    if files and spec.settings.distilled is not None:
        raise ConfigError(f"{files[0]}: {spec.name!r} is a student of few steps and no velocity field, so nothing can be fitted to it; compile it without")
    found: dict[str, Fitted] = {}
    for file in files:
        try:
            fitted = Fitted.from_json(json.loads(file.read_bytes()))
            fitted.check_model(spec.name, model_hash)
            if isinstance(fitted.artifact, FittedRule):
                fit = fitted.fit
                fitted.artifact.check(build_table(spec.settings, fit.solver, fit.schedule, fit.steps), fit.scale)
        except (OSError, ValueError, NotFound) as error:  # of JSON and UTF-8 too; ConfigError is one
            raise ConfigError(f"{file}: {error}") from error
        taken = (*found, *SOLVERS, *(name for name in GUIDANCE if not isinstance(fitted.artifact, RuleOptions | CacheOptions)))
        if fitted.name in taken:
            raise ConfigError(f"{file}: something called {fitted.name!r} is there already; fit it under another name")
        found[fitted.name] = fitted
    return found


def build_bundle(
    name: str,
    *,
    backend: str,
    sku: str = "cpu",
    precision: Precision | None,
    out: Path,
    cache: Path | None,
    fitted: Sequence[Path] = (),
    step_cache: bool = False,
    progress: Progress = silent,
) -> Bundle:
    """Compile the registered model `name` for `sku` into the bundle `out`, with the artifacts `fitted`; step_cache: and with the pieces that step caches need.

    Raises NotFound, ConfigError, CompileError, StorageError.
    """
    spec = MODELS[name]
    if step_cache and spec.pieces is None:
        raise ConfigError(f"model {name!r} does not come in the pieces that a step cache needs; compile it without")
    module = spec.build()
    made = load_fitted((*spec.fitted, *fitted), spec, hash_weights(module))
    added = [*made.values()][len(spec.fitted) :]
    if useless := [each.name for each in added if isinstance(each.artifact, CacheOptions) and not step_cache]:
        raise ConfigError(f"{', '.join(useless)} is a fit of a step cache, which this bundle could not run; compile with --step-cache, or leave it out")
    tables = default_tables(spec.settings) | menu_tables(ServedModel(spec.name, spec.version, spec.settings, schedules_of(spec.settings), {}, made))
    return compile_model(
        model=spec.name,
        version=spec.version,
        settings=spec.settings.to_json(),
        programs=(*spec.programs(module), *(spec.pieces(module) if step_cache and spec.pieces else ())),
        backend=backend,
        sku=sku,
        precision=precision,
        out=out,
        solvers={key: table.to_json() for key, table in tables.items()},
        fitted={key: each.to_json() for key, each in made.items()},
        card=spec.card.read_text() if spec.card else f"# {spec.name}\n\nNo trained weights.\n",
        cache=cache,
        progress=progress,
    )


@dataclass(frozen=True)
class ServedModel:
    """A loaded model, as clients see it.

    tables: the training-free ones of the bundle, by `table_name`; fitted: what was fitted to it; in_pieces: whether step caches can run.
    """

    name: str
    version: str
    settings: ModelSettings
    schedules: tuple[str, ...]
    tables: Mapping[str, Table]
    fitted: Mapping[str, Fitted] = field(default_factory=dict)
    in_pieces: bool = False

    @property
    def solvers(self) -> tuple[str, ...]:
        """All that can be asked for: the training-free ones and those fitted to this model; only its own of a distilled model."""
        if self.settings.distilled is not None:
            return tuple(dict.fromkeys(d.solver for d in self.settings.defaults.values()))
        return (*SOLVERS, *(name for name, fitted in self.fitted.items() if isinstance(fitted.artifact, Table)))

    @cached_property
    def fits(self) -> Mapping[str, Fit]:
        """What each fitted solver and guidance holds for."""
        return {name: fitted.fit for name, fitted in self.fitted.items() if not isinstance(fitted.artifact, RuleOptions | CacheOptions)}

    @cached_property
    def guidance_rules(self) -> Mapping[str, Mapping[str, float]]:
        """All options of each rule: as calibrated for the model, else the rule's own. A fitted rule has none. A distilled model takes no guidance."""
        if self.settings.distilled is not None:
            return {"none": GUIDANCE["none"].complete({})}
        artifacts = [fitted.artifact for fitted in self.fitted.values()]
        calibrated = {made.rule: made.options for made in artifacts if isinstance(made, RuleOptions)}
        own = {name: dict[str, float]() for name, fitted in self.fitted.items() if isinstance(fitted.artifact, FittedRule)}
        return {name: rule.complete(calibrated.get(name, {})) for name, rule in GUIDANCE.items()} | own

    def check_guidance(self, rule: str, scale: float, options: Mapping[str, float]) -> None:
        """Raises ConfigError or NotFound for what the rule does not take."""
        self.rule(rule, scale, options)

    def rule(self, name: str, scale: float, options: Mapping[str, float]) -> Rule:
        """The rule of one request. Raises as `check_guidance`."""
        if name not in self.fitted or isinstance(self.fitted[name].artifact, RuleOptions):
            return GUIDANCE[name].build(scale, PATHS[self.settings.path], options)
        made = self.fitted[name].artifact
        assert isinstance(made, FittedRule)
        return Guidance(name, lambda scale, path: made.rule()).build(scale, PATHS[self.settings.path], options)

    @cached_property
    def step_caches(self) -> Mapping[str, Mapping[str, float]]:
        """All options of each step cache: as calibrated for the model, else the rule's own. None where the bundle has no pieces."""
        artifacts = [fitted.artifact for fitted in self.fitted.values()]
        calibrated = {made.rule: made.options for made in artifacts if isinstance(made, CacheOptions)}
        return {name: cache.complete(calibrated.get(name, {})) for name, cache in STEP_CACHES.items()} if self.in_pieces else {}

    def check_step_cache(self, request: Request) -> None:
        """Raises ConfigError or NotFound for what the request's step cache does not take, or does not go with."""
        self.step_cache(request)

    def step_cache(self, request: Request) -> CacheRule | None:
        """The rule of one request, None where nothing is to be skipped. Raises as `check_step_cache`."""
        if not request.step_cache:
            return None
        if request.guidance in self.fits:
            text = f"guidance {request.guidance!r} was fitted to the network's own outputs, which a step cache replaces; choose another, or no step cache"
            raise ConfigError(text)
        evaluations = request.steps * (1 if request.solver in self.fitted else SOLVERS[request.solver].evaluations)
        return STEP_CACHES[request.step_cache].build(evaluations, GUIDANCE[request.guidance].measures, request.step_cache_options)

    @classmethod
    def of(cls, bundle: Bundle) -> ServedModel:
        tables = {key: Table.from_json(data) for key, data in bundle.solvers.items()}
        fitted = {name: Fitted.from_json(data) for name, data in bundle.fitted.items()}
        in_pieces = {*PIECES} <= {program for program, _ in bundle.signatures}
        settings = ModelSettings.from_json(bundle.settings)
        return cls(bundle.plan.model, bundle.plan.version, settings, schedules_of(settings), tables, fitted, in_pieces)

    def table(self, solver: str, schedule: str, steps: int) -> Table:
        """The bundle's table where it has this one, else a new one. A fitted solver has times of its own, whatever the schedule."""
        if solver in self.fitted:
            made = self.fitted[solver].artifact
            assert isinstance(made, Table)
            return made
        return self.tables.get(table_name(solver, schedule, steps)) or build_table(self.settings, solver, schedule, steps)


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
