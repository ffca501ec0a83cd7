"""Non-stationary (NS) solvers: every solver with fixed coefficients is a table, and one loop runs them all.

x[i+1] = a[i] x[0] + sum over j <= i of (b[i][j] u[j] + noise[i][j] z[j]),  u[j] = velocity(x[j], t[j]),  z[j] fresh standard normal noise.
Shaul et al. 2024, arXiv:2403.01329, equation 11; the noises, for stochastic and re-noising samplers, are ours.

States, velocities and noises are tensors of any one shape; the algebra runs in float32, or in float64 if x[0] is float64.
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

Rows = tuple[tuple[float, ...], ...]
"""Lower-triangular: row i has i + 1 numbers."""

Fresh = Callable[[int], Tensor]
"""From a step j to its noise z[j], of x's shape. Asked for the same step by every row that has it, in any run that is resumed, so the answer
must depend on nothing but the request's seed and the step."""


@dataclass(frozen=True)
class Table:
    """An n-evaluation solver. times [n + 1]: those evaluated, then the final one. a [n], b [n][i + 1], noise like b, () for none. float64.

    order: of the global error; of that in the distribution (weak) if there is noise; 0 where more steps do not bring it to 0, as in the
    samplers of networks distilled to few steps.

    Raises ConfigError unless sizes agree, all is finite, and times do not decrease within [0, 1]. A time may repeat: Heun
    evaluates the end of a step and the start of the next.
    """

    name: str
    path: str  # that it was made for
    order: int
    times: tuple[float, ...]
    a: tuple[float, ...]
    b: Rows
    noise: Rows = ()

    def __post_init__(self) -> None:
        n = len(self.a)
        if n < 1 or len(self.times) != n + 1 or [len(row) for row in self.b] != list(range(1, n + 1)):
            raise ConfigError(f"table {self.name!r}: {len(self.times)} times, {n} a and {len(self.b)} rows of b; n a need n + 1 times and rows of 1, 2, ..., n")
        if self.noise and [len(row) for row in self.noise] != list(range(1, n + 1)):
            raise ConfigError(f"table {self.name!r}: {n} a and rows of noise of {[len(row) for row in self.noise]}; 1, 2, ..., n, or no rows at all")
        if not all(map(math.isfinite, (*self.times, *self.a, *(v for row in (*self.b, *self.noise) for v in row)))):
            raise ConfigError(f"table {self.name!r} holds a number that is not finite; build it again")
        if not (self.times[0] >= 0 and self.times[-1] <= 1 and all(s <= t for s, t in pairwise(self.times))):
            raise ConfigError(f"table {self.name!r}: times must not decrease and must lie in [0, 1]; got {list(self.times)}")
        if self.order < 0:
            raise ConfigError(f"table {self.name!r}: order {self.order}; at least 0")

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
        """For each row, how many of its leading terms (a x[0], b[0] u[0] + noise[0] z[0], ...) all later rows share, itself included.

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

    def _terms(self, i: int) -> tuple[object, ...]:
        return (self.a[i], *(zip(self.b[i], self.noise[i], strict=True) if self.noise else self.b[i]))

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
            times, a = (tuple(map(float, data[k])) for k in ("times", "a"))
            b, noise = (tuple(tuple(map(float, row)) for row in data[k]) for k in ("b", "noise"))
            return cls(str(data["name"]), str(data["path"]), int(data["order"]), times, a, b, noise)
        except (TypeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"a solver table holds something that is not a number: {error}") from error


def _common(left: tuple[object, ...], right: tuple[object, ...]) -> int:
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
    newest: tuple[Tensor, Tensor] | None = None  # the last (x, velocity), of step - 1, for previews


def start(table: Table, noise: Tensor) -> SamplerState:
    """The state before the first step. Half precision noise becomes float32."""
    x = noise if noise.dtype == torch.float64 else noise.float()
    return SamplerState(table.hash, 0, x, x, {})


def sample(table: Table, state: SamplerState, fresh: Fresh | None = None) -> Sampler:
    """Run `table` from `state`, which is kept up to date in place: at every yield it can be saved, and another generator continues from it bit for bit.

    fresh: of a table with noise; one without never asks it. Sums left to right, so that a table of Euler steps gives the bits of
    Euler's method. Raises ConfigError if the state belongs to another table, if a table with noise is given none, or if a velocity or
    a noise has another shape than x.
    """
    if state.table != table.hash:
        raise ConfigError(f"the state belongs to solver table {state.table[:12]}, not to {table.name!r} ({table.hash[:12]}); continue with its own table")
    if table.noise and fresh is None:
        raise ConfigError(f"solver table {table.name!r} adds fresh noise; give sample() a function from the step to it, or use a deterministic solver")
    while state.step < table.n:
        u = yield state.x, table.times[state.step]
        _advance(table, state, _like("velocity", u, state.x), fresh)
    return state.x


def _like(what: str, given: Tensor, x: Tensor) -> Tensor:
    """`given` in x's dtype. Raises ConfigError if it has another shape, even where it would broadcast."""
    if given.shape != x.shape:
        raise ConfigError(f"{what} has shape {list(given.shape)}; x has {list(x.shape)}")
    return given.to(x.dtype)


def _advance(table: Table, state: SamplerState, u: Tensor, fresh: Fresh | None) -> None:
    """Take row `state.step` of the table. Makes new tensors only, since drivers and savers may still hold the old ones."""
    i = state.step
    state.velocities, state.newest = {**state.velocities, i: u}, (state.x, u)
    done = table.settled[i - 1] if i else 0
    settled, x = table.settled[i], state.base
    for k in range(done, i + 2):
        x = _add_term(table, state, x, k, fresh)
        if k + 1 == settled:
            state.base = x
    state.x, state.step = x, i + 1
    state.velocities = {j: v for j, v in state.velocities.items() if j + 1 >= settled and table.last_use[j] > i}


def _add_term(table: Table, state: SamplerState, x: Tensor, k: int, fresh: Fresh | None) -> Tensor:
    """Term 0 scales x[0]; term j + 1 adds u[j] and z[j], unless its coefficient is 0 and it may be forgotten already."""
    i, j = state.step, k - 1
    if k == 0:
        return x * table.a[i]
    if table.b[i][j]:
        x = x + table.b[i][j] * state.velocities[j]
    if table.noise and table.noise[i][j]:
        assert fresh is not None
        x = x + table.noise[i][j] * _like(f"noise of step {j}", fresh(j), x)
    return x


def drive(generator: Generator[tuple[*Ask], Answer, Result], answer: Callable[[*Ask], Answer]) -> Result:
    """Run a generator to its end, answering each tuple it yields: a sampler with a velocity field (x, t), a guided one with a network (x, t, branches)."""
    try:
        ask = next(generator)
        while True:
            ask = generator.send(answer(*ask))
    except StopIteration as done:
        result: Result = done.value
        return result
