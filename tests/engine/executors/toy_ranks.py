"""What the ranks of test_restarting.py load: a closed-form model whose denoiser adds up a share of each rank. Imported there by name."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from reelstep.engine.runner import Runner
from reelstep.parallel.collectives import Communicator

MODEL = "toy"
DENOISE_S = 0.05
"""What a denoiser takes at least that shall be longer than the programs beside it, whatever else the machine does."""


def share(x: Tensor, t: Tensor, place: int) -> Tensor:
    """One rank's part of the velocity at x [B, C, F, H, W], t [B]."""
    return torch.tanh((1.0 + 0.3 * place) * x) * (0.7 - place) * (1 + t[:, None, None, None, None])


def denoise(add: Callable[[Tensor], Tensor], place: int) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    return lambda inputs: {"velocity": add(share(inputs["x"], inputs["modulation"][:, 0, 0], place))}


def encode_text(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"context": inputs["tokens"].float()[:, :, None].expand(-1, -1, 4).contiguous()}


def embed_time(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"modulation": inputs["t"][:, None, None].expand(-1, 7, 4).contiguous()}


def decode(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"video": inputs["latent"].repeat_interleave(2, 2).repeat_interleave(8, 3).repeat_interleave(8, 4).tanh()}


def runner(denoiser: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]) -> Runner:
    programs = {("encode_text", "any"): encode_text, ("embed_time", "any"): embed_time, ("denoise", "video"): denoiser, ("decode", "video"): decode}
    return Runner(programs, dict.fromkeys(programs, 8))


def alone() -> Runner:
    """The model in one process: both ranks' shares, added."""
    return runner(
        lambda inputs: {"velocity": denoise(lambda x: x, 0)(inputs)["velocity"] + denoise(lambda x: x, 1)(inputs)["velocity"]}
    )  # fmt: skip


@dataclass(frozen=True)
class Toy:
    """Two ranks along tp. stops: how many denoiser calls `rank` leaves hanging for `stop_s`, each with a file in `folder`, after `first` that it does
    not; broken: rank 1 cannot load."""

    folder: Path
    stops: int = 0
    broken: bool = False
    rank: int = 1
    first: int = 0
    stop_s: float = 30.0

    def identity(self) -> Mapping[str, str]:
        return {"weights": "none"}

    def load(self, comm: Communicator) -> Mapping[str, Runner]:
        if self.broken and comm.rank == 1:
            raise ValueError("no memory for weights")
        exact = denoise(lambda part: comm.all_reduce(part, "tp"), comm.at["tp"])
        calls = count()

        def hanging(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            done = len(list(self.folder.glob("stop-*")))
            if next(calls) >= self.first and comm.rank == self.rank and done < self.stops:
                (self.folder / f"stop-{done}").touch()
                time.sleep(self.stop_s)
            return exact(inputs)

        return {MODEL: runner(hanging)}


def worded(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A denoiser that hears the words, so that the branches of guidance differ."""
    x, t, words = inputs["x"], inputs["modulation"][:, 0, 0], inputs["context"].mean((1, 2)) / 64
    return {"velocity": torch.tanh(x + words[:, None, None, None, None]) * (0.7 + t[:, None, None, None, None])}


@dataclass(frozen=True)
class Halves:
    """Ranks along cfg that run all of the model for their rows. folder: `rows-RANK`, a line for each denoiser call, of what tells its rows apart.

    The denoiser is the longest program, as a real one is: the scheduler lets shorter ones go first, so that who comes later reaches it.
    """

    folder: Path

    def identity(self) -> Mapping[str, str]:
        return {"weights": "none"}

    def load(self, comm: Communicator) -> Mapping[str, Runner]:
        def noting(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            rows = zip(inputs["context"].mean((1, 2)).tolist(), inputs["x"].flatten(1)[:, 0].tolist(), strict=True)
            with (self.folder / f"rows-{comm.rank}").open("a") as file:
                file.write(json.dumps(list(rows)) + "\n")
            time.sleep(DENOISE_S)
            return worded(inputs)

        return {MODEL: runner(noting)}


@dataclass(frozen=True)
class Whole:
    """The same model on one rank. folder: where each denoiser call leaves a file, after which it takes `call_s`."""

    folder: Path
    call_s: float = 0.0
    weights: str = "none"

    def identity(self) -> Mapping[str, str]:
        return {"weights": self.weights}

    def load(self, comm: Communicator) -> Mapping[str, Runner]:
        whole = alone()
        exact = whole.executables["denoise", "video"]

        def slow(inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            (self.folder / f"{os.getpid()}-{time.monotonic_ns()}").touch()
            time.sleep(self.call_s)
            return exact(inputs)

        return {MODEL: Runner({**whole.executables, ("denoise", "video"): slow}, whole.max_batch)}
