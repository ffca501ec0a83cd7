"""Imagine Flash: a student that needs one to three steps, distilled from its guided teacher on the states that the student itself reaches.

The paper's: the student's state at t comes from its own steps from noise, without a gradient (backward distillation); its predicted data is
noised again to gamma(t), and what the teacher makes of that in k calls is the constant target (shifted reconstruction loss); an adversarial
term beside it; noise correction, which is `engine.samplers.noise_correction`. Kohler et al. 2024, arXiv:2405.05224.

Not known to us of the paper, so ours: gamma's values; the teacher's k, its times (equal steps, the k-th call gives its predicted data) and scale; all of
the adversarial term but that there is one (an MLP, hinge losses, the teacher's targets for real, the weight); optimiser, rates, batch; the
score that picks the best iterate. No data enters anywhere: noise and conditions are enough.

Two things to know of the losses, ours. The shifted one seeks modes: noise to gamma(t) and the teacher's way back draw a sample to the middle of its
mode, for data N(m, sd^2) to m + c (x - m) on average, c = sd alpha / sqrt(alpha^2 sd^2 + sigma^2) at gamma(t), so that a student whose ends are exact
still has a loss of 2 sd^2 (1 - c); the adversarial term works against it. The backward one has no such pull, and is 0 for an exact first step, but
the student's later states lie on the straight line from there, not where the teacher's path passes, and so its targets are no longer exact.

B samples, any shape behind; N student steps; k calls of the teacher. Networks give velocities; on any path, flow models on CondOT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path as File

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelstep.engine.samplers.convert import velocity_to_x1
from reelstep.engine.samplers.fold import Rule, Solver
from reelstep.engine.samplers.guidance import GUIDANCE, GuidanceState, guided
from reelstep.engine.samplers.noise_correction import noise_corrected
from reelstep.engine.samplers.ns import Table, drive, sample, start
from reelstep.engine.samplers.paths import PATHS, Path
from reelstep.engine.samplers.tables import SOLVERS, ddim
from reelstep.errors import ConfigError
from reelstep.training import checkpoint
from reelstep.training.field import Field, Fields, Network, Networks, at_number
from reelstep.training.learning_rate import learning_rate
from reelstep.training.trainer import ALONE, Processes, Trainer

Conditions = Callable[[np.random.Generator, int], Tensor]
"""Draws the indices [B] of as many conditions as asked."""


@dataclass(frozen=True)
class StudentGrid:
    """The steps that a student is made for, and no others. path: by name. times [N + 1]: from 0 to 1.

    gamma: for each time but the last, the one to which the teacher's input is noised again; None for backward distillation without the shift, where the
    teacher starts from the student's state. To increase, as the paper is described: near the noise the target may change the content, near the data only add
    detail. gamma(0) = 0 keeps nothing of the student where alpha is 0 there, and makes the first step predict the mean.
    noise_correction: as it will be at inference. It does nothing on flow paths.

    Raises ConfigError for times that do not increase from 0 to 1, and unless gamma has exactly these times and values in [0, 1).
    """

    path: str
    times: tuple[float, ...]
    gamma: Mapping[float, float] | None
    noise_correction: bool = False

    def __post_init__(self) -> None:
        if len(self.times) < 2 or (self.times[0], self.times[-1]) != (0, 1) or not all(s < t for s, t in pairwise(self.times)):
            raise ConfigError(f"times of a student increase from 0 (noise) to 1 (data), where it ends; got {list(self.times)}")
        if self.gamma is None:
            return
        if self.gamma.keys() != set(self.times[:-1]):
            raise ConfigError(f"gamma has the times {sorted(self.gamma)}; give one to each of the student's {list(self.times[:-1])}, and to no other")
        if not all(0 <= g < 1 for g in self.gamma.values()):  # NaN is not
            raise ConfigError(f"gamma {dict(self.gamma)}; values from 0 (noise) to below 1, where the teacher would have nothing to do")

    @classmethod
    def midway(cls, path: str, times: Sequence[float], noise_correction: bool = False) -> StudentGrid:
        """With gamma half way between each time and the next: our choice, since the paper's values are not known to us."""
        return cls(path, tuple(times), {s: (s + t) / 2 for s, t in pairwise(times)}, noise_correction)

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @cached_property
    def table(self) -> Table:
        """How the student is run, in training as at inference."""
        solver = SOLVERS["ddim"]
        return (noise_corrected(solver) if self.noise_correction else solver).build(self.times, PATHS[self.path])


