"""Search for a policy of guidance: which evaluations need both branches, which one of them does for the rest, and at which scales.

A softmax over the options of each evaluation relaxes the choice, and the gradient of what a run misses at its end goes through the whole of it, once
for each pair. Castillo et al. 2023, arXiv:2312.12487, section 3 and equation 6. What the paper leaves open is our choice:

- All options lie on one line, null + s (text - null), so a mixture is a mean scale, and a little of a high scale among text looks like full
  guidance for less. A policy that is drawn from the mixture does not. So a run takes the mean plus or minus the deviation, the sign of each
  evaluation drawn at random: the mean and variance of such a policy, and differentiable.
- The distance d is the mean square error at the end, as a share of what the prompt's velocity alone misses there, so that the few samples that
  guidance changes most do not decide for all. Its logarithm would reward a mixture for its luckiest draws.
- lambda is found for a budget of forwards: options of two are made less likely by as little as keeps the expected ones within it. The gradient
  knows, and is that of equation 6 for the lambda that holds the budget; where the budget is no bound, as that of full guidance, lambda is 0.
- It begins at full guidance, and the budget shrinks to the wanted one over half of the iterations. Begun in the middle of all options, it was
  often caught in a policy far from the best. The optimizer is Adam.
- The likeliest policy within the budget has its likeliest neighbours tried on some of the pairs, and gives way to one that misses less.

P pairs, B of them at once, n evaluations, m options.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from reelstep.engine.samplers.guidance import GuidanceState, Guided, Query, Rule, guided, text_only
from reelstep.engine.samplers.guidance.cfg import combine
from reelstep.engine.samplers.guidance_policy import GuidancePolicy, forwards_of
from reelstep.engine.samplers.ns import Table, drive, sample, start
from reelstep.errors import ConfigError
from reelstep.training import checkpoint
from reelstep.training.field import Network, Networks, Pairs, descend, ends_under, square_error
from reelstep.training.learning_rate import learning_rate

HEAD_START = 6.0  # of the full scale's logit over that of null, at the start; the others lie between, the nearer the higher, so text is ahead of null
LEAST = 0.1  # of the mean of what no guidance misses: a sample that needs guidance less than that does not weigh more
ALIKE = 1e-6  # of what no guidance misses: between policies that are this near, the cheaper is better

Choice = tuple[int, ...]
"""A policy by the number of each evaluation's option."""

Progress = Callable[[str, int, int, float], None]
"""Hears what is done ("search", "neighbours"), how much of it, of how much, and what was missed last."""


@dataclass(frozen=True)
class Options:
    """How a search runs. multiples: of the scale, for CFG, beside null and text. batch: pairs of one step; rows: of one forward and backward, to
    bound memory. trials: neighbours that are tried, on the first `judges` pairs. Raises ConfigError for numbers out of range."""

    multiples: tuple[float, ...] = (0.5, 1.0, 2.0)
    iterations: int = 60
    batch: int = 8
    rows: int = 8
    rate: float = 0.2
    trials: int = 16
    judges: int = 16
    save_every: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.multiples or not all(0 < a < math.inf for a in self.multiples):
            raise ConfigError(f"multiples {list(self.multiples)} of the scale; finite numbers above 0, such as 0.5 1 2")
        if min(self.iterations, self.batch, self.rows, self.judges, self.save_every) < 1 or self.trials < 0:
            raise ConfigError(f"{self}; whole numbers from 1, trials from 0")
        if not 0 < self.rate < math.inf:
            raise ConfigError(f"rate {self.rate}; a finite number above 0, such as 0.2")


@dataclass(frozen=True)
class Found:
    """probabilities [n][m]: of the options `scales`, where the training ended. likeliest: the policy that they give. missed: by `policy`, on the
    pairs it was tried on, as a share of what no guidance misses, as `losses` are, of the relaxed runs of each iteration."""

    policy: GuidancePolicy
    likeliest: GuidancePolicy
    missed: float
    scales: tuple[float, ...]
    probabilities: tuple[tuple[float, ...], ...]
    losses: tuple[float, ...]
    note: str = ""  # what went wrong, if anything did


@dataclass(frozen=True)
class Problem:
    """What is searched, and where. scales, costs: of the options, [m] float64. unguided: what the prompt's velocity alone misses, [P]."""

    networks: Networks
    table: Table
    scale: float
    pairs: Pairs
    budget: int
    scales: Tensor
    costs: Tensor
    unguided: Tensor

    @classmethod
    def of(cls, networks: Networks, table: Table, scale: float, pairs: Pairs, budget: int, options: Options) -> Problem:
        """Raises as `search`, before any run."""
        check_budget(table, budget)
        scales = option_scales(scale, options.multiples)
        costs = torch.tensor([forwards_of(s) for s in scales], dtype=torch.float64)
        unguided = square_errors(networks, table, text_only, pairs, options.rows)
        least = max(LEAST * float(unguided.mean()), 1e-30)
        return cls(networks, table, scale, pairs, budget, torch.tensor(scales, dtype=torch.float64), costs, unguided.clamp_min(least))

    def policy(self, choice: Choice) -> GuidancePolicy:
        return GuidancePolicy(tuple(self.scales[list(choice)].tolist()), self.scale, self.table.hash, len(self.pairs.noise))

    def missed(self, choice: Choice, judges: int, rows: int) -> float:
        """By a policy as it is, on the first pairs."""
        some = Pairs(self.pairs.noise[:judges], self.pairs.ends[:judges])
        return float((square_errors(self.networks, self.table, self.policy(choice).rule(), some, rows) / self.unguided[:judges]).mean())


