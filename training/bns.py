"""Bespoke non-stationary (BNS) solvers: all times and coefficients of a table, fitted to one velocity field.

The loss is the mean over samples of the logarithm of their mean square error at the end of the rollout, so easy samples keep
pulling; the gradient runs through every velocity. A fit gives back the iterate that validates best, the start among them. A last polish solves for
the final row, in which the result is linear. Shaul et al. 2024, arXiv:2403.01329.

The paper starts from a midpoint or Euler table in the coordinates of a larger source (`initial_table`). `solve_rows` is ours: from the times of such a
table it solves for one row after the other, and is so near to the end of a fit that a few tens of iterations do for a network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reelstep.engine.samplers.fold import Rule, fold, state, velocity
from reelstep.engine.samplers.ns import Table
from reelstep.engine.samplers.paths import Path
from reelstep.errors import ConfigError
from reelstep.training.field import Field, Fields, Fit, Pairs, square_error, validate
from reelstep.training.learning_rate import learning_rate
from reelstep.training.trainer import ALONE, Processes, Trainer

FLOOR = 1e-12  # of a mean square error, so that a perfect sample does not rule the mean of logarithms
REWEIGHTINGS = 5
HELD_BACK = 1e-6  # share of the greatest eigenvalue; below it lies what rounding does
POLISHED = -1


@dataclass(frozen=True)
class Options:
    """How a fit runs. batch: pairs of one step; rows: of one forward and backward, to bound memory.

    rate: how far one step of Adam moves a state, as a share of the start's error. times_rate: how far it moves the logarithm of a gap between times.
    """

    iterations: int = 400
    batch: int = 32
    rows: int = 8
    rate: float = 0.05
    times_rate: float = 0.02
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


@torch.no_grad()
def solve_rows(table: Table, fields: Fields, pairs: Pairs, rows: int) -> Table:
    """A table of the same times, of which each row in turn brings the states nearest to the exact ones at the next time.

    From the states that the rows before it reach, so it makes good what they left. As many forwards as one run; no gradient.
    """
    x, basis, table_rows = pairs.noise, [pairs.noise], list[list[float]]()
    for t, end in pairwise(table.times):
        basis.append(evaluate(fields, x, torch.tensor(t, dtype=x.dtype), rows))
        row = Moments.of(torch.stack(basis, 1), pairs.at(end)).nearest_row()
        table_rows.append(row.tolist())
        x = combine(row, basis)
    return with_rows(replace(table, order=1), table_rows)


def evaluate(fields: Fields, x: Tensor, t: Tensor, rows: int) -> Tensor:
    """Velocities of all samples, `rows` at once."""
    return torch.cat([fields(index)(x[index], t) for index in torch.arange(len(x)).split(rows)])


def combine(row: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """The state that a row makes of (noise, u_0, u_1, ...), summed left to right in their dtype."""
    weights = row.to(basis[0].dtype).unbind(0)
    x = weights[0] * basis[0]
    for weight, part in zip(weights[1:], basis[1:], strict=True):
        x = x + weight * part
    return x


def with_rows(table: Table, rows: Sequence[Sequence[float]]) -> Table:
    """The table with other coefficients: each row is a[i], b[i][0], ..., b[i][i]."""
    return replace(table, a=tuple(row[0] for row in rows), b=tuple(tuple(row[1:]) for row in rows))


@dataclass(frozen=True)
class Moments:
    """What least squares on one row needs, of each sample, mean over coordinates in float64. gram: [B, i + 2, i + 2] of (noise, u_0, ..., u_i)."""

    gram: Tensor
    target: Tensor  # [B, i + 2], with the wanted state
    energy: Tensor  # [B], of the wanted state

    @classmethod
    def of(cls, basis: Tensor, wanted: Tensor) -> Moments:
        """basis: [B, i + 2, ...]; wanted: [B, ...]."""
        flat, ends = basis.flatten(2).double(), wanted.flatten(1).double()
        count = ends.shape[1]
        return cls(flat @ flat.mT / count, (flat @ ends[:, :, None])[:, :, 0] / count, ends.square().mean(1))

    def errors(self, row: Tensor) -> Tensor:
        """Mean square error of each sample, [B]."""
        return (self.energy - 2 * self.target @ row + torch.einsum("i,bij,j->b", row, self.gram, row)).clamp_min(FLOOR)

    def nearest_row(self) -> Tensor:
        """[i + 2], of the least mean of logarithms of errors: least squares with each sample weighted by 1 / its error, a few times over.

        Each round lowers that mean, since the logarithm lies under its tangent.
        """
        weight = torch.ones_like(self.energy)
        for _ in range(1 + REWEIGHTINGS):
            gram, target = (weight[:, None, None] * self.gram).sum(0), (weight[:, None] * self.target).sum(0)
            row = torch.linalg.lstsq(gram, target, driver="gelsd").solution
            weight = 1 / self.errors(row)
        return row


class Solver(nn.Module):
    """The free numbers of a table: of its times, the logarithms of gaps through a softmax, so that they stay in order; and its rows.

    A row is a[i], b[i][0], ..., b[i][i]. Neighbouring velocities are nearly collinear, so that steps on the coefficients themselves would go nowhere:
    free are moves from the table's rows, in coordinates where each changes the state by its own size, root mean square. scales: from moves to
    coefficients, [i + 2, i + 2] for each row, of `scales`. Free numbers are float32, as all that DeepSpeed trains; being moves from where they began,
    they lose nothing by it. What is made of them is float64.
    """

    def __init__(self, table: Table, scales: Sequence[Tensor]) -> None:
        super().__init__()
        steps = [max(t - s, 1e-6) for s, t in pairwise(table.times)]
        self.origin, self.scales, self.gaps = table, scales, torch.tensor(steps, dtype=torch.float64).log()
        self.widening = nn.Parameter(torch.zeros(len(steps)))
        self.moves = nn.ParameterList(torch.zeros(len(scale)) for scale in scales)

    def times(self) -> Tensor:
        """[n + 1], from 0 to 1."""
        return torch.cat([torch.zeros(1, dtype=torch.float64), torch.softmax(self.gaps + self.widening, 0).cumsum(0)])

    def rows(self) -> list[Tensor]:
        starts = (torch.tensor([a, *b], dtype=torch.float64) for a, b in zip(self.origin.a, self.origin.b, strict=True))
        return [start + scale @ move.double() for start, scale, move in zip(starts, self.scales, self.moves, strict=True)]

    def forward(self, field: Field, noise: Tensor) -> Tensor:
        """The end of the rollout."""
        times, x, basis = self.times().to(noise.dtype), noise, [noise]
        for t, row in zip(times, self.rows(), strict=False):
            basis.append(field(x, t))
            x = combine(row, basis)
        return x

    def table(self) -> Table:
        """As it is now. The first and last time are exact."""
        times = self.times().detach().clamp(0, 1).tolist()
        made = with_rows(self.origin, [row.tolist() for row in self.rows()])
        return replace(made, order=1, times=(0.0, *times[1:-1], 1.0))


@torch.no_grad()
def scales(table: Table, fields: Fields, pairs: Pairs, rows: int) -> list[Tensor]:
    """For each row, what turns moves into coefficients: over all samples of a run, a move of size 1 changes the state by 1, root mean square.

    From the eigenvectors of the inner products of noise and velocities; directions in which these hardly differ are held back.
    """
    basis = run(table, fields, pairs.noise, rows)
    gram = Moments.of(basis, pairs.noise).gram.mean(0).nan_to_num()  # a field that is not finite is told of at the first step, by its loss
    found = []
    for size in range(2, table.n + 2):
        values, vectors = torch.linalg.eigh(gram[:size, :size])
        found.append(vectors / values.clamp_min(HELD_BACK * float(values[-1])).sqrt())
    return found


@torch.no_grad()
def run(table: Table, fields: Fields, noise: Tensor, rows: int) -> Tensor:
    """Noise and the velocities of a run, [B, n + 1, ...]."""
    x, basis = noise, [noise]
    for t, a, b in zip(table.times, table.a, table.b, strict=False):
        basis.append(evaluate(fields, x, torch.tensor(t, dtype=x.dtype), rows))
        x = combine(torch.tensor([a, *b], dtype=torch.float64), basis)
    return torch.stack(basis, 1)


def log_error(x: Tensor, truth: Tensor) -> Tensor:
    """log of each sample's mean square error, [B]. Shaul et al. 2024, equation 13."""
    return square_error(x, truth).add(FLOOR).log()


