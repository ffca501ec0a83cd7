"""Bespoke solvers: Euler or midpoint in coordinates of time and scale that are fitted to one field, without gradients through whole runs.

The base solver steps along xbar(r) = s_r x(t_r) on the equal grid r = 0, 1/n, ..., 1 and every step is mapped back. Only the values of t, s and their
derivatives in r at the nodes enter, so these are free numbers, and each step is linear in states and velocities, so the whole folds into a table.
Shaul et al. 2023, arXiv:2310.19075.

B samples, any shape behind; n steps; P points of a stored path; a node is a place where a velocity is asked for, or the end.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate, pairwise
from operator import mul
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from reelstep.engine.samplers.fold import Rule, fold
from reelstep.engine.samplers.ns import Table
from reelstep.engine.samplers.paths import CONDOT
from reelstep.errors import ConfigError
from reelstep.training import checkpoint
from reelstep.training.field import Field, Fields, Fit, Pairs, at_number, validate
from reelstep.training.learning_rate import learning_rate

N = TypeVar("N", float, Tensor)

KINDS = {"rk1": 1, "rk2": 2}
"""Base solvers: Euler and midpoint. The number is that of velocities in a step, and the order."""


@dataclass(frozen=True)
class ScaleTime(Generic[N]):
    """A scale-time transform at the nodes of a solver with m = KINDS[kind] velocities a step. t, s: [m n + 1]; d_t, d_s, derivatives in r: [m n]."""

    kind: str
    t: tuple[N, ...]
    d_t: tuple[N, ...]
    s: tuple[N, ...]
    d_s: tuple[N, ...]

    @property
    def steps(self) -> int:
        return len(self.d_t) // KINDS[self.kind]


@dataclass(frozen=True)
class Bespoke(ScaleTime[float]):
    """A transform that makes a solver. Float64.

    Raises ConfigError unless sizes agree, all is finite, t increases from 0 to 1, d_t and s are above 0, and s begins with 1, so that noise
    stays as it is. s may end anywhere: the last step divides by it.
    """

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"bespoke solver of kind {self.kind!r}; one of {', '.join(KINDS)}")
        nodes, sizes = len(self.d_t), [len(values) for values in (self.t, self.d_t, self.s, self.d_s)]
        if not nodes or nodes % KINDS[self.kind] or sizes != [nodes + 1, nodes, nodes + 1, nodes]:
            raise ConfigError(f"bespoke {self.kind}: sizes {sizes} of t, d_t, s, d_s; p + 1, p, p + 1, p, where n steps have p = {KINDS[self.kind]} n")
        if not all(map(math.isfinite, (*self.t, *self.d_t, *self.s, *self.d_s))):
            raise ConfigError(f"bespoke {self.kind} holds a number that is not finite; fit it again")
        if self.t[0] != 0 or self.t[-1] != 1 or not all(p < q for p, q in pairwise(self.t)):
            raise ConfigError(f"bespoke {self.kind}: t must increase from 0 to 1; got {list(self.t)}")
        if self.s[0] != 1 or min(*self.s, *self.d_t) <= 0:
            raise ConfigError(f"bespoke {self.kind}: s must begin with 1, and s and d_t be above 0; got s {list(self.s)} and d_t {list(self.d_t)}")

    @classmethod
    def base(cls, kind: str, steps: int) -> Bespoke:
        """The base solver itself on equal steps: t_r = r, s_r = 1."""
        if kind not in KINDS or steps < 1:
            raise ConfigError(f"bespoke solver of kind {kind!r} with {steps} steps; one of {', '.join(KINDS)}, and at least 1 step")
        nodes = KINDS[kind] * steps
        return cls(kind, tuple(k / nodes for k in range(nodes + 1)), (1.0,) * nodes, (1.0,) * (nodes + 1), (0.0,) * nodes)

    @property
    def parameters(self) -> int:
        """Free numbers, 4n - 1 or 8n - 1: all but the ends of t and the start of s."""
        return 4 * len(self.d_t) - 1

    def table(self, path: str) -> Table:
        """The same solver for the one loop. path: the name of the one that the field follows."""
        return Table(f"bespoke_{self.kind}", path, KINDS[self.kind], self.t, *fold(rules(self)))

    def to_json(self) -> dict[str, Any]:
        """Plain values. Floats survive `json` exactly."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Bespoke:
        """The solver of `to_json`. Raises ConfigError for missing, unknown or ill-typed fields and as the constructor does."""
        known = [f.name for f in fields(cls)]
        if data.keys() != set(known):
            raise ConfigError(f"a bespoke solver has the fields {sorted(known)}; got {sorted(data)}")
        try:
            numbers = [tuple(map(float, data[name])) for name in known if name != "kind"]
        except (TypeError, ValueError) as error:
            raise ConfigError(f"a bespoke solver holds something that is not a number: {error}") from error
        return cls(str(data["kind"]), *numbers)


