"""Non-stationary (NS) solvers: every deterministic solver with fixed coefficients is a table, and one loop runs them all.

x[i+1] = a[i] x[0] + sum over j <= i of b[i][j] u[j],  u[j] = velocity(x[j], t[j]).
Shaul et al. 2024, arXiv:2403.01329, equation 11.

States and velocities are tensors of any one shape; the algebra runs in float32, or in float64 if the noise is float64.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeVar, TypeVarTuple

import torch
from torch import Tensor

from reelstep.errors import ConfigError

Ask = TypeVarTuple("Ask")
Answer = TypeVar("Answer")
Result = TypeVar("Result")

Sampler = Generator[tuple[Tensor, float], Tensor, Tensor]
"""Yields (x, t), is sent the velocity there, returns the final state. The driver must not write to a velocity it has sent."""


@dataclass(frozen=True)
class Table:
    """An n-evaluation solver. times [n + 1]: those evaluated, then the final one. a [n], b [n][i + 1]. float64.

    Raises ConfigError unless sizes agree, all is finite, and times do not decrease within [0, 1]. A time may repeat: Heun
    evaluates the end of a step and the start of the next.
    """

    name: str
    path: str  # that it was made for
    order: int  # of the global error
    times: tuple[float, ...]
    a: tuple[float, ...]
    b: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        n = len(self.a)
        if n < 1 or len(self.times) != n + 1 or [len(row) for row in self.b] != list(range(1, n + 1)):
            raise ConfigError(f"table {self.name!r}: {len(self.times)} times, {n} a and {len(self.b)} rows of b; n a need n + 1 times and rows of 1, 2, ..., n")
        if not all(map(math.isfinite, (*self.times, *self.a, *(v for row in self.b for v in row)))):
            raise ConfigError(f"table {self.name!r} holds a number that is not finite; build it again")
        if not (self.times[0] >= 0 and self.times[-1] <= 1 and all(s <= t for s, t in pairwise(self.times))):
            raise ConfigError(f"table {self.name!r}: times must not decrease and must lie in [0, 1]; got {list(self.times)}")
        if self.order < 1:
            raise ConfigError(f"table {self.name!r}: order {self.order}; at least 1")

    @property
    def n(self) -> int:
        """NFE: velocities that it asks for."""
        return len(self.a)

    @cached_property
    def hash(self) -> str:
        """sha256 of the JSON form, hex. Equal for equal tables on every machine."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    @cached_property
    def settled(self) -> tuple[int, ...]:
        """For each row, how many of its leading terms (a x[0], b[0] u[0], ...) all later rows share, itself included.

        Their sum is formed once and what it was made of forgotten; the order of summation, and so every bit, stays.
        """
        counts = [self.n + 1]
        for i in reversed(range(self.n - 1)):
            counts.append(min(counts[-1], _common(self._terms(i), self._terms(i + 1))))
        return tuple(reversed(counts))

    @cached_property
    def last_use(self) -> tuple[int, ...]:
        """For each velocity the last row that has it with a coefficient other than 0; -1 for none."""
        return tuple(max((i for i in range(j, self.n) if self.b[i][j] != 0), default=-1) for j in range(self.n))

    def _terms(self, i: int) -> tuple[float, ...]:
        return (self.a[i], *self.b[i])

    def to_json(self) -> dict[str, Any]:
        """Plain values. Floats survive `json` exactly."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Table:
        """The table of `to_json`. Raises ConfigError for missing, unknown or ill-typed fields and as the constructor does."""
        known = {f.name for f in fields(cls)}
        if data.keys() != known:
            raise ConfigError(f"a solver table has the fields {sorted(known)}; got {sorted(data)}")
        try:
            numbers = {k: tuple(map(float, data[k])) for k in ("times", "a")}
            return cls(str(data["name"]), str(data["path"]), int(data["order"]), **numbers, b=tuple(tuple(map(float, row)) for row in data["b"]))
        except (TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"a solver table holds something that is not a number: {error}") from error


def _common(left: tuple[float, ...], right: tuple[float, ...]) -> int:
    """Length of the longest common start."""
    return next((k for k, (p, q) in enumerate(zip(left, right, strict=False)) if p != q), min(len(left), len(right)))


@dataclass
class SamplerState:
    """All that a sampler must remember between two calls. `vars(state)` is plain data that `torch.save` keeps bit for bit."""

    table: str  # hash of the table it belongs to
    step: int  # velocities received so far
    x: Tensor  # x[step], where the next velocity is wanted
    base: Tensor  # x[0], or the sum of the terms that every row from here on begins with (`Table.settled`)
    velocities: dict[int, Tensor]  # by step; those that a later row still needs
    newest: Tensor | None = None  # the last velocity, for previews


def start(table: Table, noise: Tensor) -> SamplerState:
    """The state before the first step. Half precision noise becomes float32."""
    x = noise if noise.dtype == torch.float64 else noise.float()
    return SamplerState(table.hash, 0, x, x, {})


def sample(table: Table, state: SamplerState) -> Sampler:
    """Run `table` from `state`, which is kept up to date in place: at every yield it can be saved, and another generator continues from it bit for bit.

    Sums left to right, so that a table of Euler steps gives the bits of Euler's method. Raises ConfigError if the state
    belongs to another table, or if a velocity has another shape than x.
    """
    if state.table != table.hash:
        raise ConfigError(f"the state belongs to solver table {state.table[:12]}, not to {table.name!r} ({table.hash[:12]}); continue with its own table")
    while state.step < table.n:
        u = yield state.x, table.times[state.step]
        if u.shape != state.x.shape:
            raise ConfigError(f"velocity has shape {list(u.shape)}; x has {list(state.x.shape)}")
        _advance(table, state, u.to(state.x.dtype))
    return state.x


def _advance(table: Table, state: SamplerState, u: Tensor) -> None:
    """Take row `state.step` of the table. Makes new tensors only, since drivers and savers may still hold the old ones."""
    i = state.step
    state.velocities, state.newest = {**state.velocities, i: u}, u
    done = table.settled[i - 1] if i else 0
    settled, x = table.settled[i], state.base
    for k in range(done, i + 2):
        x = _add_term(table, state, x, k)
        if k + 1 == settled:
            state.base = x
    state.x, state.step = x, i + 1
    state.velocities = {j: v for j, v in state.velocities.items() if j + 1 >= settled and table.last_use[j] > i}


def _add_term(table: Table, state: SamplerState, x: Tensor, k: int) -> Tensor:
    """Term 0 scales x[0]; term j + 1 adds u[j], unless its coefficient is 0 and it may be forgotten already."""
    i = state.step
    if k == 0:
        return x * table.a[i]
    coefficient = table.b[i][k - 1]
    return x + coefficient * state.velocities[k - 1] if coefficient else x


def drive(generator: Generator[tuple[*Ask], Answer, Result], answer: Callable[[*Ask], Answer]) -> Result:
    """Run a generator to its end, answering each tuple it yields: a sampler with a velocity field (x, t), a guided one with a network (x, t, branches)."""
    try:
        ask = next(generator)
        while True:
            ask = generator.send(answer(*ask))
    except StopIteration as done:
        result: Result = done.value
        return result
