"""What test_distributed.py runs in every process, and in its own for the numbers to compare with. Tensors come back as lists of arrays."""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from reelstep.compiler.part import Part
from reelstep.engine.models import MODELS
from reelstep.engine.models.movie_gen import MovieGenConfig, MovieGenTransformer
from reelstep.engine.samplers.ns import drive, sample
from reelstep.engine.samplers.ns import start as sampler_start
from reelstep.engine.samplers.paths import PATHS
from reelstep.errors import ConfigError
from reelstep.training import bns
from reelstep.training.distributed import start
from reelstep.training.field import Pairs, solve
from reelstep.training.fits import solve_pairs
from reelstep.training.imagine_flash import Options, StudentGrid, Teacher, Validation, distil
from reelstep.training.model_field import split_over
from reelstep.training.trainer import ALONE, Processes

MEANS = torch.tensor([[2.0, 0], [-2, 0], [0, 2], [0, -2]])
STD = 0.3
DIT = MovieGenConfig(
    layers=2, width=40, ffn=22, heads=5, latent_channels=4, condition_channels=0, patch=(1, 2, 2), positions=(3, 3, 3), text_widths=(10,),
    time_frequencies=8, time_scale=1.0, qk_norm=True,
)  # fmt: skip


def serve(rank: int, count: int, port: int, link: Any) -> None:
    """Run the named functions of this file until the link closes."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # as torchrun does; DeepSpeed insists
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", rank=rank, world_size=count, store=store, timeout=timedelta(seconds=60))
    while True:
        name, args = link.recv()
        try:
            answer = True, globals()[name](*args)
        except Exception:  # noqa: BLE001  # whatever it is, the process that asked raises it
            answer = False, traceback.format_exc()
        link.send(answer)


def processes_of(stage: int | None, mesh: str = "", half: bool = False) -> AbstractContextManager[Processes]:
    """None: one process, for the numbers to compare with."""
    return nullcontext(ALONE) if stage is None else start(stage, mesh, half, whole_below=0)


def arrays(values: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in values.items()}


def seeded(make: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def velocity(x: Tensor, t: Any) -> Tensor:
    """Four equally likely Gaussians on straight lines, in closed form."""
    s = 1 - t
    variance = t**2 * STD**2 + s**2
    off = x[:, None] - t * MEANS
    weight = torch.softmax(-off.square().sum(-1) / (2 * variance), dim=1)[..., None]
    return (weight * (MEANS + (t * STD**2 - s) / variance * off)).sum(1)


class Copy(nn.Module):
    """The closed form and an MLP that begins as 0. Sizes that do not divide by 2."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 13), nn.SiLU(), nn.Linear(13, 7), nn.SiLU(), nn.Linear(7, 2))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return velocity(x, t) + self.net(torch.cat([x, t.expand(len(x), 1)], 1))


def normal(seed: int, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def steps(stage: int | None, clip: float | None) -> tuple[list[float], dict[str, np.ndarray]]:
    """Losses and weights of a few steps of two parameter groups, gradients of pieces added up, the module asked twice in one loss."""
    with processes_of(stage) as processes:
        return steps_in(processes, clip)


def steps_in(processes: Processes, clip: float | None) -> tuple[list[float], dict[str, np.ndarray]]:
    module = seeded(Copy)
    groups = [{"params": list(module.net[:3].parameters())}, {"params": list(module.net[3:].parameters())}]
    # Without momentum of second order where nothing is clipped: it would hide gradients that are wrong by a factor, as clipping does.
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9) if clip is None else torch.optim.AdamW(groups, weight_decay=0.1)
    trainer = processes.trainer(module, optimizer, clip)
    losses = []
    for k in range(4):
        trainer.set_rates([0.1 / (k + 1), 0.05])
        x = normal(k, 12, 2)[processes.share(12, "rows")]

        def loss(piece: Tensor, count: int = len(x)) -> Tensor:
            with torch.no_grad():
                near = module(piece, torch.tensor(0.2))
            return (module(near, torch.tensor(0.5)) - piece).square().sum() / count

        losses.append(trainer.descend([lambda piece=piece, loss=loss: loss(piece) for piece in x.split(3)]))
    return losses, arrays(trainer.weights())