def fit_bns(
    initial: Table,
    train: tuple[Fields, Pairs],
    validation: tuple[Fields, Pairs],
    options: Options,
    progress: Callable[[int, float, float], None] = lambda iteration, loss, best: None,
    saved: File | None = None,
    processes: Processes = ALONE,
) -> Fit[Table]:
    """Fit from `initial`. progress hears (iteration, loss, best validation dB). saved: a file to resume from, the same numbers as without a break.

    processes: that share each batch, and all give the same fit. The result's iteration is POLISHED where the polish made it better.

    Raises ConfigError if `initial` cannot be fitted: noise in it, or times that repeat; for a batch that the processes cannot share; and for a file that
    others saved.
    """
    if initial.noise or any(s >= t for s, t in pairwise(initial.times)) or initial.times[0] != 0 or initial.times[-1] != 1:
        raise ConfigError(f"table {initial.name!r} cannot be fitted: it needs times that increase from 0 to 1, and no fresh noise")
    fields, pairs = train
    batch = min(options.batch, len(pairs.noise))
    share = processes.share(batch, "pairs of a batch")
    solver = Solver(initial, scales(initial, fields, pairs, options.rows))
    groups: list[dict[str, Any]] = [{"params": [solver.widening]}, {"params": list(solver.moves)}]
    trainer = processes.trainer(solver, torch.optim.Adam(groups), small=True)
    if saved is not None and (found := processes.load(saved, {"solver": trainer})) is not None:
        begin, fit = found["iteration"], Fit(**{**found["fit"], "solver": Table.from_json(found["fit"]["solver"])})
    else:
        begin, fit = 0, Fit.of(initial, validate(initial, *validation, options.rows))
    rates = (options.times_rate, options.rate * 10 ** (-fit.start_db / 20))
    for iteration in range(begin, options.iterations):
        trainer.set_rates([learning_rate(iteration, options.iterations, rate) for rate in rates])
        chosen = np.random.default_rng((options.seed, iteration)).choice(len(pairs.noise), batch, replace=False)
        loss = step(solver, trainer, fields, pairs, torch.from_numpy(chosen)[share], options.rows)
        if not math.isfinite(loss):
            return replace(fit, note=f"the loss was {loss} at iteration {iteration}; the best iterate before it is kept. Try a lower rate")
        if (iteration + 1) % options.validate_every == 0 or iteration + 1 == options.iterations:
            fit = fit.after(iteration + 1, solver.table(), validate(solver.table(), *validation, options.rows))
            if saved is not None:
                processes.save(saved, {"iteration": iteration + 1, "fit": asdict(fit)}, {"solver": trainer})
        progress(iteration + 1, loss, fit.best_db)
    polished = polish(fit.solver, fields, pairs, options.rows)
    return fit.better(POLISHED, polished, validate(polished, *validation, options.rows))


def step(solver: Solver, trainer: Trainer, fields: Fields, pairs: Pairs, chosen: Tensor, rows: int) -> float:
    """One step on the pairs `chosen`, their gradients summed over pieces of `rows`. Returns the loss; a loss that is not finite moves nothing."""

    def loss(index: Tensor) -> Tensor:
        return log_error(solver(fields(index), pairs.noise[index]), pairs.ends[index]).sum() / len(chosen)

    return trainer.descend([partial(loss, index) for index in chosen.split(rows)])


def polish(table: Table, fields: Fields, pairs: Pairs, rows: int) -> Table:
    """The same table with its last row solved for: a and b enter the result linearly there. One run, no gradient."""
    last = Moments.of(run(table, fields, pairs.noise, rows), pairs.ends).nearest_row()
    return with_rows(table, [*([a, *b] for a, b in zip(table.a[:-1], table.b[:-1], strict=True)), last.tolist()])
