"""What a server offers of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor, zeros

from reelstep.compiler.bundle import AGAIN, Bundle
from reelstep.engine.lora import Adapter, check_rank, pack, read_adapter
from reelstep.engine.models.spec import GRID, ModelSettings
from reelstep.engine.request import Fit, Request
from reelstep.engine.samplers.fitted import Fitted, FittedRule, RuleOptions
from reelstep.engine.samplers.guidance import GUIDANCE, Guidance, Rule
from reelstep.engine.samplers.ns import Table
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.schedules import SCHEDULES
from reelstep.engine.samplers.step_cache import PIECES, STEP_CACHES, CacheOptions
from reelstep.engine.samplers.step_cache import Rule as CacheRule
from reelstep.engine.samplers.tables import SOLVERS
from reelstep.errors import AlreadyExists, BundleError, ConfigError, Overloaded, unknown

RETRY_FULL_S = 60.0
"""When there are as many LoRAs as may be: nobody knows when one will be unloaded."""


def table_name(solver: str, schedule: str, steps: int) -> str:
    """How a bundle names a solver table."""
    return f"{solver}.{schedule}.{steps}"


def build_table(settings: ModelSettings, solver: str, schedule: str, steps: int) -> Table:
    """A table made anew for this model's path; of a distilled model on its grid, whatever the schedule. Raises ConfigError for steps that it has no grid of."""
    times = SCHEDULES[schedule](steps) if settings.distilled is None else settings.distilled.times(steps)
    return SOLVERS[solver].build(times, PATHS[settings.path])


def schedules_of(settings: ModelSettings) -> tuple[str, ...]:
    """All that can be asked for."""
    return tuple(SCHEDULES) if settings.distilled is None else (GRID,)


@dataclass(frozen=True)
class ServedModel:
    """A loaded model, as clients see it.

    tables: the training-free ones of the bundle, by `table_name`; fitted: what was fitted to it; in_pieces: whether step caches can run;
    loras: what requests may name.
    """

    name: str
    version: str
    settings: ModelSettings
    schedules: tuple[str, ...]
    tables: Mapping[str, Table]
    fitted: Mapping[str, Fitted] = field(default_factory=dict)
    in_pieces: bool = False
    loras: Mapping[str, Adapter] = field(default_factory=dict)

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

    def check_lora(self, request: Request) -> None:
        """Raises ConfigError for adapters that the request cannot run with, NotFound for one that is not loaded."""
        chosen = self._adapters(request)
        if chosen and request.step_cache:
            raise ConfigError(f"step cache {request.step_cache!r} runs the network in pieces, which take no LoRA; leave one of the two out")
        if chosen and self.settings.lora is not None:
            check_rank({name: adapter.rank for name, (adapter, _) in chosen.items()}, self.settings.lora)

    def lora(self, request: Request) -> Tensor | None:
        """[1, N], the adapters of one request; None where there are none, or none with any strength. Raises as `check_lora`."""
        self.check_lora(request)
        chosen = self._adapters(request)
        return pack(self.settings.lora, chosen.values()) if chosen and self.settings.lora is not None else None

    def adapters(self, request: Request) -> tuple[str, ...]:
        """Fingerprints of the adapters of one request, by their names. Raises NotFound for one that is not loaded."""
        return tuple(adapter.fingerprint for _, (adapter, _) in sorted(self._adapters(request).items()))

    def _adapters(self, request: Request) -> dict[str, tuple[Adapter, float]]:
        """Those that change anything."""
        if missing := [name for name in request.lora if name not in self.loras]:
            raise unknown("LoRA", missing[0], self.loras)
        return {name: (self.loras[name], strength) for name, strength in request.lora.items() if strength}

    def with_lora(self, name: str, adapter: Adapter, most: int, replacing: bool) -> ServedModel:
        """The model with this adapter too; as it is where it has the same one of this name. most: adapters that it may have.

        Raises AlreadyExists for another one of this name that is not to be replaced, Overloaded where there are as many as there may be.
        """
        if (there := self.loras.get(name)) is not None:
            if there.fingerprint == adapter.fingerprint:
                return self
            if not replacing:
                says = f"LoRA {name!r} of {self.name!r} is another one, of sha256 {there.digest[:12]}"
                raise AlreadyExists(f"{says}; load it by another name, replace that one (`--replace`), or unload it first")
        elif len(self.loras) >= most:
            says = f"{self.name!r} has {len(self.loras)} LoRAs, and clients may bring it up to {most}"
            raise Overloaded(f"{says}; unload one, or start the server with a larger --max-loras. Loaded: {', '.join(sorted(self.loras))}", RETRY_FULL_S)
        return replace(self, loras={**self.loras, name: adapter})

    def with_some_lora(self) -> ServedModel:
        """The model with an adapter that changes nothing; as it is where it has any, or takes none."""
        if self.loras or self.settings.lora is None:
            return self
        name, inputs, outputs = self.settings.lora.layers[0]
        return replace(self, loras={"none": Adapter({name: (zeros(1, inputs), zeros(outputs, 1))}, "", "")})

    def without_lora(self, name: str) -> ServedModel:
        """Raises NotFound for one that is not loaded."""
        if name not in self.loras:
            raise unknown("LoRA", name, self.loras)
        return replace(self, loras={other: adapter for other, adapter in self.loras.items() if other != name})

    @classmethod
    def of(cls, bundle: Bundle, loras: Mapping[str, Path] | None = None) -> ServedModel:
        """loras: files by the names that requests use. Raises ConfigError for one that is not for this model, or where the bundle takes none, BundleError for
        settings, solvers or fits of another shape than these are.
        """
        try:
            tables = {key: Table.from_json(data) for key, data in bundle.solvers.items()}
            fitted = {name: Fitted.from_json(data) for name, data in bundle.fitted.items()}
            settings = ModelSettings.from_json(bundle.settings)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            text = f"{bundle.path} has settings, solvers or fits that cannot be read ({type(error).__name__}: {str(error)[:200]}); {AGAIN}"
            raise BundleError(text) from error
        in_pieces = {*PIECES} <= {program for program, _ in bundle.signatures}
        adapters = read_loras(bundle.plan.model, settings, loras) if loras else {}
        return cls(bundle.plan.model, bundle.plan.version, settings, schedules_of(settings), tables, fitted, in_pieces, adapters)

    def table(self, solver: str, schedule: str, steps: int) -> Table:
        """The bundle's table where it has this one, else a new one. A fitted solver has times of its own, whatever the schedule."""
        if solver in self.fitted:
            made = self.fitted[solver].artifact
            assert isinstance(made, Table)
            return made
        return self.tables.get(table_name(solver, schedule, steps)) or build_table(self.settings, solver, schedule, steps)


def read_loras(model: str, settings: ModelSettings, files: Mapping[str, Path], config: str | None = None) -> dict[str, Adapter]:
    """Adapters by name. config: as of `read_adapter`, of files that were uploaded, whose paths mean nothing to whoever reads an error.

    Raises ConfigError for a file that is none for this model, and for a bundle that takes none, or none of such a rank.
    """
    if settings.lora is None:
        raise ConfigError(f"the bundle of {model!r} takes no LoRA ({', '.join(files)}); compile it with --lora-rank, or fuse it with --lora")
    uploaded = config is not None
    adapters = {name: read_adapter(file, model, settings.lora.layers, config, repr(name) if uploaded else "") for name, file in files.items()}
    for name, adapter in adapters.items():
        check_rank({name: adapter.rank}, settings.lora)
    return adapters