def rows(transform: ScaleTime[N], step: int) -> list[tuple[tuple[N, ...], N]]:
    """What a step computes, one after the other: (c over its states so far, d on the velocity at the newest). Equations 17, 19 and 20.

    The state in the middle of a midpoint step is divided by its s here, as the field wants it.
    """
    f, h, k = transform, 1 / transform.steps, KINDS[transform.kind] * step
    if f.kind == "rk1":
        return [_euler(f, k, h)]
    end = f.s[k + 2]
    return [_euler(f, k, h / 2), ((f.s[k] / end, h * f.d_s[k + 1] / end), h * f.d_t[k + 1] * f.s[k + 1] / end)]


def _euler(f: ScaleTime[N], k: int, h: float) -> tuple[tuple[N], N]:
    """From node k to the next, h away in r."""
    return ((f.s[k] + h * f.d_s[k]) / f.s[k + 1],), h * f.d_t[k] * f.s[k] / f.s[k + 1]


def rules(transform: ScaleTime[float]) -> list[Rule]:
    """The whole solver as general rules over the states and velocities at its nodes, for `fold`."""
    first = range(0, len(transform.d_t), KINDS[transform.kind])
    return [Rule({k + j: v for j, v in enumerate(c)}, {k + len(c) - 1: d}) for step, k in enumerate(first) for c, d in rows(transform, step)]


def take_step(transform: ScaleTime[Tensor], step: int, x: Tensor, field: Field) -> Tensor:
    """The state after `step`, from x [B, ...] before it."""
    states, first = [x], KINDS[transform.kind] * step
    for c, d in rows(transform, step):
        u = field(states[-1], transform.t[first + len(c) - 1].to(x))
        states.append(d * u + sum(v * y for v, y in zip(c, states, strict=True)))
    return states[-1]


@dataclass(frozen=True)
class Paths:
    """The exact ways of some noises along a field that knows their conditions. times: [P], from 0 to 1; states, velocities: [P, B, ...]."""

    field: Field
    times: tuple[float, ...]
    states: Tensor
    velocities: Tensor

    def __post_init__(self) -> None:
        if len(self.times) < 2 or (self.times[0], self.times[-1]) != (0, 1) or not all(s < t for s, t in pairwise(self.times)):
            raise ConfigError(f"stored paths: times must increase from 0 to 1; got {list(self.times)}")
        sizes = list(self.states.shape), list(self.velocities.shape)
        if sizes[0] != sizes[1] or sizes[0][0] != len(self.times):
            raise ConfigError(f"stored paths: {len(self.times)} times, states and velocities {sizes}; one of each at every time")

    @classmethod
    @torch.no_grad()
    def of(cls, field: Field, states: Tensor) -> Paths:
        """From exact states [P, B, ...] at equally spaced times, asking the field for the velocity at each, also at t = 1.

        Raises ConfigError below 33 points, where interpolation would be what a fit sees.
        """
        if len(states) < 33:
            raise ConfigError(f"{len(states)} points of a stored path; at least 33")
        times = tuple(k / (len(states) - 1) for k in range(len(states)))
        return cls(field, times, states, torch.stack([at_number(field, x.dtype, x, t).to(x.dtype) for x, t in zip(states, times, strict=True)]))

    def at(self, t: float) -> tuple[Tensor, Tensor]:
        """States and velocities [B, ...] at any time, by cubic Hermite interpolation: its error falls with the gap's 4th power, a line's with its 2nd."""
        k = min(bisect_right(self.times, t), len(self.times) - 1)
        gap = self.times[k] - self.times[k - 1]
        q = (t - self.times[k - 1]) / gap
        p = 1 - q
        (x0, x1), (u0, u1) = self.states[k - 1 : k + 1], self.velocities[k - 1 : k + 1]
        x = p * p * ((1 + 2 * q) * x0 + q * gap * u0) + q * q * ((1 + 2 * p) * x1 - p * gap * u1)
        return x, 6 * p * q / gap * (x1 - x0) + p * (1 - 3 * q) * u0 + q * (1 - 3 * p) * u1

    def near(self, t: Tensor) -> Tensor:
        """States at t [], whose derivative in t is the velocity: gradients move t without going through the path's making. Equation 28."""
        held = t.detach()
        x, u = self.at(float(held))
        return x + (t - held) * u


