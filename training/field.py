"""What fits of solvers are made against: velocity fields, exact ends, and the score that compares them.

B samples, any shape behind. All in the dtype of the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from scipy.integrate import solve_ivp
from scipy.interpolate import CubicSpline
from torch import Tensor, nn

from reelstep.engine.samplers.guidance import GuidanceState, Rule, guided
from reelstep.engine.samplers.ns import Table, drive, sample, start
from reelstep.errors import InternalError

Field = Callable[[Tensor, Tensor], Tensor]
"""The velocity u [B, ...] at x [B, ...] and time t [], differentiable in both. A field of many conditions knows which rows are asked."""

Fields = Callable[[Tensor], Field]
"""From the indices [B] of samples to the field that they live in: conditions differ from sample to sample."""

Network = Callable[[Tensor, float, tuple[str, ...]], tuple[Tensor, ...]]
"""The velocities of the branches of guidance at x [B, ...] and t, as a guided sampler asks for them."""

Networks = Callable[[Tensor], Network]
"""From the indices [B] of samples to the network with their conditions."""


@dataclass(frozen=True)
class Pairs:
    """noise x0 and exact ends x1, each [N, ...]. between: [P, N, ...], where known, exact states at P equally spaced times from 0 to 1."""

    noise: Tensor
    ends: Tensor
    between: Tensor | None = None

    def at(self, t: float) -> Tensor:
        """Exact states [N, ...] at any time, by a cubic spline. Raises InternalError where none between the ends is known."""
        if t == 1:
            return self.ends
        if self.between is None:
            raise InternalError("these pairs were solved for their ends alone; solve them with points")
        times = np.linspace(0, 1, len(self.between))
        near = max(0, min(int(t * (len(times) - 1)) - SPLINE // 2 + 1, len(times) - SPLINE))
        piece = self.between[near : near + SPLINE].double().flatten(1).numpy()
        x = CubicSpline(times[near : near + SPLINE], piece)(t)
        return torch.from_numpy(x).to(self.noise.dtype).view_as(self.noise)


SPLINE = 8  # points around a time that its spline goes through

S = TypeVar("S")


@dataclass(frozen=True)
class Fit(Generic[S]):
    """solver: the best iterate. Scores in dB (`score_db`) on the validation pairs: of the start, of the best. iteration: the best's, 0 for the start."""

    solver: S
    start_db: float
    best_db: float
    iteration: int
    history: tuple[tuple[int, float], ...]  # (iteration, validation dB)
    note: str = ""  # what went wrong, if anything did

    @classmethod
    def of(cls, solver: S, db: float) -> Fit[S]:
        """Before the first iteration."""
        return cls(solver, db, db, 0, ((0, db),))

    def better(self, iteration: int, solver: S, db: float) -> Fit[S]:
        """With this solver if it is better; NaN is not."""
        return replace(self, solver=solver, best_db=db, iteration=iteration) if db > self.best_db else self

    def after(self, iteration: int, solver: S, db: float) -> Fit[S]:
        """With one more validated iterate."""
        return replace(self.better(iteration, solver, db), history=(*self.history, (iteration, db)))


def square_error(x: Tensor, truth: Tensor) -> Tensor:
    """Mean over each sample's coordinates, [B]."""
    return (x - truth).square().flatten(1).mean(1)


def score_db(x: Tensor, truth: Tensor) -> Tensor:
    """-10 log10 of each sample's mean square error, [B]: PSNR for a range of 1, whatever the range. Higher is better."""
    return -10 * square_error(x, truth).clamp_min(1e-30).log10()


def solve(field: Field, noise: Tensor, tolerance: float = 1e-5, points: int = 2) -> Tensor:
    """States [points, ...] at equally spaced times of the path from `noise` at t = 0 to t = 1, the ends alone if there are 2.

    By scipy's adaptive RK45 with this relative and absolute tolerance.
    """

    def slope(t: float, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        u = field(torch.from_numpy(x).to(noise.dtype).view_as(noise), torch.tensor(t, dtype=noise.dtype))
        return u.double().numpy().ravel()

    with torch.no_grad():
        found = solve_ivp(slope, (0.0, 1.0), noise.double().numpy().ravel(), rtol=tolerance, atol=tolerance, t_eval=np.linspace(0, 1, points))
    if not found.success:
        raise InternalError(f"the reference solve failed: {found.message}")
    return torch.from_numpy(found.y.T.copy()).to(noise.dtype).view(points, *noise.shape)


@torch.no_grad()
def validate(table: Table, fields: Fields, pairs: Pairs, rows: int) -> float:
    """Mean score in dB of a table, run as the engine runs it, `rows` samples at once."""
    scores = []
    for index in torch.arange(len(pairs.noise)).split(rows):
        noise, field = pairs.noise[index], fields(index)
        x = drive(sample(table, start(table, noise)), partial(at_number, field, noise.dtype))
        scores.append(score_db(x, pairs.ends[index]))
    return float(torch.cat(scores).mean())


@torch.no_grad()
def ends_under(
    networks: Networks, table: Table, rule: Rule, noises: Tensor, rows: int, progress: Callable[[int, int], None] = lambda done, of: None
) -> tuple[Tensor, float]:
    """Ends of runs under a rule of guidance from noises [P, ...], `rows` at once, and the forwards of a run, mean. progress: runs done, of how many."""
    forwards, ends = 0, []
    for index in torch.arange(len(noises)).split(rows):
        state = GuidanceState()
        ends.append(drive(guided(sample(table, start(table, noises[index])), rule, state), networks(index)))
        forwards += state.forwards * len(index)
        progress(int(index[-1]) + 1, len(noises))
    return torch.cat(ends), forwards / len(noises)


def descend(optimizer: torch.optim.Optimizer, losses: Iterable[Tensor], clip: float | None = None) -> float:
    """One step on the sum of losses, made and differentiated one after the other, to bound memory. Returns it; one that is not finite moves nothing.

    clip: the norm to which the gradient is cut. If that norm is not finite, nothing moves either, and nan comes back.
    """
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for loss in losses:
        loss.backward()
        total += loss.item()
    if clip is not None and not nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip).isfinite():
        return math.nan
    if math.isfinite(total):
        optimizer.step()
    return total


def at_number(field: Field, dtype: torch.dtype, x: Tensor, t: float) -> Tensor:
    """The field, where the time is a number."""
    return field(x, torch.tensor(t, dtype=dtype))