@dataclass(frozen=True)
class Teacher:
    """How the teacher is run. nfe: k, velocities of one target. scale: of classifier-free guidance, which the student takes over; 1 for none.

    Raises NotFound for an unknown solver, ConfigError for one that has more than one velocity a step or adds noise, and for k or scale below 1.
    """

    nfe: int
    scale: float
    solver: str = "dpmpp_2m"  # the paper's teacher runs DPM-Solver

    def __post_init__(self) -> None:
        solver = SOLVERS[self.solver]
        if solver.evaluations != 1 or solver.stochastic:
            raise ConfigError(f"teacher solver {self.solver!r}; one with one velocity a step and no fresh noise, such as 'dpmpp_2m'")
        if self.nfe < 1:
            raise ConfigError(f"teacher nfe={self.nfe}; at least 1")
        if not 1 <= self.scale < math.inf:
            raise ConfigError(f"teacher scale {self.scale}; at least 1, which is without guidance")

    def table(self, t: float, path: Path) -> Table:
        """k equal steps from t, of which the last gives the predicted data of the k-th call."""
        return ending_in_data(SOLVERS[self.solver]).build([t + (1 - t) * i / self.nfe for i in range(self.nfe)] + [1.0], path)

    @torch.no_grad()
    def data(self, network: Network, x: Tensor, t: float, path: Path) -> Tensor:
        """What it makes of states x at t, guided; a constant."""
        table = self.table(t, path)
        return drive(guided(sample(table, start(table, x)), GUIDANCE["cfg"].build(self.scale, path, {}), GuidanceState()), network)


def ending_in_data(solver: Solver) -> Solver:
    """The same solver, but the last step goes all the way to its predicted data. For those of one velocity a step."""

    def recipe(times: Sequence[float], path: Path) -> tuple[Sequence[float], Sequence[Rule]]:
        nodes, rules = solver.recipe(times, path)
        return nodes, [*rules[:-1], ddim.x1(len(rules) - 1, times, path)]

    return Solver(f"{solver.name}_x1", solver.order, 1, recipe)


@torch.no_grad()
def student_state(student: Field, grid: StudentGrid, noise: Tensor, step: int) -> Tensor:
    """The state before `step`, 0 to N - 1, that the student's own run from noise [B, ...] reaches; a constant."""
    sampler = sample(grid.table, start(grid.table, noise))
    x, t = next(sampler)
    for _ in range(step):
        x, t = sampler.send(at_number(student, x.dtype, x, t))
    return x


@torch.no_grad()
def student_ends(student: Field, grid: StudentGrid, noise: Tensor) -> Tensor:
    """What the student makes of noise [B, ...] in its N steps."""
    state = start(grid.table, noise)
    return drive(sample(grid.table, state), partial(at_number, student, state.x.dtype))


def student_data(student: Field, grid: StudentGrid, x: Tensor, step: int) -> Tensor:
    """The data that the student predicts from states x before `step`, with the gradient of this one evaluation."""
    t = grid.times[step]
    return velocity_to_x1(at_number(student, x.dtype, x, t).to(x.dtype), x, t, PATHS[grid.path])


def backward_target(network: Network, teacher: Teacher, grid: StudentGrid, state: Tensor, step: int) -> Tensor:
    """What the teacher makes of the student's state."""
    return teacher.data(network, state, grid.times[step], PATHS[grid.path])


def shifted_target(network: Network, teacher: Teacher, grid: StudentGrid, data: Tensor, eps: Tensor, step: int) -> Tensor:
    """What the teacher makes of the student's predicted data, noised again to gamma(t) with eps. Raises ConfigError for a grid without gamma."""
    if grid.gamma is None:
        raise ConfigError("the grid has no gamma; give it one, such as StudentGrid.midway, or use the backward loss")
    t, path = grid.gamma[grid.times[step]], PATHS[grid.path]
    point = path.at(t)
    return teacher.data(network, point.alpha * data.detach() + point.sigma * eps, t, path)


def backward_loss(student: Field, network: Network, teacher: Teacher, grid: StudentGrid, noise: Tensor, step: int) -> Tensor:
    """Mean square of the student's predicted data at its own state less `backward_target`. [], with the gradient of the student's last evaluation alone."""
    state = student_state(student, grid, noise, step)
    return F.mse_loss(student_data(student, grid, state, step), backward_target(network, teacher, grid, state, step))


def shifted_loss(student: Field, network: Network, teacher: Teacher, grid: StudentGrid, noise: Tensor, step: int, eps: Tensor) -> Tensor:
    """As `backward_loss`, with `shifted_target`. eps: as noise, independent of it. With gamma(t) = t and the eps that the student predicts, the two are one."""
    data = student_data(student, grid, student_state(student, grid, noise, step), step)
    return F.mse_loss(data, shifted_target(network, teacher, grid, data, eps, step))