def weights(transform: ScaleTime[Tensor], lipschitz: float) -> list[Tensor]:
    """By how much the steps AFTER each may grow the error that it leaves, M of equation 25; 1 for the last. lipschitz: that of the field, or a guess."""
    later = [growth(transform, step, lipschitz) for step in range(1, transform.steps)]
    return list(accumulate(reversed(later), mul, initial=torch.ones((), dtype=torch.float64)))[::-1]


def growth(transform: ScaleTime[Tensor], step: int, lipschitz: float) -> Tensor:
    """By how much a step may grow the distance of two states: its Lipschitz constant. Equations 48 and 49."""
    f, h, m = transform, 1 / transform.steps, KINDS[transform.kind]
    k = m * step
    slope = [f.d_s[j].abs() / f.s[j] + lipschitz * f.d_t[j] for j in range(k, k + m)]
    inner = h * slope[0] if m == 1 else h * slope[1] * (1 + h / 2 * slope[0])
    return f.s[k] / f.s[k + m] * (1 + inner)


def local_errors(transform: ScaleTime[Tensor], paths: Paths) -> Iterator[Tensor]:
    """What each step in turn misses if it begins on the exact path, root mean square of each sample, [B]. Equation 24."""
    stops = transform.t[:: KINDS[transform.kind]]
    for step, (s, t) in enumerate(pairwise(stops)):
        missed = (paths.near(t) - take_step(transform, step, paths.near(s), paths.field)).flatten(1)
        yield torch.linalg.vector_norm(missed, dim=1) / math.sqrt(missed.shape[1])  # whose gradient at 0 is 0


def loss_terms(transform: ScaleTime[Tensor], paths: Paths, lipschitz: float) -> Iterator[Tensor]:
    """The bound on the error at the end, averaged over samples, step by step: their sum is the loss. Equation 26."""
    for weight, error in zip(weights(transform, lipschitz), local_errors(transform, paths), strict=True):
        yield weight * error.mean()


def transform_of(kind: str, raw: Tensor) -> ScaleTime[Tensor]:
    """A valid transform from any numbers [4, nodes]; the base solver from zeros. Rows: of the increments of t by softmax, log d_t, log s, d_s."""
    increments, d_t, s, d_s = torch.softmax(raw[0], 0), raw[1].exp(), raw[2].exp(), raw[3]
    zero, one = raw.new_tensor([[0.0], [1.0]])
    t = torch.cat([zero, increments.cumsum(0)[:-1], one])
    return ScaleTime(kind, t.unbind(), d_t.unbind(), torch.cat([one, s]).unbind(), d_s.unbind())


