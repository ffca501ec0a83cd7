"""Bespoke non-stationary (BNS) solvers: all times and coefficients of a table, fitted to one velocity field.

The loss is the mean over samples of the logarithm of their mean square error at the end of the rollout, so easy samples keep
pulling; the gradient runs through every velocity. It starts from a midpoint or Euler table in the coordinates of a larger source
(sigma_0), and gives back the iterate that validates best, the start among them. A last polish solves for the final row, in which the result is
linear. Shaul et al. 2024, arXiv:2403.01329.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path as File

import numpy as np
import torch
from torch import Tensor, nn

from reelstep.engine.samplers.fold import Rule, fold, state, velocity
from reelstep.engine.samplers.ns import Table
from reelstep.engine.samplers.paths import Path
from reelstep.errors import ConfigError
from reelstep.training import checkpoint
from reelstep.training.field import Field, Fields, Fit, Pairs, validate
from reelstep.training.learning_rate import learning_rate

FLOOR = 1e-12  # of a mean square error, so that a perfect sample does not rule the mean of logarithms
POLISH_ROUNDS = 5
POLISHED = -1


@dataclass(frozen=True)
class Options:
    """How a fit runs. batch: pairs of one step; rows: of one forward and backward, to bound memory."""

    iterations: int = 400
    batch: int = 32
    rows: int = 8
    rate: float = 3e-3
    validate_every: int = 20
    seed: int = 0


def scaled_source(path: Path, sigma_0: float, r: float) -> tuple[float, float, float, float]:
    """t, t', s, s' at r of the change to the path (alpha, sigma_0 sigma): x_bar(r) = s x(t). At r = 1 only t and s are defined; the rest is nan.

    Shaul et al. 2024, equation 14, with the scheduler change of section 2.
    """
    bar = path.at(r)
    if bar.sigma == 0:
        return 1.0, math.nan, bar.alpha / path.at(1.0).alpha, math.nan
    t = path.time(sigma_0 * bar.sigma / bar.alpha) if bar.alpha else 0.0
    point, s_bar = path.at(t), sigma_0 * bar.sigma
    s = s_bar / point.sigma
    slope = point.sigma**2 * (s_bar * bar.d_alpha - bar.alpha * sigma_0 * bar.d_sigma) / (s_bar**2 * point.determinant)
    return t, slope, s, (point.sigma * sigma_0 * bar.d_sigma - s_bar * point.d_sigma * slope) / point.sigma**2


def initial_table(nfe: int, path: Path, sigma_0: float = 1.0) -> Table:
    """Midpoint for an even NFE, Euler for an odd one, in the coordinates of a source of deviation sigma_0, as a table in our own."""
    if nfe < 1:
        raise ConfigError(f"nfe={nfe}; at least 1")
    stages = 2 if nfe % 2 == 0 else 1
    r = [i / nfe for i in range(nfe + 1)]
    at = [scaled_source(path, sigma_0, each) for each in r]

    def x_bar(j: int) -> Rule:
        return at[j][2] * state(j)

    def u_bar(j: int) -> Rule:
        _, t_slope, s, s_slope = at[j]
        return s_slope * state(j) + t_slope * s * velocity(j)

    rules = []
    for i in range(nfe):
        begin = i - i % stages  # the second stage of midpoint steps from the start of its step with the velocity of its middle
        rules.append((x_bar(begin) + (r[i + 1] - r[begin]) * u_bar(i)) / at[i + 1][2])
    a, b, _ = fold(rules)
    return Table("bns", path.name, stages, tuple(t for t, *_ in at), a, b)


class Solver(nn.Module):
    """The free numbers of a table, float64: increments of its times through a softmax, so that they stay in order; a; b."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        steps = [max(t - s, 1e-6) for s, t in pairwise(table.times)]
        self.origin = table
        self.increments = nn.Parameter(torch.tensor(steps, dtype=torch.float64).log())
        self.a = nn.Parameter(torch.tensor(table.a, dtype=torch.float64))
        self.b = nn.ParameterList(torch.tensor(row, dtype=torch.float64) for row in table.b)

    def times(self) -> Tensor:
        """[n + 1], from 0 to 1."""
        return torch.cat([torch.zeros(1, dtype=torch.float64), torch.softmax(self.increments, 0).cumsum(0)])

    def forward(self, field: Field, noise: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The end of the rollout and the velocities on the way."""
        times, x = self.times().to(noise.dtype), noise
        velocities: list[Tensor] = []
        for i, row in enumerate(self.b):
            velocities.append(field(x, times[i]))
            x = self.a[i].to(noise.dtype) * noise
            for weight, u in zip(row.to(noise.dtype).unbind(0), velocities, strict=True):
                x = x + weight * u
        return x, velocities

    def table(self) -> Table:
        """As it is now. The first and last time are exact."""
        times = self.times().detach().clamp(0, 1).tolist()
        rows = tuple(tuple(row.tolist()) for row in self.b)
        return Table(self.origin.name, self.origin.path, 1, (0.0, *times[1:-1], 1.0), tuple(self.a.tolist()), rows)


def log_error(x: Tensor, truth: Tensor) -> Tensor:
    """log of each sample's mean square error, [B]. Shaul et al. 2024, equation 13."""
    return (x - truth).square().flatten(1).mean(1).add(FLOOR).log()


def fit_bns(
    initial: Table,
    train: tuple[Fields, Pairs],
    validation: tuple[Fields, Pairs],
    options: Options,
    progress: Callable[[int, float, float], None] = lambda iteration, loss, best: None,
    saved: File | None = None,
) -> Fit[Table]:
    """Fit from `initial`. progress hears (iteration, loss, best validation dB). saved: a file to resume from, the same numbers as without a break.

    The result's iteration is POLISHED where the polish made it better.

    Raises ConfigError if `initial` cannot be fitted: noise in it, or times that repeat.
    """
    if initial.noise or any(s >= t for s, t in pairwise(initial.times)) or initial.times[0] != 0 or initial.times[-1] != 1:
        raise ConfigError(f"table {initial.name!r} cannot be fitted: it needs times that increase from 0 to 1, and no fresh noise")
    fields, pairs = train
    solver = Solver(initial)
    optimizer = torch.optim.Adam(solver.parameters(), lr=options.rate)
    if saved is not None and (found := checkpoint.load(saved)) is not None:
        solver.load_state_dict(found["solver"])
        optimizer.load_state_dict(found["optimizer"])
        begin, fit = found["iteration"], Fit(**{**found["fit"], "solver": Table.from_json(found["fit"]["solver"])})
    else:
        begin, fit = 0, Fit.of(solver.table(), validate(solver.table(), *validation, options.rows))
    for iteration in range(begin, options.iterations):
        optimizer.param_groups[0]["lr"] = learning_rate(iteration, options.iterations, options.rate)
        chosen = np.random.default_rng((options.seed, iteration)).choice(len(pairs.noise), min(options.batch, len(pairs.noise)), replace=False)
        loss = step(solver, optimizer, fields, pairs, torch.from_numpy(chosen), options.rows)
        if not math.isfinite(loss):
            return replace(fit, note=f"the loss was {loss} at iteration {iteration}; the best iterate before it is kept. Try a lower rate")
        if (iteration + 1) % options.validate_every == 0 or iteration + 1 == options.iterations:
            fit = fit.after(iteration + 1, solver.table(), validate(solver.table(), *validation, options.rows))
            if saved is not None:
                state = {"iteration": iteration + 1, "solver": solver.state_dict(), "optimizer": optimizer.state_dict(), "fit": asdict(fit)}
                checkpoint.save(saved, state)
        progress(iteration + 1, loss, fit.best_db)
    polished = polish(fit.solver, fields, pairs, options.rows)
    return fit.better(POLISHED, polished, validate(polished, *validation, options.rows))


def step(solver: Solver, optimizer: torch.optim.Optimizer, fields: Fields, pairs: Pairs, chosen: Tensor, rows: int) -> float:
    """One step on the pairs `chosen`, their gradients summed over pieces of `rows`. Returns the loss; a loss that is not finite moves nothing."""
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for index in chosen.split(rows):
        x, _ = solver(fields(index), pairs.noise[index])
        loss = log_error(x, pairs.ends[index]).sum() / len(chosen)
        loss.backward()
        total += loss.item()
    if math.isfinite(total):
        nn.utils.clip_grad_norm_(solver.parameters(), 1.0)
        optimizer.step()
    return total


@torch.no_grad()
def polish(table: Table, fields: Fields, pairs: Pairs, rows: int) -> Table:
    """The same table with its last row solved for: a and b enter the result linearly there.

    Least squares with each sample weighted by 1 / its mean square error, a few times over: each round lowers the mean of
    logarithms, since the logarithm lies under its tangent. Normal equations in float64; no gradient, one rollout.
    """
    solver = Solver(table)
    grams, targets, energies = [], [], []
    for index in torch.arange(len(pairs.noise)).split(rows):
        _, velocities = solver(fields(index), pairs.noise[index])
        basis = torch.stack([pairs.noise[index], *velocities], 1).flatten(2).double()  # [B, n + 1, coordinates]
        ends = pairs.ends[index].flatten(1).double()
        grams.append(basis @ basis.mT / ends.shape[1])
        targets.append((basis @ ends[:, :, None])[:, :, 0] / ends.shape[1])
        energies.append(ends.square().mean(1))
    gram, target, energy = torch.cat(grams), torch.cat(targets), torch.cat(energies)
    row = torch.tensor([table.a[-1], *table.b[-1]], dtype=torch.float64)
    for _ in range(POLISH_ROUNDS):
        error = energy - 2 * target @ row + torch.einsum("i,bij,j->b", row, gram, row)
        weight = 1 / error.clamp_min(FLOOR)
        row = torch.linalg.lstsq((weight[:, None, None] * gram).sum(0), (weight[:, None] * target).sum(0), driver="gelsd").solution
    return Table(table.name, table.path, table.order, table.times, (*table.a[:-1], float(row[0])), (*table.b[:-1], tuple(row[1:].tolist())))