@dataclass(frozen=True)
class Options:
    """How a distillation runs; all numbers are our choice. adversarial: weight of that term, 0 for none. rows: of a validation run at once.

    Raises ConfigError for a weight below 0 or not finite.
    """

    grid: StudentGrid
    teacher: Teacher
    iterations: int = 1000
    batch: int = 64
    rate: float = 1e-4
    weight_decay: float = 0.01
    adversarial: float = 0.0
    head_width: int = 128
    head_rate: float = 1e-4
    validate_every: int = 50
    rows: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.adversarial < math.inf:
            raise ConfigError(f"adversarial weight {self.adversarial}; a finite number from 0, which is without the term")


class Head(nn.Module):
    """Tells the teacher's latents, or features of them, from the student's: [B, ...] to [B], above 0 for the teacher's. An MLP over all of a sample."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1)).squeeze(1)


class Adversary:
    """A head with its trainer. features: of latents, differentiable. Hinge losses of Lim and Ye 2017, arXiv:1705.02894."""

    def __init__(self, features: Callable[[Tensor], Tensor], like: Tensor, options: Options, processes: Processes = ALONE) -> None:
        self.features, seen = features, features(like)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.head = Head(seen[0].numel(), options.head_width).to(seen)
        optimizer = torch.optim.AdamW(self.head.parameters(), lr=options.head_rate, betas=(0.5, 0.99), weight_decay=0.0)
        self.trainer = processes.trainer(self.head, optimizer, small=True)

    def term(self, data: Tensor) -> Tensor:
        """The student's loss, []: it is to be taken for the teacher. No gradient goes into the head."""
        frozen = {name: p.detach() for name, p in self.head.named_parameters()}
        return -torch.func.functional_call(self.head, frozen, (self.features(data),)).mean()

    def step(self, target: Tensor, data: Tensor) -> None:
        """Train the head on what the teacher and the student made."""
        with torch.no_grad():
            real, made = self.features(target), self.features(data)
        self.trainer.descend([lambda: F.relu(1 - self.head(real)).mean() + F.relu(1 + self.head(made)).mean()])


@dataclass(frozen=True)
class Validation:
    """What a student is scored on: noise [N, ...] with the indices [N] of its conditions, and ends [N, ...] of the teacher from OTHER noise.

    Other, since the losses do not match ends noise by noise: it is distributions that count. Raises ConfigError unless sizes agree and every
    condition has at least two samples.
    """

    index: Tensor
    noise: Tensor
    ends: Tensor

    def __post_init__(self) -> None:
        if self.noise.shape != self.ends.shape or self.index.shape != self.noise.shape[:1]:
            raise ConfigError(
                f"validation of indices {list(self.index.shape)}, noise {list(self.noise.shape)}, ends {list(self.ends.shape)}; one of each a sample"
            )
        if int(self.index.unique(return_counts=True)[1].min()) < 2:
            raise ConfigError("validation with a condition of one sample; at least two of each, since it compares distributions")

    def score(self, fields: Fields, grid: StudentGrid, rows: int) -> float:
        """Energy distance of the student's ends from the teacher's, of each condition alone, then their mean. Lower is better."""
        made = torch.cat([student_ends(fields(self.index[i]), grid, self.noise[i]) for i in torch.arange(len(self.noise)).split(rows)])
        return sum(energy_distance(made[self.index == c], self.ends[self.index == c]) for c in self.index.unique()) / len(self.index.unique())


def teacher_ends(networks: Networks, teacher: Teacher, path: Path, index: Tensor, noise: Tensor, rows: int = 64) -> Tensor:
    """What the teacher makes of noise [N, ...] in its nfe steps: the ends of a `Validation`, with the 25 steps of the paper's teacher, say."""
    return torch.cat([teacher.data(networks(index[i]), noise[i], 0.0, path) for i in torch.arange(len(noise)).split(rows)])


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased, so below 0 at times, from samples [N, ...] and [M, ...]. 0 for equal distributions, else above."""
    x, y = x.flatten(1).double(), y.flatten(1).double()
    within = [torch.pdist(z).mean() for z in (x, y)]
    return float(2 * torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").mean() - within[0] - within[1])


@dataclass(frozen=True)
class Distilled:
    """Scores of `Validation`, lower is better: of the student as it came, of the best iterate. iteration: the best's, 0 for the start."""

    start: float
    best: float
    iteration: int
    history: tuple[tuple[int, float], ...]  # (iteration, score)
    note: str = ""  # what went wrong, if anything did

    def after(self, iteration: int, score: float) -> Distilled:
        """With one more validated iterate."""
        history = (*self.history, (iteration, score))
        if score < self.best:  # NaN is not
            return replace(self, best=score, iteration=iteration, history=history)
        return replace(self, history=history)


