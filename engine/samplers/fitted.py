"""Artifacts of fits: what belongs to one model, and the conditions under which it was fitted and holds.

A fitted solver or rule of guidance follows one velocity field. Another scale, rule of guidance or model is another field, on which it may be worse than
anything plain: it is refused there, not tried. A calibration is only what a rule's options are where a request is silent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from reelstep.engine.request import Fit
from reelstep.engine.samplers.guidance import GUIDANCE
from reelstep.engine.samplers.guidance_policy import GuidancePolicy
from reelstep.engine.samplers.linear_ag import LinearAG
from reelstep.engine.samplers.ns import Table
from reelstep.engine.samplers.step_cache import CacheOptions
from reelstep.errors import ConfigError, NotFound

VERSION = 1


@dataclass(frozen=True)
class RuleOptions:
    """Options of a rule of guidance, as calibrated. Raises NotFound and ConfigError as `Guidance.complete` does."""

    rule: str
    options: Mapping[str, float]

    def __post_init__(self) -> None:
        GUIDANCE[self.rule].complete(self.options)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RuleOptions:
        return cls(**data)


FittedRule = LinearAG | GuidancePolicy
"""Guidance of one table and scale."""

Artifact = Table | FittedRule | RuleOptions | CacheOptions

KINDS: Mapping[str, type[Artifact]] = {
    "solver": Table,
    "guidance": LinearAG,
    "policy": GuidancePolicy,
    "options": RuleOptions,
    "step_cache": CacheOptions,
}


@dataclass(frozen=True)
class Fitted:
    """name: as requests ask for it. method: bns, linear_ag, ... conditions: how it was fitted, for people. scores_db: on validation samples, by what was tried.

    Raises ConfigError for parts that do not belong together.
    """

    name: str
    method: str
    model: str
    model_hash: str  # `hash_weights` of the model it was fitted to
    fit: Fit
    artifact: Artifact
    conditions: Mapping[str, Any]
    scores_db: Mapping[str, float]

    def __post_init__(self) -> None:
        made = self.artifact
        if isinstance(made, Table) and (self.fit.solver, self.fit.steps) != (self.name, made.n):
            raise ConfigError(f"fitted solver {self.name!r} of {made.n} evaluations says that it is {self.fit.solver!r} of {self.fit.steps}")
        if isinstance(made, FittedRule) and (self.fit.guidance, self.fit.scale) != (self.name, made.scale):
            raise ConfigError(f"fitted guidance {self.name!r} of scale {made.scale:g} says that it is {self.fit.guidance!r} of scale {self.fit.scale:g}")
        if isinstance(made, RuleOptions | CacheOptions) and made.rule != self.name:
            raise ConfigError(f"options of {made.rule!r} are called {self.name!r}; they have the rule's name")
        if self.name not in self.scores_db:
            raise ConfigError(f"the fit {self.name!r} holds no score of its own; fit it again")

    @property
    def kind(self) -> str:
        """A key of KINDS."""
        return next(kind for kind, made in KINDS.items() if isinstance(self.artifact, made))

    def to_json(self) -> dict[str, Any]:
        """Plain values. Floats survive `json` exactly."""
        rest = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"version": VERSION, "kind": self.kind, **rest, "fit": asdict(self.fit), "artifact": self.artifact.to_json()}

    @classmethod
    def from_json(cls, data: Any) -> Fitted:
        """The artifact of `to_json`. Raises ConfigError for what is not one, is of another version, or as its parts do."""
        if not isinstance(data, Mapping) or data.get("version") != VERSION:
            found = data.get("version") if isinstance(data, Mapping) else type(data).__name__
            raise ConfigError(f"not a fit of version {VERSION} (found {found}); `reelstep fit` writes them")
        known = {"version", "kind", *(f.name for f in fields(cls))}
        if data.keys() != known or data["kind"] not in KINDS:
            raise ConfigError(f"a fit has the fields {sorted(known)} and a kind of {sorted(KINDS)}; got {sorted(data)}, {data.get('kind')!r:.80}")
        try:
            fit = Fit(**{**data["fit"], "tasks": tuple(data["fit"]["tasks"])})
            rest = {name: data[name] for name in ("name", "method", "model", "model_hash", "conditions", "scores_db")}
            return cls(fit=fit, artifact=KINDS[data["kind"]].from_json(data["artifact"]), **rest)
        except (TypeError, KeyError, AttributeError, NotFound) as error:
            raise ConfigError(f"a fit with parts of the wrong kind: {error}") from error

    def check_model(self, model: str, model_hash: str) -> None:
        """Raises ConfigError unless it was fitted to exactly this model."""
        if self.model != model:
            raise ConfigError(f"{self.name!r} was fitted to model {self.model!r}, not to {model!r}")
        if self.model_hash != model_hash:
            raise ConfigError(f"{self.name!r} was fitted to other weights of {model!r} ({self.model_hash[:12]}, not {model_hash[:12]}); fit it again")