def flash(stage: int | None, iterations: int, file: Path | None, adversarial: float, stop: int = -1) -> tuple[list[float], Any, dict[str, np.ndarray]]:
    """Losses, scores and the student that a distillation leaves, on the closed-form teacher. stop: break off after this iteration."""
    student = seeded(Copy)
    grid = StudentGrid.midway("condot", (0.0, 0.4, 1.0))
    options = Options(grid, Teacher(2, 1.0, "ddim"), 6, 8, 1e-2, adversarial=adversarial, head_width=9, head_rate=1e-2, validate_every=2)
    validation = Validation(torch.zeros(10, dtype=torch.long), normal(1, 10, 2), normal(2, 10, 2))
    losses = []

    def progress(iteration: int, loss: float, best: float) -> None:
        losses.append(loss)
        if iteration == stop:
            raise KeyboardInterrupt

    def networks(index: Tensor) -> Any:
        return lambda x, t, branches: (velocity(x, t),) * len(branches)

    def conditions(rng: np.random.Generator, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.long)

    try:
        with processes_of(stage) as processes:
            found = distil(student, lambda index: student, networks, conditions, validation, options, progress=progress, saved=file, processes=processes)
    except KeyboardInterrupt:
        return losses, None, {}
    return losses, found, arrays(student.state_dict())


def bns_fit(stage: int | None, file: Path | None = None, stop: int = -1) -> Any:
    """Losses, the fit to the closed form, its scores, and what it makes of the validation noise."""
    noise, other = normal(3, 20, 2), normal(4, 10, 2)
    losses = []

    def progress(iteration: int, loss: float, best: float) -> None:
        losses.append(loss)
        if iteration == stop:
            raise KeyboardInterrupt

    pairs, validation = (Pairs(x, solve(velocity, x)[-1]) for x in (noise, other))
    options = bns.Options(iterations=8, batch=8, rows=3, rate=1e-2, validate_every=2)
    initial = bns.initial_table(4, PATHS["condot"])
    try:
        with processes_of(stage) as processes:
            fit = bns.fit_bns(initial, (lambda index: velocity, pairs), (lambda index: velocity, validation), options, progress, file, processes)
    except KeyboardInterrupt:
        return losses, None
    made = drive(sample(fit.solver, sampler_start(fit.solver, other)), lambda x, t: velocity(x, t))
    return losses, fit.solver.to_json(), fit.history, made.numpy()


def dit_fields(module: MovieGenTransformer, contexts: Tensor) -> Callable[[Tensor], Callable[[Tensor, Any], Tensor]]:
    """Velocity by the indices of texts. No guidance."""

    def of(index: Tensor) -> Callable[[Tensor, Any], Tensor]:
        return lambda x, t: module(x, module.time(torch.as_tensor(t).float().reshape(1)).expand(len(x), -1, -1), None, module.text(contexts[index]))

    return of


def dit(stage: int | None, half: bool = False) -> tuple[list[float], dict[str, np.ndarray], list[int]]:
    """Losses and weights of a few steps of a small Movie Gen, whose text projection is frozen, and how many numbers this process holds between steps."""
    with processes_of(stage, half=half) as processes:
        return dit_in(processes)


def dit_in(processes: Processes) -> tuple[list[float], dict[str, np.ndarray], list[int]]:
    module = seeded(lambda: MovieGenTransformer(DIT))
    module.text.requires_grad_(False)
    trainer = processes.trainer(module, torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3), clip=1.0)
    contexts, losses = normal(0, 4, 5, 10), []
    for k in range(3):
        index = torch.arange(4)[processes.share(4, "rows")]
        x, target = (normal(seed, 4, 4, 3, 6, 6)[processes.share(4, "rows")] for seed in (10 + k, 20 + k))

        def loss(index: Tensor = index, x: Tensor = x, target: Tensor = target) -> Tensor:
            field = dit_fields(module, contexts)(index)
            with torch.no_grad():
                x = x + 0.1 * field(x, 0.1).float()
            return (field(x, 0.4).float() - target).square().mean()

        losses.append(trainer.descend([loss]))
    held = [p.numel() for p in module.parameters()]
    return losses, arrays({name: value.float() for name, value in trainer.weights().items()}), held


