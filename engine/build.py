"""From a registered model to its bundle, and from a bundle to what a server offers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reelstep.compiler.bundle import Bundle
from reelstep.compiler.compile import compile_model
from reelstep.compiler.load import Progress, silent
from reelstep.compiler.program import Precision
from reelstep.engine.models import MODELS
from reelstep.engine.models.spec import ModelSettings, ModelSpec
from reelstep.engine.request import Fit
from reelstep.engine.samplers.fitted import Fitted, RuleOptions
from reelstep.engine.samplers.guidance import GUIDANCE, Guidance, Rule
from reelstep.engine.samplers.linear_ag import LinearAG
from reelstep.engine.samplers.ns import Table
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.schedules import SCHEDULES
from reelstep.engine.samplers.tables import SOLVERS
from reelstep.errors import ConfigError, NotFound


def table_name(solver: str, schedule: str, steps: int) -> str:
    """How a bundle names a solver table."""
    return f"{solver}.{schedule}.{steps}"


def build_table(settings: ModelSettings, solver: str, schedule: str, steps: int) -> Table:
    """A table made anew for this model's path."""
    return SOLVERS[solver].build(SCHEDULES[schedule](steps), PATHS[settings.path])


def default_tables(settings: ModelSettings) -> dict[str, Table]:
    """The tables of a model's defaults, which go into its bundle."""
    return {table_name(d.solver, d.schedule, d.steps): build_table(settings, d.solver, d.schedule, d.steps) for d in settings.defaults.values()}


def hash_weights(model: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of all weights, hex: what an artifact of a fit is bound to."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_fitted(files: Sequence[Path], spec: ModelSpec, model_hash: str) -> dict[str, Any]:
    """Artifacts by name, checked. Raises ConfigError naming the file that is not one, is for another model or has a name that is taken."""
    found: dict[str, Any] = {}
    for file in files:
        try:
            fitted = Fitted.from_json(json.loads(file.read_bytes()))
            fitted.check_model(spec.name, model_hash)
            if isinstance(fitted.artifact, LinearAG):
                fit = fitted.fit
                fitted.artifact.check(build_table(spec.settings, fit.solver, fit.schedule, fit.steps), fit.scale)
        except (OSError, ValueError, NotFound) as error:  # of JSON and UTF-8 too; ConfigError is one
            raise ConfigError(f"{file}: {error}") from error
        taken = (*found, *SOLVERS, *(name for name in GUIDANCE if not isinstance(fitted.artifact, RuleOptions)))
        if fitted.name in taken:
            raise ConfigError(f"{file}: something called {fitted.name!r} is there already; fit it under another name")
        found[fitted.name] = fitted.to_json()
    return found


def build_bundle(
    name: str,
    *,
    backend: str,
    precision: Precision | None,
    out: Path,
    cache: Path | None,
    fitted: Sequence[Path] = (),
    progress: Progress = silent,
) -> Bundle:
    """Compile the registered model `name` into the bundle `out`, with the artifacts `fitted`. Raises NotFound, ConfigError, CompileError, StorageError."""
    spec = MODELS[name]
    module = spec.build()
    artifacts = load_fitted((*spec.fitted, *fitted), spec, hash_weights(module))
    return compile_model(
        model=spec.name,
        version=spec.version,
        settings=spec.settings.to_json(),
        programs=spec.programs(module),
        backend=backend,
        precision=precision,
        out=out,
        solvers={key: table.to_json() for key, table in default_tables(spec.settings).items()},
        fitted=artifacts,
        card=spec.card.read_text() if spec.card else f"# {spec.name}\n\nNo trained weights.\n",
        cache=cache,
        progress=progress,
    )


@dataclass(frozen=True)
class ServedModel:
    """A loaded model, as clients see it. tables: the training-free ones of the bundle, by `table_name`; fitted: what was fitted to it."""

    name: str
    version: str
    settings: ModelSettings
    schedules: tuple[str, ...]
    tables: Mapping[str, Table]
    fitted: Mapping[str, Fitted] = field(default_factory=dict)

    @property
    def solvers(self) -> tuple[str, ...]:
        """All that can be asked for: the training-free ones and those fitted to this model."""
        return (*SOLVERS, *(name for name, fitted in self.fitted.items() if isinstance(fitted.artifact, Table)))

    @cached_property
    def fits(self) -> Mapping[str, Fit]:
        """What each fitted solver and guidance holds for."""
        return {name: fitted.fit for name, fitted in self.fitted.items() if not isinstance(fitted.artifact, RuleOptions)}

    @cached_property
    def guidance_rules(self) -> Mapping[str, Mapping[str, float]]:
        """All options of each rule: as calibrated for the model, else the rule's own. A fitted rule has none."""
        artifacts = [fitted.artifact for fitted in self.fitted.values()]
        calibrated = {made.rule: made.options for made in artifacts if isinstance(made, RuleOptions)}
        linear = {name: dict[str, float]() for name, fitted in self.fitted.items() if isinstance(fitted.artifact, LinearAG)}
        return {name: rule.complete(calibrated.get(name, {})) for name, rule in GUIDANCE.items()} | linear

    def check_guidance(self, rule: str, scale: float, options: Mapping[str, float]) -> None:
        """Raises ConfigError or NotFound for what the rule does not take."""
        self.rule(rule, scale, options)

    def rule(self, name: str, scale: float, options: Mapping[str, float]) -> Rule:
        """The rule of one request. Raises as `check_guidance`."""
        if name not in self.fitted or isinstance(self.fitted[name].artifact, RuleOptions):
            return GUIDANCE[name].build(scale, PATHS[self.settings.path], options)
        made = self.fitted[name].artifact
        assert isinstance(made, LinearAG)
        return Guidance(name, lambda scale, path: made.rule()).build(scale, PATHS[self.settings.path], options)

    @classmethod
    def of(cls, bundle: Bundle) -> ServedModel:
        tables = {key: Table.from_json(data) for key, data in bundle.solvers.items()}
        fitted = {name: Fitted.from_json(data) for name, data in bundle.fitted.items()}
        return cls(bundle.plan.model, bundle.plan.version, ModelSettings.from_json(bundle.settings), tuple(SCHEDULES), tables, fitted)

    def table(self, solver: str, schedule: str, steps: int) -> Table:
        """The bundle's table where it has this one, else a new one. A fitted solver has times of its own, whatever the schedule."""
        if solver in self.fitted:
            made = self.fitted[solver].artifact
            assert isinstance(made, Table)
            return made
        return self.tables.get(table_name(solver, schedule, steps)) or build_table(self.settings, solver, schedule, steps)