def solver_of(kind: str, raw: Tensor) -> Bespoke:
    """The solver of `transform_of`. Raises ConfigError for numbers so far out that it is none."""
    transform = transform_of(kind, raw.detach())
    return Bespoke(kind, *(tuple(map(float, values)) for values in (transform.t, transform.d_t, transform.s, transform.d_s)))


@dataclass(frozen=True)
class Options:
    """How a fit runs. lipschitz: of the field, a guess that weighs early steps against late ones; 1 in the paper. rows: of a validation run at once."""

    kind: str
    steps: int
    iterations: int = 250
    rate: float = 1e-2
    lipschitz: float = 1.0
    validate_every: int = 25
    rows: int = 64
    seed: int = 0


def fit_bespoke(
    train: Sequence[Paths],
    validation: tuple[Fields, Pairs],
    options: Options,
    progress: Callable[[int, float, float], None] = lambda iteration, loss, best: None,
    saved: Path | None = None,
) -> Fit[Bespoke]:
    """Fit from the base solver, a batch of reference paths in each iteration. progress hears (iterations done, loss, best validation dB).

    saved: a file to resume from, to the same numbers as without a break. A loss that is not finite ends the fit with a note.
    Raises ConfigError for options that make no solver, for no paths, and for a file of a fit with other options.
    """
    base = Bespoke.base(options.kind, options.steps)
    if not train:
        raise ConfigError("a fit needs reference paths; make at least one batch of them with Paths.of()")
    raw = torch.zeros(4, len(base.d_t), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([raw], lr=options.rate)
    if saved is not None and (found := checkpoint.load(saved)) is not None:
        if found["options"] != asdict(options):
            raise ConfigError(f"{saved} is of a fit with {found['options']}; continue with these, or give another file")
        done, fit = found["iteration"], Fit(**{**found["fit"], "solver": Bespoke.from_json(found["fit"]["solver"])})
        raw.data.copy_(found["raw"])
        optimizer.load_state_dict(found["optimizer"])
    else:
        start_db = validate(base.table(CONDOT.name), *validation, options.rows)
        done, fit = 0, Fit.of(base, start_db)
    for iteration in range(done, options.iterations):
        optimizer.param_groups[0]["lr"] = learning_rate(iteration, options.iterations, options.rate)
        loss = take_gradient(raw, draw(train, options.seed, iteration), options)
        if not math.isfinite(loss):
            return replace(fit, note=f"the loss was {loss} at iteration {iteration}; the best iterate before it is kept. Try a lower rate")
        optimizer.step()
        if (iteration + 1) % options.validate_every == 0 or iteration + 1 == options.iterations:
            try:
                solver = solver_of(options.kind, raw)
            except ConfigError as error:
                return replace(fit, note=f"iteration {iteration + 1} is no solver; the best before it is kept. Try a lower rate: {error}")
            fit = fit.after(iteration + 1, solver, validate(solver.table(CONDOT.name), *validation, options.rows))
            if saved is not None:
                state = {"iteration": iteration + 1, "raw": raw.detach(), "optimizer": optimizer.state_dict(), "fit": asdict(fit), "options": asdict(options)}
                checkpoint.save(saved, state)
        progress(iteration + 1, loss, fit.best_db)
    return fit


def draw(train: Sequence[Paths], seed: int, iteration: int) -> Paths:
    """The batch of an iteration: all in a random order, then all in another."""
    turn, place = divmod(iteration, len(train))
    return train[np.random.default_rng((seed, turn)).permutation(len(train))[place]]


def take_gradient(raw: Tensor, paths: Paths, options: Options) -> float:
    """Put the gradient of the loss into `raw.grad` and nowhere else. Returns the loss; nan too if only its gradient is not finite.

    Step by step, so that the activations of a whole run are never held.
    """
    raw.grad, loss = torch.zeros_like(raw), 0.0
    for term in loss_terms(transform_of(options.kind, raw), paths, options.lipschitz):
        term.backward(inputs=[raw], retain_graph=True)  # of the transform, which all terms share
        loss += term.item()
    return loss if raw.grad.isfinite().all() else math.nan
