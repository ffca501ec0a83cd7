"""LinearAG: at some evaluations the null velocity is not computed but estimated, by a fitted linear combination of what the network gave before.

null[j] ~ sum over i <= j of beta_text[j][i] text[i] + sum over i < j of beta_null[j][i] null[i], text[i] and null[i] the velocities of
evaluation i; where null[i] was itself estimated, the estimate stands for it. Two forwards where it is computed, one where it is estimated.
Castillo et al. 2023, arXiv:2312.12487, equation 10. Fitted by `training.linear_ag` for one model, table and scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from torch import Tensor

from reelstep.engine.samplers.guidance import GuidanceState, Guided, Query, Rule
from reelstep.engine.samplers.guidance.cfg import combine
from reelstep.engine.samplers.ns import Table
from reelstep.errors import ConfigError


@dataclass(frozen=True)
class LinearAG:
    """A fitted rule. policy: a letter for each of the table's n evaluations, C computed (CFG), L estimated; the first is C.

    Row j of the coefficients is evaluation j's, whether the policy estimates it or not, so that another policy needs no other fit: 0, 2, 3,
    ..., n of text and 0, 1, ..., n - 1 of null. Raises ConfigError unless sizes agree and all is finite.
    """

    policy: str
    beta_text: tuple[tuple[float, ...], ...]
    beta_null: tuple[tuple[float, ...], ...]
    scale: float
    table: str  # hash of the one that it was fitted to
    ridge: float  # of the fit, as a share of the mean energy of an output
    paths: int  # that it was fitted to
    r2: tuple[float, ...]  # share of null[j] that the estimate explains where its past is computed; 1 for the first, which is never estimated

    def __post_init__(self) -> None:
        n = len(self.policy)
        if self.policy[:1] != "C" or set(self.policy) - {"C", "L"}:
            raise ConfigError(f"policy {self.policy[:200]!r}; letters C (computed) and L (estimated), one for each evaluation, and C first")
        sizes = [[len(row) for row in rows] for rows in (self.beta_text, self.beta_null)]
        if sizes != [[0, *range(2, n + 1)], [*range(n)]] or len(self.r2) != n:
            raise ConfigError(
                f"a policy of {n} evaluations with {len(self.r2)} r2, and coefficients of lengths {sizes[0]} (text) and {sizes[1]} (null); "
                "n r2, and rows of 0, 2, 3, ..., n (text) and 0, 1, ..., n - 1 (null) are needed"
            )
        if not all(map(math.isfinite, (*self.r2, *(v for row in (*self.beta_text, *self.beta_null) for v in row)))):
            raise ConfigError("LinearAG holds a number that is not finite; fit it again")
        if not (1 < self.scale < math.inf and 0 <= self.ridge < math.inf and self.paths >= 1 and self.table):
            raise ConfigError(
                f"LinearAG of scale {self.scale}, ridge {self.ridge}, {self.paths} paths and table {self.table!r}; "
                "a scale above 1, a ridge from 0, both finite, at least one path and a table's hash are needed"
            )

    @property
    def forwards(self) -> int:
        """Of a whole run."""
        return len(self.policy) + self.policy.count("C")

    @property
    def largest(self) -> float:
        """The largest coefficient. Large ones of both signs amplify what half precision rounds away."""
        return max((abs(v) for row in (*self.beta_text, *self.beta_null) for v in row), default=0.0)

    @cached_property
    def last_use(self) -> dict[str, int]:
        """For each output by name, the last estimate that has it with a coefficient other than 0; none for those without any."""
        estimates = [j for j, letter in enumerate(self.policy) if letter == "L"]
        return {name: j for j in estimates for name, beta in self._terms(j) if beta}

    def check(self, table: Table, scale: float) -> None:
        """Raises ConfigError unless it was fitted for this table and scale."""
        if (self.table, self.scale) != (table.hash, scale):
            raise ConfigError(
                f"LinearAG was fitted to solver table {self.table[:12]} at scale {self.scale:g}, not to {table.name!r} ({table.hash[:12]}) "
                f"at scale {scale:g}; fit it again, or use guidance 'adaptive'"
            )

    def rule(self) -> Rule:
        """Of one run, from its first evaluation on. Past outputs live in `state.memory` until the last estimate that needs them.

        Raises ConfigError beyond the last evaluation of the policy.
        """

        def rule(x: Tensor, t: float, state: GuidanceState) -> Guided:
            j = state.nfe
            if j >= len(self.policy):
                raise ConfigError(f"LinearAG was fitted for {len(self.policy)} evaluations and asked for one more; a run needs a state of its own")
            if self.policy[j] == "C":
                text, null = yield Query(x, t, ("text", "null"))
            else:
                (text,) = yield Query(x, t, ("text",))
                text = text.to(x.dtype)
                null = self._estimate(j, text, state.memory)
            known = {**state.memory, f"text{j}": text, f"null{j}": null}
            state.memory = {name: output for name, output in known.items() if self.last_use.get(name, j) > j}
            return combine(text, null, self.scale)

        return rule

    def _estimate(self, j: int, text: Tensor, memory: Mapping[str, Tensor]) -> Tensor:
        """null[j], in the dtype of `text`, whatever that of the past outputs is."""
        *past, (_, beta) = self._terms(j)
        null = beta * text
        for name, beta in past:
            if beta:
                null = null + beta * memory[name].to(text.dtype)
        return null

    def _terms(self, j: int) -> list[tuple[str, float]]:
        """Names and coefficients of evaluation j's estimate, text[j] last."""
        nulls = [(f"null{i}", beta) for i, beta in enumerate(self.beta_null[j])]
        return nulls + [(f"text{i}", beta) for i, beta in enumerate(self.beta_text[j])]

    def to_json(self) -> dict[str, Any]:
        """Plain values. Floats survive `json` exactly."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LinearAG:
        """The rule of `to_json`. Raises ConfigError for missing, unknown or ill-typed fields and as the constructor does."""
        known = {f.name for f in fields(cls)}
        if data.keys() != known:
            raise ConfigError(f"LinearAG has the fields {sorted(known)}; got {sorted(data)}")
        try:
            text, null = (tuple(tuple(map(float, row)) for row in data[k]) for k in ("beta_text", "beta_null"))
            scale, ridge, r2 = float(data["scale"]), float(data["ridge"]), tuple(map(float, data["r2"]))
            return cls(str(data["policy"]), text, null, scale, str(data["table"]), ridge, int(data["paths"]), r2)
        except (TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"LinearAG holds something that is not a number: {error}") from error


def alternate(n: int) -> str:
    """The policy of the paper: of the first half of n evaluations every other one is computed, from the first on, and none later. 5/4 n forwards."""
    return "".join("C" if 2 * j < n and j % 2 == 0 else "L" for j in range(n))
