"""A toy model whose two programs share an embedding, and its bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from reelstep.compiler.bundle import Bundle
from reelstep.compiler.compile import compile_model
from reelstep.compiler.program import Profile, Program, TensorSpec


class Toy(nn.Module):
    """Embedding, in-place rotation, attention, convolution; buffers of both kinds and a constant."""

    scale: Tensor
    positions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.qkv = nn.Linear(8, 24)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.unused = nn.Linear(3, 3)
        self.register_buffer("scale", torch.tensor([2.0]))
        self.register_buffer("positions", torch.arange(8).float() / 8, persistent=False)

    def forward(self, ids: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(ids) * self.scale + self.positions * t[:, None, None]
        q, k, v = (rearrange(part, "B L (H K) -> B H L K", H=2) for part in self.qkv(x).chunk(3, -1))
        turned = torch.empty_like(q)
        turned[..., ::2] = q[..., 1::2]
        turned[..., 1::2] = -q[..., ::2]
        y = rearrange(F.scaled_dot_product_attention(turned, k, v), "B H L K -> B (H K) L")
        return rearrange(self.conv(y), "B D L -> B L D").float().repeat_interleave(2, dim=1), ids + 1


class Lookup(nn.Module):
    """A second program over the same embedding, under another name."""

    def __init__(self, toy: Toy) -> None:
        super().__init__()
        self.table = toy.embed

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).sum(1)  # type: ignore[no-any-return]


def toy_programs() -> tuple[Program, ...]:
    torch.manual_seed(0)
    toy = Toy()
    ids = TensorSpec("ids", "int64", ("B", "L"))
    t = TensorSpec("t", "float32", ("B",))
    y = TensorSpec("y", "float32", ("B", "M", 8))
    profiles = (Profile("l4", {"L": 4, "M": 8}, 5), Profile("l3", {"L": 3, "M": 6}, 5))
    return (
        Program("denoise", toy, (ids, t), (y, TensorSpec("next", "int64", ("B", "L"))), profiles),
        Program("lookup", Lookup(toy), (ids,), (TensorSpec("sum", "float32", ("B", 8)),), (Profile("l4", {"L": 4}, 5),), keep_f32=True),
    )


def compile_toy(out: Path, programs: tuple[Program, ...] | None = None, backend: str = "eager") -> Bundle:
    return compile_model(
        model="toy", version="1", settings={"size": [4, 3]}, programs=programs or toy_programs(), backend=backend, out=out,
        solvers={"euler": {"times": [0.0, 1.0]}}, fitted={"bns_8": {"scale": 3.0}}, card="# Toy\n",
    )  # fmt: skip


@pytest.fixture(scope="session")
def programs() -> tuple[Program, ...]:
    return toy_programs()


@pytest.fixture(name="compile_toy", scope="session")
def compile_toy_fixture() -> Callable[..., Bundle]:
    return compile_toy


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, programs: tuple[Program, ...]) -> Bundle:
    """Not to be changed; `damaged` gives a copy."""
    return compile_toy(tmp_path_factory.mktemp("bundle") / "toy.reel", programs)