def check_saved(saved: File, options: Options, processes: Processes = ALONE) -> None:
    """For who has work to do before `distil`, which does the same. Raises ConfigError for a file of a run with other options or processes."""
    if (found := checkpoint.load(saved, str(processes))) is not None:
        checkpoint.check_same(saved, found["options"], asdict(options))


def distil(
    student: nn.Module,
    fields: Fields,
    networks: Networks,
    conditions: Conditions,
    validation: Validation,
    options: Options,
    features: Callable[[Tensor], Tensor] = lambda latents: latents,
    progress: Callable[[int, float, float], None] = lambda iteration, loss, best: None,
    saved: File | None = None,
    processes: Processes = ALONE,
) -> Distilled:
    """Train `student`, a copy of the teacher, and leave it with the weights that validated best, those it came with among them.

    fields: its velocities, with gradients into its parameters. networks: the teacher's branches of guidance, frozen. features: of latents, for the
    adversarial head. progress hears (iterations done, loss, best score). saved: a file to resume from, to the same numbers as without a break.
    processes: that share each batch; where they split the student, it is whole at the end on the first of them alone.
    A loss that is not finite ends it with a note. Raises ConfigError for a file of a run with other options or processes, and for a batch that the
    processes cannot share.
    """
    share = processes.share(options.batch, "samples of a batch")
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.rate, weight_decay=options.weight_decay)
    trainers = {"student": (trainer := processes.trainer(student, optimizer, clip=1.0))}
    adversary = None
    if options.adversarial:
        adversary = Adversary(features, validation.noise[:1], options, processes)
        trainers["head"] = adversary.trainer

    def score() -> float:
        return trainer.run(lambda: validation.score(fields, options.grid, options.rows))

    if saved is not None and (found := processes.load(saved, trainers)) is not None:
        checkpoint.check_same(saved, found["options"], asdict(options))
        done, best, result = found["iteration"], found["best"], Distilled(**found["result"])
    else:
        at_start = score()
        done, best, result = 0, trainer.weights(), Distilled(at_start, at_start, 0, ((0, at_start),))
    for iteration in range(done, options.iterations):
        trainer.set_rates([learning_rate(iteration, options.iterations, options.rate)])
        rng = np.random.default_rng((options.seed, iteration))
        loss = take_step(trainer, adversary, fields, networks, conditions, validation.noise, options, rng, share)
        if not math.isfinite(loss):
            result = replace(result, note=f"the loss was {loss} at iteration {iteration}; the best iterate before it is kept. Try a lower rate")
            break
        if (iteration + 1) % options.validate_every == 0 or iteration + 1 == options.iterations:
            result = result.after(iteration + 1, score())
            if result.iteration == iteration + 1:
                best = trainer.weights()
            if saved is not None:
                processes.save(saved, {"iteration": iteration + 1, "best": best, "result": asdict(result), "options": asdict(options)}, trainers)
        progress(iteration + 1, loss, result.best)
    trainer.finish(best)
    return result


def take_step(
    trainer: Trainer,
    adversary: Adversary | None,
    fields: Fields,
    networks: Networks,
    conditions: Conditions,
    like: Tensor,
    options: Options,
    rng: np.random.Generator,
    share: slice,
) -> float:
    """One update at a random step of the grid, on this process's share of noise as `like`. Returns the loss, nan too if only its gradient is not finite."""
    grid, step, index = options.grid, int(rng.integers(options.grid.steps)), conditions(rng, options.batch)[share]
    noise, eps = (torch.from_numpy(rng.standard_normal((options.batch, *like.shape[1:])))[share].to(like) for _ in range(2))
    student, network = fields(index), networks(index)
    made: list[tuple[Tensor, Tensor]] = []

    def loss() -> Tensor:
        state = student_state(student, grid, noise, step)
        data = student_data(student, grid, state, step)
        if grid.gamma is None:
            target = backward_target(network, options.teacher, grid, state, step)
        else:
            target = shifted_target(network, options.teacher, grid, data, eps, step)
        made.append((target, data.detach()))
        found = F.mse_loss(data, target)
        return found if adversary is None else found + options.adversarial * adversary.term(data)

    total = trainer.descend([loss])
    if adversary is not None and math.isfinite(total):
        adversary.step(*made[0])
    return total
