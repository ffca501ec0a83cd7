"""A device, what is timed on it, and what is found there.

L tokens, D width, N heads, K head dim, one latent video (B = 1) unless a shape says otherwise.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from timeit import timeit

import torch
from torch import Tensor

from reelstep.compiler.skus import Sku, sku_of_device
from reelstep.engine.models.movie_gen import CONFIG_30B, TEXT_TOKENS_30B, MovieGenConfig
from reelstep.errors import NotFound

COPY_AIM = 0.85
"""Share of the copy's rate that what memory bounds shall reach."""
BETWEEN = 512 * 2**20
"""Bytes of what is filled between timed calls: more than any GPU's cache, and longer to write than a call takes to launch."""


@dataclass(frozen=True)
class Sizes:
    """What is timed."""

    config: MovieGenConfig
    latent: tuple[int, int, int]  # F, H, W
    text: int
    matmul: int  # side of the square product whose rate is the ceiling
    ranks: int  # of a split in tokens, and of one in heads and feed-forward width
    clips: int  # latents at once in what works on latents: one fits a GPU's cache, whose rate is not the memory's

    @property
    def tokens(self) -> int:
        return self.config.tokens(*self.latent)

    @property
    def head(self) -> int:
        return self.config.width // self.config.heads


LARGE = Sizes(CONFIG_30B, (32, 96, 96), TEXT_TOKENS_30B, 8192, 8, 32)


@dataclass(frozen=True)
class Finding:
    """One row. right: of a check of values, whether it held; None where nothing was checked. share: of the ceiling that `note` or the part names."""

    what: str
    seconds: float | None = None
    rate: float | None = None
    unit: str = ""
    share: float | None = None
    aim: float | None = None
    error: float | None = None
    allowed: float | None = None
    right: bool | None = None
    note: str = ""


FAILED = "failed"
"""How a row's `what` ends where something was not found."""


def tried(what: str, find: Callable[[], Finding], right: bool | None = None) -> Finding:
    """A finding, or the row that says why there is none, so that others are found after it. right: of that row."""
    try:
        return find()
    except Exception as error:  # noqa: BLE001  # whatever it is, it is written down
        return Finding(f"{what} {FAILED}", right=right, note=in_a_line(error))


def in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:400]}"


def checked(what: str, error: float, allowed: float, seconds: float | None = None, note: str = "") -> Finding:
    """NaN is wrong too."""
    return Finding(what, seconds, error=error, allowed=allowed, right=error <= allowed, note=note)


class Bench:
    """A device, what is timed on it, and the ceilings that were measured there: None until they are."""

    def __init__(self, device: torch.device, sizes: Sizes) -> None:
        self.device, self.sizes = device, sizes
        self.copy_bytes_per_s: float | None = None
        self.matmul_flops_per_s: float | None = None
        self.generator = torch.Generator(device).manual_seed(0)

    @cached_property
    def between(self) -> Tensor:
        """What is filled between timed calls."""
        return torch.empty(BETWEEN, dtype=torch.int8, device=self.device)

    @property
    def sku(self) -> Sku | None:
        """None for a device that the table of SKUs has not."""
        try:
            return sku_of_device(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        except NotFound:
            return None

    def randn(self, *sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(sizes, generator=self.generator, device=self.device, dtype=dtype)

    def seconds(self, run: Callable[[], object], most_s: float = 0.6, warmup: int = 2) -> float:
        """Median of one call, of 2 to 50 within about `most_s`."""
        for _ in range(warmup):
            run()
        self.wait()
        (first,) = self.each(run, 1)
        return statistics.median(self.each(run, max(2, min(50, int(most_s / first)))))

    def each(self, run: Callable[[], object], count: int) -> list[float]:
        """Seconds of `count` calls. On a GPU what it computes alone: between calls it fills a buffer, so that it never waits for a launch, and reads nothing
        that the last call left in its cache.
        """
        if self.device.type != "cuda":
            return [timeit(run, number=1) for _ in range(count)]
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for first, last in events:
            self.between.zero_()
            first.record()
            run()
            last.record()
        self.wait()
        return [float(first.elapsed_time(last)) / 1000 for first, last in events]

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def moved(self, what: str, seconds: float, bytes_: float, aim: float | None = COPY_AIM, note: str = "") -> Finding:
        """Bound by memory: GB/s and the share of the copy's."""
        rate = bytes_ / seconds
        return Finding(what, seconds, rate / 1e9, "GB/s", self.copy_bytes_per_s and rate / self.copy_bytes_per_s, aim, note=note)

    def computed(self, what: str, seconds: float, flops: float, aim: float | None = None, note: str = "") -> Finding:
        """Bound by products: TFLOP/s and the share of the large product's."""
        rate = flops / seconds
        return Finding(what, seconds, rate / 1e12, "TFLOP/s", self.matmul_flops_per_s and rate / self.matmul_flops_per_s, aim, note=note)
