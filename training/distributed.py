"""DeepSpeed as the engine of training in several processes: the one file that knows it.

Batches are split over processes, and what is trained as the ZeRO stage says: 0 not at all, 1 the optimizer's state, 2 its gradients too, 3 the weights too
(Rajbhandari et al. 2020, arXiv:1910.02054). A frozen model can be split too, by `parallel.shard` over a mesh: then the processes of one mesh share nothing
of the batch but run each sample together.

Gradients are means over all processes, those of a mesh among them. That is right there too: with the adjoint of every collective, the gradients of a mesh's
processes add up to that of the sum of their losses, which are one and the same loss.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reelstep.errors import ConfigError
from reelstep.parallel.collectives import Communicator
from reelstep.parallel.mesh import Mesh
from reelstep.training import checkpoint
from reelstep.training.trainer import ALONE, Processes, Trainer

R = TypeVar("R")

STAGES = (0, 1, 2, 3)
COLLECTIVE_S = 1800.0  # a process may wait for another's validation, or its file


def library() -> Any:
    """DeepSpeed, which has no types. Raises ConfigError where it is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError("training in several processes needs DeepSpeed; install it with: pip install 'reelstep[deepspeed]'")
    return import_module("deepspeed")


@contextmanager
def start(stage: int = 0, mesh: str = "", half: bool = False, whole_below: int = 100_000) -> Iterator[Processes]:
    """The processes that `torchrun` has started, or this one alone, until the end of the block. Collective; once in a process.

    mesh: over which frozen models are split, "tp=2"; the batch is split over as many of it as there are. half: weights and gradients in bfloat16 beside
    float32 copies that the optimizer moves, split by the stage; what calls the module runs under autocast. whole_below: stage 3 leaves parameters of fewer
    numbers whole, since to gather them takes longer than they save.

    Raises ConfigError for an unknown stage, for a stage, mesh or precision that these processes cannot have, for ring attention, which has no gradient, and
    where DeepSpeed is not installed.
    """
    if stage not in STAGES:
        raise ConfigError(f"ZeRO stage {stage}; one of {', '.join(map(str, STAGES))}")
    if half and not stage:
        raise ConfigError("half precision at ZeRO stage 0; DeepSpeed keeps float32 copies beside it from stage 1 on, so take 1, 2 or 3")
    asked = Mesh.parse(mesh)
    if asked.cfg > 1 or asked.ring > 1:
        raise ConfigError(f"mesh {mesh!r} for training; of axes cp and tp alone: branches of guidance are one batch there, and ring attention has no gradient")
    joined = dist.is_initialized()
    if not (joined or dist.is_torchelastic_launched()):
        if stage or asked.world > 1:
            what = f"ZeRO stage {stage}" if stage else f"mesh {asked}"
            raise ConfigError(f"{what} needs several processes, and this is one; start them with: torchrun --nproc-per-node N -m reelstep ...")
        yield ALONE
        return
    deepspeed = library()
    # Recipes make their tensors there, whatever else the machine has.
    deepspeed.accelerator.set_accelerator(import_module("deepspeed.accelerator.cpu_accelerator").CPU_Accelerator())
    # An all-reduce of its own for CPUs, which it would compile at every first start; gloo has one.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    world = dist.get_world_size()
    if world % asked.world:
        raise ConfigError(f"mesh {asked} has {asked.world} ranks, of which {world} processes are no multiple; start {asked.world}, or take another mesh")
    comm = Communicator(replace(asked, cfg=world // asked.world), COLLECTIVE_S)  # the axis of guidance in serving is the batch's here
    try:
        with warnings.catch_warnings():  # DeepSpeed calls what PyTorch would call otherwise by now, at every gather
            warnings.filterwarnings("ignore", r"`?torch\.distributed\.\w+`? is deprecated", FutureWarning)
            yield DeepSpeed(stage, comm, half, whole_below)
    finally:
        comm.close()
        if not joined:
            deepspeed.comm.destroy_process_group()


@dataclass(frozen=True)
class DeepSpeed:
    """One of the processes. comm: over which a frozen model can be split; its axis `cfg` is that of batches."""

    stage: int
    comm: Communicator
    half: bool
    whole_below: int

    def __str__(self) -> str:
        precision = "bfloat16" if self.half else "float32"
        return f"{dist.get_world_size()} processes (ZeRO stage {self.stage}, {precision}, shares of a batch: {self.shares})"

    @property
    def first(self) -> bool:
        return self.comm.rank == 0

    @property
    def shares(self) -> int:
        return self.comm.size("cfg")

    @property
    def place(self) -> int:
        return self.comm.at["cfg"]

    @property
    def leads(self) -> bool:
        return self.comm.at["cp"] == self.comm.at["tp"] == 0

    @property
    def mesh(self) -> Communicator | None:
        return self.comm if self.comm.size("cp") * self.comm.size("tp") > 1 else None

    def share(self, count: int, what: str) -> slice:
        if count % self.shares:
            near = max(count // self.shares, 1) * self.shares
            raise ConfigError(
                f"{count} {what} do not divide into {self.shares} equal shares; take {near} or {near + self.shares}, or another number of processes"
            )
        return slice(self.place * count // self.shares, (self.place + 1) * count // self.shares)

    def total(self, x: Tensor) -> Tensor:
        return self.comm.all_reduce(x, "cfg")

    def trainer(self, module: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None = None, small: bool = False) -> ZeRO:
        stage, half = (0, False) if small else (self.stage, self.half)
        config = {
            "train_micro_batch_size_per_gpu": 1,  # for loaders of its own, which we have no use for; it wants a number
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": self.whole_below},
            "zero_allow_untested_optimizer": True,  # PyTorch's
            "gradient_clipping": clip if clip and stage else 0.0,
            "bf16": {"enabled": half},
        }
        engine, *_ = library().initialize(model=Calling(module, half), optimizer=optimizer, config=config)
        return ZeRO(module, engine, stage, clip)

    def save(self, file: Path, rest: Mapping[str, Any], trainers: Mapping[str, Trainer]) -> None:
        folder = _folder(file, rest["iteration"])
        parts = {name: each.save(folder, name) for name, each in trainers.items()}
        dist.barrier()
        if self.first:
            checkpoint.save(file, {**rest, **parts, "processes": str(self)})
            for other in folder.parent.iterdir():
                if other != folder:
                    shutil.rmtree(other)
        dist.barrier()

    def load(self, file: Path, trainers: Mapping[str, Trainer]) -> dict[str, Any] | None:
        found = checkpoint.load(file, str(self))
        if found is not None:
            for name, each in trainers.items():
                each.load(_folder(file, found["iteration"]), name, found[name])
        return found


def _folder(file: Path, iteration: int) -> Path:
    return file.with_suffix(".parts") / str(iteration)


class Calling(nn.Module):
    """Calls what uses the module: DeepSpeed looks after a module from the start of its forward to the end, and a loss may ask it more than once.

    half: under autocast, which DeepSpeed takes for its own business where it finds it outside.
    """

    def __init__(self, module: nn.Module, half: bool) -> None:
        super().__init__()
        self.module, self.autocast = module, half

    def forward(self, work: Callable[[], Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext():
            return work()


@dataclass(frozen=True)
class ZeRO:
    """A module in DeepSpeed's hands. engine: of `Calling` it."""

    module: nn.Module
    engine: Any
    stage: int
    clip: float | None

    def set_rates(self, rates: Sequence[float]) -> None:
        for group, rate in zip(self.engine.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def descend(self, losses: Sequence[Callable[[], Tensor]]) -> float:
        total = torch.zeros((), dtype=torch.float64)
        for place, make in enumerate(losses):
            self.engine.set_gradient_accumulation_boundary(place + 1 == len(losses))
            loss = self.engine(make)
            self.engine.backward(loss)
            total += loss.detach()
        dist.all_reduce(total)
        total /= dist.get_world_size()
        if not total.isfinite():
            return float(total)
        # Stage 0 clips here: DeepSpeed tells no norm of it, and steps by one that is not finite.
        if self.clip and not self.stage and not nn.utils.clip_grad_norm_(self.module.parameters(), self.clip).isfinite():
            return math.nan
        self.engine.step()
        if self.clip and self.stage and not math.isfinite(self.engine.get_global_grad_norm()):
            return math.nan
        return float(total)

    @torch.no_grad()
    def run(self, work: Callable[[], R]) -> R:
        found: list[R] = []

        def call() -> Tensor:  # the hooks of stage 3 go through what a forward gives, and take tensors alone
            found.append(work())
            return torch.zeros(())

        self.engine.module(call)
        return found[0]

    def weights(self) -> dict[str, Tensor]:
        found = {}
        for name, value in self.module.state_dict(keep_vars=True).items():
            with self._whole(value):
                if dist.get_rank() == 0:
                    found[name] = value.detach().clone()
        return found

    @torch.no_grad()
    def finish(self, best: Mapping[str, Tensor]) -> None:
        self.engine.destroy()
        for name, value in self.module.state_dict(keep_vars=True).items():
            if dist.get_rank() == 0:
                value.data = best[name].clone()
            if self.stage < 3:
                dist.broadcast(value.data, 0)

    def save(self, folder: Path, name: str) -> dict[str, Any]:
        self.engine.save_checkpoint(str(folder), tag=name, save_latest=False)
        return {}

    def load(self, folder: Path, name: str, state: Mapping[str, Any]) -> None:
        self.engine.load_checkpoint(str(folder), tag=name)

    @contextmanager
    def _whole(self, value: Tensor) -> Iterator[None]:
        """Inside, a parameter that stage 3 has split is whole."""
        with library().zero.GatheredParameters([value], enabled=self.stage == 3 and isinstance(value, nn.Parameter)):
            yield