def check_budget(table: Table, budget: int) -> None:
    """Raises ConfigError for a number of forwards that leaves nothing to choose."""
    if not table.n < budget <= 2 * table.n:
        raise ConfigError(
            f"a budget of {budget} forwards for the {table.n} evaluations of {table.name!r}; more than {table.n}, which is guidance 'none', "
            f"up to {2 * table.n}, full guidance"
        )


def option_scales(scale: float, multiples: tuple[float, ...]) -> tuple[float, ...]:
    """Of null, text and CFG, increasing. Raises ConfigError if CFG is not among them."""
    scales = tuple(sorted({0.0, 1.0, *(a * scale for a in multiples)}))
    if len(scales) == 2:
        raise ConfigError(f"multiples {list(multiples)} of scale {scale:g} are the prompt's velocity alone; others are needed, such as 1 2")
    return scales


def search(
    networks: Networks,
    table: Table,
    scale: float,
    pairs: Pairs,
    budget: int,
    options: Options,
    progress: Progress = lambda what, done, of, missed: None,
    saved: File | None = None,
) -> Found:
    """Search a policy of at most `budget` forwards. pairs: noises, and the ends of full guidance from them on this table.

    saved: a file to resume from, the same numbers as without a break. Raises ConfigError for a budget or multiples that leave nothing to choose.
    """
    problem = Problem.of(networks, table, scale, pairs, budget, options)
    alpha, losses, note = train(problem, options, progress, saved)
    weights = probabilities(alpha, problem.costs, budget)
    first = likeliest(weights, problem.costs, budget)
    choice, missed = refine(problem, first, weights, options, progress)
    rows = tuple(map(tuple, weights.tolist()))
    return Found(problem.policy(choice), problem.policy(first), missed, tuple(problem.scales.tolist()), rows, tuple(losses), note)


def train(problem: Problem, options: Options, progress: Progress, saved: File | None) -> tuple[Tensor, list[float], str]:
    """Logits [n, m] float64 of the options, the losses on the way, and what went wrong."""
    n, full = problem.table.n, 2 * problem.table.n
    alpha = (-HEAD_START * (problem.scales / problem.scale - 1).abs()).repeat(n, 1).requires_grad_()
    optimizer = torch.optim.Adam([alpha], lr=options.rate)
    losses: list[float] = []
    if saved is not None and (found := checkpoint.load(saved)) is not None:
        alpha.data, losses = found["alpha"], found["losses"]
        optimizer.load_state_dict(found["optimizer"])
    for iteration in range(len(losses), options.iterations):
        optimizer.param_groups[0]["lr"] = learning_rate(iteration, options.iterations, options.rate)
        budget = problem.budget + (full - problem.budget) * max(0.0, 1 - 2 * iteration / options.iterations)
        loss = step(problem, alpha, optimizer, budget, np.random.default_rng((options.seed, iteration)), options)
        if not math.isfinite(loss):
            return alpha.detach(), losses, f"the loss was {loss} at iteration {iteration}; the search ended there. Try lower multiples of the scale"
        losses.append(loss)
        if saved is not None and (len(losses) % options.save_every == 0 or len(losses) == options.iterations):
            checkpoint.save(saved, {"alpha": alpha.detach(), "optimizer": optimizer.state_dict(), "losses": losses})
        progress("search", iteration + 1, options.iterations, loss)
    return alpha.detach(), losses, ""


def step(problem: Problem, alpha: Tensor, optimizer: torch.optim.Optimizer, budget: float, draw: np.random.Generator, options: Options) -> float:
    """One step on a batch, its gradients summed over pieces. Returns the loss; a loss that is not finite moves nothing."""
    pairs = problem.pairs
    chosen = torch.from_numpy(draw.choice(len(pairs.noise), min(options.batch, len(pairs.noise)), replace=False))
    signs = torch.from_numpy(draw.choice([-1.0, 1.0], (len(chosen), len(alpha))))

    def loss(piece: Tensor) -> Tensor:
        index = chosen[piece]
        weights = probabilities(alpha, problem.costs, budget)
        x = relaxed_ends(problem.networks(index), problem.table, weights, problem.scales, pairs.noise[index], signs[piece])
        return (square_error(x, pairs.ends[index]) / problem.unguided[index]).sum() / len(chosen)

    return descend(optimizer, map(loss, torch.arange(len(chosen)).split(options.rows)))


