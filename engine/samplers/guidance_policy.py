"""A policy of guidance: at each evaluation the null velocity alone, the prompt's alone, or CFG with a scale of that evaluation's own.

All of them lie on one line, null + s (text - null), so a policy is a scale s for each evaluation: 0 is the null velocity and 1 the prompt's, at one
forward each; any other s is CFG, at two. Castillo et al. 2023, arXiv:2312.12487, section 3. Searched by `training.policy_search` for one model,
table and scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from reelstep.engine.samplers.guidance import GuidanceState, Guided, Query, Rule, null_only, text_only
from reelstep.engine.samplers.guidance.cfg import combine
from reelstep.engine.samplers.ns import Table
from reelstep.errors import ConfigError


def forwards_of(scale: float) -> int:
    """What one evaluation costs."""
    return 1 if scale in (0, 1) else 2


@dataclass(frozen=True)
class GuidancePolicy:
    """A fitted rule. scales: of each of the table's n evaluations. Raises ConfigError unless all is finite and in range."""

    scales: tuple[float, ...]
    scale: float  # of the full guidance that it stands for
    table: str  # hash of the one that it was fitted to
    pairs: int  # that it was fitted to

    def __post_init__(self) -> None:
        if not self.scales or not all(0 <= s < math.inf for s in self.scales):
            raise ConfigError(f"a policy of the scales {list(self.scales)[:20]}; one finite number from 0 upwards for each evaluation is needed")
        if not (1 < self.scale < math.inf and self.pairs >= 1 and self.table):
            raise ConfigError(
                f"a policy for scale {self.scale}, fitted to {self.pairs} pairs and table {self.table!r}; "
                "a finite scale above 1, at least one pair and a table's hash are needed"
            )

    @property
    def forwards(self) -> int:
        """Of a whole run."""
        return sum(map(forwards_of, self.scales))

    def check(self, table: Table, scale: float) -> None:
        """Raises ConfigError unless it was fitted for this table and scale."""
        if (self.table, self.scale, len(self.scales)) != (table.hash, scale, table.n):
            raise ConfigError(
                f"the policy was fitted to solver table {self.table[:12]} of {len(self.scales)} evaluations at scale {self.scale:g}, not to "
                f"{table.name!r} ({table.hash[:12]}) of {table.n} at scale {scale:g}; fit it again, or use guidance 'adaptive'"
            )

    def rule(self) -> Rule:
        """Of one run, from its first evaluation on. Raises ConfigError beyond the last evaluation of the policy."""

        def rule(x: Tensor, t: float, state: GuidanceState) -> Guided:
            if state.nfe >= len(self.scales):
                raise ConfigError(f"the policy was fitted for {len(self.scales)} evaluations and asked for one more; a run needs a state of its own")
            s = self.scales[state.nfe]
            if forwards_of(s) == 1:
                u = yield from (text_only if s else null_only)(x, t, state)
                return u
            text, null = yield Query(x, t, ("text", "null"))
            return combine(text, null, s)

        return rule

    def to_json(self) -> dict[str, Any]:
        """Plain values. Floats survive `json` exactly."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GuidancePolicy:
        """The policy of `to_json`. Raises ConfigError for missing, unknown or ill-typed fields and as the constructor does."""
        known = {f.name for f in fields(cls)}
        if data.keys() != known:
            raise ConfigError(f"a policy of guidance has the fields {sorted(known)}; got {sorted(data)}")
        try:
            return cls(tuple(map(float, data["scales"])), float(data["scale"]), str(data["table"]), int(data["pairs"]))
        except (TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"a policy of guidance holds something that is not a number: {error}") from error
