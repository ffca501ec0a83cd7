"""From a registered model to its bundle, and from a bundle to what a server offers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from reelstep.compiler.bundle import Bundle
from reelstep.compiler.compile import compile_model
from reelstep.compiler.load import Progress, silent
from reelstep.compiler.program import Precision
from reelstep.engine.models import MODELS
from reelstep.engine.models.spec import ModelSettings
from reelstep.engine.samplers.guidance import GUIDANCE
from reelstep.engine.samplers.ns import Table
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.schedules import SCHEDULES
from reelstep.engine.samplers.tables import SOLVERS


def table_name(solver: str, schedule: str, steps: int) -> str:
    """How a bundle names a solver table."""
    return f"{solver}.{schedule}.{steps}"


def build_table(settings: ModelSettings, solver: str, schedule: str, steps: int) -> Table:
    """A table made anew for this model's path."""
    return SOLVERS[solver].build(SCHEDULES[schedule](steps), PATHS[settings.path])


def default_tables(settings: ModelSettings) -> dict[str, Table]:
    """The tables of a model's defaults, which go into its bundle."""
    return {table_name(d.solver, d.schedule, d.steps): build_table(settings, d.solver, d.schedule, d.steps) for d in settings.defaults.values()}


def build_bundle(name: str, *, backend: str, precision: Precision | None, out: Path, cache: Path | None, progress: Progress = silent) -> Bundle:
    """Compile the registered model `name` into the bundle `out`. Raises NotFound, CompileError, StorageError."""
    spec = MODELS[name]
    return compile_model(
        model=spec.name,
        version=spec.version,
        settings=spec.settings.to_json(),
        programs=spec.programs(spec.build()),
        backend=backend,
        precision=precision,
        out=out,
        solvers={key: table.to_json() for key, table in default_tables(spec.settings).items()},
        card=spec.card.read_text() if spec.card else f"# {spec.name}\n\nNo trained weights.\n",
        cache=cache,
        progress=progress,
    )


@dataclass(frozen=True)
class ServedModel:
    """A loaded model, as clients see it. tables: those of the bundle, by `table_name`."""

    name: str
    version: str
    settings: ModelSettings
    solvers: tuple[str, ...]
    schedules: tuple[str, ...]
    tables: Mapping[str, Table]

    @cached_property
    def guidance_rules(self) -> Mapping[str, Mapping[str, float]]:
        """All options of each rule: the model's own where it has them, else the rule's."""
        return {name: rule.complete(self.settings.guidance_options.get(name, {})) for name, rule in GUIDANCE.items()}

    def check_guidance(self, rule: str, scale: float, options: Mapping[str, float]) -> None:
        """Raises ConfigError or NotFound for what the rule does not take."""
        GUIDANCE[rule].build(scale, PATHS[self.settings.path], options)

    @classmethod
    def of(cls, bundle: Bundle) -> ServedModel:
        tables = {key: Table.from_json(data) for key, data in bundle.solvers.items()}
        return cls(bundle.plan.model, bundle.plan.version, ModelSettings.from_json(bundle.settings), tuple(SOLVERS), tuple(SCHEDULES), tables)

    def table(self, solver: str, schedule: str, steps: int) -> Table:
        """The bundle's table where it has this one, else a new one."""
        return self.tables.get(table_name(solver, schedule, steps)) or build_table(self.settings, solver, schedule, steps)