def probabilities(alpha: Tensor, costs: Tensor, budget: float) -> Tensor:
    """[n, m]: softmax(alpha - price costs), the price the least from 0 on that keeps the expected forwards within the budget. Differentiable.

    costs: 1 or 2 of each option. The budget is above n.
    """
    odds = alpha[:, costs == 2].logsumexp(1) - alpha[:, costs == 1].logsumexp(1)  # logarithms, of two forwards at price 0
    fixed, guided = odds.detach(), budget - len(alpha)
    if float(fixed.sigmoid().sum()) <= guided:
        return torch.softmax(alpha, 1)
    enough = float(fixed.max()) - math.log(guided / (len(alpha) - guided)) + 1e-9  # no evaluation is then above the mean
    found = brentq(lambda price: float((fixed - price).sigmoid().sum()) - guided, 0.0, enough)
    share = (odds - found).sigmoid()
    # A step of Newton's method from the solution: it moves nothing, and its gradient is the solution's.
    price = found + (share.sum() - guided) / (share * (1 - share)).sum().detach().clamp_min(1e-300)
    return torch.softmax(alpha - price * costs, 1)


def relaxed_ends(network: Network, table: Table, weights: Tensor, scales: Tensor, noise: Tensor, signs: Tensor) -> Tensor:
    """Ends [B, ...] of runs whose scale at each evaluation is the mean under `weights` [n, m], with the deviation added by `signs` [B, n]."""
    mean = weights @ scales
    deviation = (weights * (scales - mean[:, None]).square()).sum(1).clamp_min(1e-20).sqrt()  # the root has no gradient at 0
    drawn = (mean + signs * deviation).to(noise.dtype)

    def rule(x: Tensor, t: float, state: GuidanceState) -> Guided:
        text, null = yield Query(x, t, ("text", "null"))
        each: Any = drawn[:, state.nfe].view(-1, *(1,) * (x.ndim - 1))  # a number for each row, with a gradient
        return combine(text, null, each)

    return drive(guided(sample(table, start(table, noise)), rule, GuidanceState()), network)


def square_errors(networks: Networks, table: Table, rule: Rule, pairs: Pairs, rows: int) -> Tensor:
    """The mean square error of each sample's end under `rule`, [P]."""
    return square_error(ends_under(networks, table, rule, pairs.noise, rows)[0], pairs.ends)


def likeliest(weights: Tensor, costs: Tensor, budget: int) -> Choice:
    """The policy of at most `budget` forwards with the largest product of weights [n, m]."""
    one, two = (weights.where(costs == cost, 0.0).max(1) for cost in (1, 2))
    gain = two.values.log() - one.values.log()
    order = gain.argsort(descending=True, stable=True)[: budget - len(weights)]
    chosen = one.indices.clone()
    chosen[order] = torch.where(gain[order] > 0, two.indices[order], one.indices[order])
    return tuple(chosen.tolist())


def refine(problem: Problem, first: Choice, weights: Tensor, options: Options, progress: Progress) -> tuple[Choice, float]:
    """From `first` to the neighbour that misses less, or costs less and misses as much, and so on; and what it misses."""
    policy, missed, tried = first, problem.missed(first, options.judges, options.rows), {first}
    for trial in range(options.trials):
        untried = (near for near in neighbours(policy, weights, problem.costs, problem.budget) if near not in tried)
        if (candidate := next(untried, None)) is None:
            break
        tried.add(candidate)
        found = problem.missed(candidate, options.judges, options.rows)
        cheaper = problem.policy(candidate).forwards < problem.policy(policy).forwards
        if found < missed + (ALIKE if cheaper else -ALIKE):
            policy, missed = candidate, found
        progress("neighbours", trial + 1, options.trials, missed)
    return policy, missed


def neighbours(policy: Choice, weights: Tensor, costs: Tensor, budget: int) -> Iterator[Choice]:
    """Policies within the budget that have another option at one evaluation, or a dearer one and, elsewhere, a cheaper one; likeliest first."""
    log, cost = weights.clamp_min(1e-300).log().tolist(), costs.int().tolist()
    changes = [(log[i][o] - log[i][p], cost[o] - cost[p], i, o) for i, p in enumerate(policy) for o in range(len(cost)) if o != p]
    single = [(change,) for change in changes]
    double = list(product((c for c in changes if c[1] > 0), (c for c in changes if c[1] < 0)))
    spent = sum(cost[p] for p in policy)
    for change in sorted([*single, *double], key=lambda each: -sum(c[0] for c in each)):
        if spent + sum(c[1] for c in change) <= budget:
            new = {i: o for _, _, i, o in change}
            yield tuple(new.get(i, p) for i, p in enumerate(policy))
