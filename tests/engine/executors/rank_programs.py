"""What the ranks of test_processes.py load. Imported there by name, so it stands apart from the tests."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reelstep.compiler.program import Profile, Program
from reelstep.engine.models.movie_gen import MovieGenConfig, MovieGenTransformer, denoise_program
from reelstep.engine.models.tae import TAE, TAEConfig
from reelstep.engine.runner import Runner
from reelstep.parallel.collectives import Communicator

DIT = MovieGenConfig(
    layers=2, width=24, ffn=10, heads=3, latent_channels=4, condition_channels=0, patch=(1, 2, 2), positions=(3, 2, 2), text_widths=(10,),
    time_frequencies=8, time_scale=1.0, qk_norm=True,
)  # fmt: skip
TAE_CONFIG = TAEConfig(
    channels=8, multipliers=(1, 1), res_blocks=1, latent_channels=4, patch=2, temporal_downs=1, groups=4, variational=False, linear_skip=False, scale=1.0,
    shift=0.0,
)  # fmt: skip


def build() -> MovieGenTransformer:
    return MovieGenTransformer(DIT)


def programs(module: nn.Module) -> tuple[Program, ...]:
    assert isinstance(module, MovieGenTransformer)
    return (denoise_program(module, 5, [Profile("p", {"F": 3, "H": 4, "W": 4}, 1)]),)


@dataclass(frozen=True)
class Sums:
    """A program that adds the ranks' numbers to x along tp, and what may go wrong with one rank."""

    bad_rank: int = -1
    fault: str = ""

    def identity(self) -> Mapping[str, str]:
        if self.fault == "other weights" and os.getpid() != self.bad_rank:  # bad_rank is rank 0's process here
            return {"weights": "bbb"}
        return {"weights": "aaa"}

    def load(self, comm: Communicator) -> Mapping[str, Runner]:
        if comm.rank == self.bad_rank and self.fault == "load":
            raise ValueError("no memory for weights")
        if comm.rank == self.bad_rank and self.fault == "link":
            whole = comm.all_reduce
            comm.all_reduce = lambda x, axis: whole(x, axis) + 1  # type: ignore[method-assign]

        def add(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            x = inputs["x"]
            if float(x.min()) < 0 and comm.rank == 1:
                time.sleep(30)
            if float(x.max()) > 1000 and comm.rank == 1:
                raise ValueError("x is too large for this rank")
            return {"y": comm.all_reduce(x + comm.at["tp"], "tp"), "half": torch.full((len(x),), float(comm.at["cfg"]))}

        return {"sums": Runner({("add", "p"): add}, {("add", "p"): 2})}


def autoencoder() -> TAE:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return TAE(TAE_CONFIG).eval()


class Tiles:
    """An autoencoder's decoder, whole on every rank, which says of each row what rank decoded it."""

    def identity(self) -> Mapping[str, str]:
        return {}

    def load(self, comm: Communicator) -> Mapping[str, Runner]:
        tae = autoencoder()

        def decode(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            with torch.no_grad():
                return {"video": tae.decode(inputs["latent"]), "rank": torch.full((len(inputs["latent"]),), comm.rank)}

        return {"tae": Runner({("decode", "p"): decode}, {("decode", "p"): 2}, {("decode", "p")})}


def never(*_: Any) -> None:
    """A rank that does not come."""
    time.sleep(60)
