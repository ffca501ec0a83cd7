"""Artifacts of fits: a solver table that belongs to one model, and the conditions under which it was fitted and holds.

A fitted solver follows one velocity field. Another scale, rule of guidance or model is another field, on which it may be worse than any plain
solver: it is refused there, not tried.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from reelstep.engine.request import Fit
from reelstep.engine.samplers.ns import Table
from reelstep.errors import ConfigError

VERSION = 1


@dataclass(frozen=True)
class Fitted:
    """name: as requests ask for it. method: bns, bespoke_rk2, ... conditions: how it was fitted, for people. scores_db: on validation samples, by solver.

    Raises ConfigError for a score that is missing or not finite.
    """

    name: str
    method: str
    model: str
    model_hash: str  # `hash_weights` of the model it was fitted to
    fit: Fit
    table: Table
    conditions: Mapping[str, Any]
    scores_db: Mapping[str, float]

    def __post_init__(self) -> None:
        if self.fit.steps != self.table.n:
            raise ConfigError(f"fitted solver {self.name!r} says {self.fit.steps} steps, but its table has {self.table.n}")
        if self.name not in self.scores_db:
            raise ConfigError(f"fitted solver {self.name!r} holds no score of its own; fit it again")

    def to_json(self) -> dict[str, Any]:
        """Plain values. Floats survive `json` exactly."""
        return {"version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, data: Any) -> Fitted:
        """The artifact of `to_json`. Raises ConfigError for what is not one, is of another version, or as `Table.from_json` does."""
        if not isinstance(data, Mapping) or data.get("version") != VERSION:
            found = data.get("version") if isinstance(data, Mapping) else type(data).__name__
            raise ConfigError(f"not a fitted solver of version {VERSION} (found {found}); `reelstep fit` writes them")
        known = {"version", *(f.name for f in fields(cls))}
        if data.keys() != known:
            raise ConfigError(f"a fitted solver has the fields {sorted(known)}; got {sorted(data)}")
        try:
            fit = Fit(**{**data["fit"], "tasks": tuple(data["fit"]["tasks"])})
            rest = {name: data[name] for name in ("name", "method", "model", "model_hash", "conditions", "scores_db")}
            return cls(fit=fit, table=Table.from_json(data["table"]), **rest)
        except (TypeError, KeyError) as error:
            raise ConfigError(f"a fitted solver with fields of the wrong kind: {error}") from error

    def check_model(self, model: str, model_hash: str) -> None:
        """Raises ConfigError unless it was fitted to exactly this model."""
        if self.model != model:
            raise ConfigError(f"solver {self.name!r} was fitted to model {self.model!r}, not to {model!r}")
        if self.model_hash != model_hash:
            raise ConfigError(f"solver {self.name!r} was fitted to other weights of {model!r} ({self.model_hash[:12]}, not {model_hash[:12]}); fit it again")