def sharded_bns(mesh: str | None) -> Any:
    """Losses and the fit to a small Movie Gen that processes share, each rollout differentiated through all of it; one gradient; weights held."""
    with processes_of(None if mesh is None else 0, mesh or "") as processes:
        return sharded_bns_in(processes, mesh)


def sharded_bns_in(processes: Any, mesh: str | None) -> Any:
    model = seeded(lambda: MovieGenTransformer(DIT)).requires_grad_(False)
    whole = Wrapped(model)
    if mesh is not None:
        split_over(processes.comm, SPEC, whole)
    fields = dit_fields(whole.denoiser, normal(0, 4, 5, 10))
    pairs = Pairs(normal(1, 4, 4, 3, 6, 6), normal(2, 4, 4, 3, 6, 6))
    losses: list[float] = []
    options = bns.Options(iterations=4, batch=4, rows=2, rate=1e-2, validate_every=2)
    initial = bns.initial_table(2, PATHS["condot"])
    fit = bns.fit_bns(initial, (fields, pairs), (fields, pairs), options, lambda iteration, loss, best: losses.append(loss), processes=processes)
    solver = bns.Solver(initial, bns.scales(initial, fields, pairs, 2))
    plain = processes.trainer(solver, torch.optim.SGD(solver.parameters(), lr=1.0), small=True)
    bns.step(solver, plain, fields, pairs, torch.arange(4)[processes.share(4, "pairs")], 2)
    gradient = torch.cat([p.detach() for p in solver.parameters()])  # of numbers that were 0: less the gradient
    return losses, fit.solver.to_json(), gradient.numpy(), sum(p.numel() for p in whole.denoiser.parameters())


def build_dit() -> MovieGenTransformer:
    return MovieGenTransformer(DIT)


class Wrapped(nn.Module):
    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser


SPEC = replace(MODELS["reel-tiny"], sharding=(Part(f"{__name__}:build_dit", programs="", rules="movie-gen", prefix="denoiser."),))


def broken(stage: int) -> tuple[bool, bool, bool]:
    """Whether a loss that is infinite in the first process alone ends it everywhere, moves nothing, and a gradient that overflows gives nan."""
    answers = []
    with processes_of(stage) as processes:
        for bad in (lambda x: x.square().mean() + (math.inf if processes.first else 0.0), lambda x: (x.sum() * 0).sqrt() + x.mean()):
            module = seeded(Copy)
            trainer = processes.trainer(module, torch.optim.AdamW(module.parameters(), lr=0.1), clip=1.0)
            before = trainer.weights()
            loss = trainer.descend([lambda module=module, bad=bad: bad(module(normal(0, 4, 2), torch.tensor(0.5)))])
            answers += [not math.isfinite(loss), all(torch.equal(value, before[name]) for name, value in trainer.weights().items())]
    return answers[0], answers[1], answers[2]


def refusal(stage: int, mesh: str, half: bool) -> str:
    try:
        with processes_of(stage, mesh, half):
            return "nothing"
    except ConfigError as error:
        return str(error)


def odd_batch() -> str:
    def unused(index: Tensor) -> Any:
        raise AssertionError("work was done")

    pairs = Pairs(normal(0, 7, 2), normal(1, 7, 2))
    try:
        with processes_of(0) as processes:
            bns.fit_bns(bns.initial_table(2, PATHS["condot"]), (unused, pairs), (unused, pairs), bns.Options(batch=32), processes=processes)
    except ConfigError as error:
        return str(error)
    return "nothing"


def references(stage: int | None, file: Path) -> np.ndarray:
    """Of 14 noises, in pieces of 4, twice: the second time from what was kept."""
    with processes_of(stage) as processes:
        first, again = (solve_pairs(lambda index: velocity, normal(0, 14, 2), 1e-4, file, processes) for _ in range(2))  # type: ignore[arg-type]
    assert first.between is not None
    assert torch.equal(first.ends, again.ends)
    return first.between.numpy()
