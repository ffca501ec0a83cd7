"""What a recipe trains with: the process that it runs in, or many by DeepSpeed (`distributed.py`). One loop of a recipe serves both.

Every process draws the whole batch from the same seed and takes its share of it; shares are equal, so that the mean of their losses is the batch's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from reelstep.parallel.collectives import Communicator
from reelstep.training import checkpoint
from reelstep.training.field import descend

R = TypeVar("R")


class Trainer(Protocol):
    """A module and the optimizer of its trained parameters."""

    def set_rates(self, rates: Sequence[float]) -> None:
        """Learning rates of the optimizer's groups."""
        ...

    def descend(self, losses: Sequence[Callable[[], Tensor]]) -> float:
        """One step on the sum of losses, mean over processes; each is made and differentiated before the next, to bound memory.

        Gives that loss. One that is not finite moves nothing; nan comes back also for a gradient that could not be clipped. Either is a trainer's last step.
        """
        ...

    def run(self, work: Callable[[], R]) -> R:
        """What calls the module for its answers alone, without gradients."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """A copy of the module's state, whole, on the first process; nothing on others."""
        ...

    def finish(self, best: Mapping[str, Tensor]) -> None:
        """Leave the module with these weights, which the first process brings. Where ZeRO has split them they are whole on the first process alone."""
        ...

    def save(self, folder: Path, name: str) -> dict[str, Any]:
        """What it needs to go on, for a checkpoint; what is too large for one process goes into the folder under this name."""
        ...

    def load(self, folder: Path, name: str, state: Mapping[str, Any]) -> None:
        """What `save` gave."""
        ...


class Processes(Protocol):
    """Who trains together."""

    @property
    def first(self) -> bool:
        """The process that prints and writes."""
        ...

    @property
    def shares(self) -> int:
        """Into how many parts work is split."""
        ...

    @property
    def place(self) -> int:
        """Which of them is this process's, from 0."""
        ...

    @property
    def leads(self) -> bool:
        """Whether this process writes what belongs to its share."""
        ...

    @property
    def mesh(self) -> Communicator | None:
        """Over which frozen models are split; None where each process has them whole."""
        ...

    def share(self, count: int, what: str) -> slice:
        """This process's part of so many things, "pairs of a batch", say. Raises ConfigError where they do not divide."""
        ...

    def total(self, x: Tensor) -> Tensor:
        """Sum over the shares."""
        ...

    def trainer(self, module: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None = None, small: bool = False) -> Trainer:
        """clip: the norm to which all gradients together are cut. small: whole on every process, however large modules are split."""
        ...

    def save(self, file: Path, rest: Mapping[str, Any], trainers: Mapping[str, Trainer]) -> None:
        """All that a run needs to go on; `rest` counts its "iteration". Whatever happens meanwhile, the last save is whole."""
        ...

    def load(self, file: Path, trainers: Mapping[str, Trainer]) -> dict[str, Any] | None:
        """The rest, None if nothing was saved; into the trainers what is theirs. Raises ConfigError for a file of other processes."""
        ...


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of its state."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@dataclass(frozen=True)
class LocalTrainer:
    """In this process."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    clip: float | None

    def set_rates(self, rates: Sequence[float]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def descend(self, losses: Sequence[Callable[[], Tensor]]) -> float:
        return descend(self.optimizer, (loss() for loss in losses), self.clip)

    @torch.no_grad()
    def run(self, work: Callable[[], R]) -> R:
        return work()

    def weights(self) -> dict[str, Tensor]:
        return weights(self.module)

    def finish(self, best: Mapping[str, Tensor]) -> None:
        self.module.load_state_dict(best)

    def save(self, folder: Path, name: str) -> dict[str, Any]:
        return {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, folder: Path, name: str, state: Mapping[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])


class Alone:
    """One process."""

    def __str__(self) -> str:
        return "1 process"

    first = leads = True
    shares, place = 1, 0
    mesh = None

    def share(self, count: int, what: str) -> slice:
        return slice(0, count)

    def total(self, x: Tensor) -> Tensor:
        return x

    def trainer(self, module: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None = None, small: bool = False) -> LocalTrainer:
        return LocalTrainer(module, optimizer, clip)

    def save(self, file: Path, rest: Mapping[str, Any], trainers: Mapping[str, Trainer]) -> None:
        checkpoint.save(file, {**rest, **{name: each.save(file, name) for name, each in trainers.items()}, "processes": str(self)})

    def load(self, file: Path, trainers: Mapping[str, Trainer]) -> dict[str, Any] | None:
        found = checkpoint.load(file, str(self))
        if found is not None:
            for name, each in trainers.items():
                each.load(file, name, found[name])
        return found


ALONE: Processes = Alone()
