"""Tokens put back where their patches were cut: [B, L, P] -> [B, C, F, H, W].

B batch, C channels, F H W frames and sides, L = F/p H/q W/r tokens in (t, h, w) order, P = C p q r values of a patch (p, q, r).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from reelstep.errors import ConfigError
from reelstep.kernels.jit import check_launch, jit, tl
from reelstep.kernels.op import Argument, Kernel, Make, check_rank, define

BLOCK, WARPS = 1024, 4


def unpatchify(tokens: Tensor, grid: Sequence[int], patch: Sequence[int], channels_last: bool = False) -> Tensor:
    """tokens: [B, L, P] -> [B, C, F, H, W]. grid: tokens along F, H, W. A patch is in the order (C p q r), or (p q r C) if channels_last.

    Raises ConfigError unless grid multiplies to L and patch divides P.
    """
    check_rank("unpatchify", "tokens", tokens, "B L P")
    if len(grid) != 3 or len(patch) != 3 or min(patch) < 1:
        raise ConfigError(f"unpatchify: grid {tuple(grid)}, patch {tuple(patch)}; both are three sizes, those of a patch at least 1")
    if tokens.shape[1] != prod(grid) or tokens.shape[2] % prod(patch):
        raise ConfigError(f"unpatchify: tokens {list(tokens.shape)} are not [B, {prod(grid)}, a multiple of {prod(patch)}] for grid {tuple(grid)}")
    out: Tensor = OP(tokens, list(grid), list(patch), channels_last)
    return out


def reference(tokens: Tensor, grid: list[int], patch: list[int], channels_last: bool) -> Tensor:
    (f, h, w), (p, q, r) = grid, patch
    b, c = tokens.shape[0], tokens.shape[2] // (p * q * r)
    if channels_last:
        cut = tokens.reshape(b, f, h, w, p, q, r, c).permute(0, 7, 1, 4, 2, 5, 3, 6)
    else:
        cut = tokens.reshape(b, f, h, w, c, p, q, r).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return cut.clone(memory_format=torch.contiguous_format).reshape(b, c, f * p, h * q, w * r)


def fake(tokens: Tensor, grid: list[int], patch: list[int], channels_last: bool) -> Tensor:
    (f, h, w), (p, q, r) = grid, patch
    return tokens.new_empty(tokens.shape[0], tokens.shape[2] // (p * q * r), f * p, h * q, w * r)


@jit
def unpatchify_kernel(
    out: tl.tensor, tokens: tl.tensor, count: tl.tensor, frames: tl.tensor, rows: tl.tensor, columns: tl.tensor, channels: tl.tensor,
    t_batch: tl.tensor, t_token: tl.tensor, t_value: tl.tensor, P: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Walks the video in memory order, so that reads are the short runs and writes whole lines. frames, rows, columns: of the video."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    column, row, frame = at % columns, at // columns % rows, at // columns // rows % frames
    channel, batch = at // columns // rows // frames % channels, at // columns // rows // frames // channels
    token = (frame // P * (rows // Q) + row // Q) * (columns // R) + column // R
    place = (frame % P * Q + row % Q) * R + column % R
    value = place * channels + channel if LAST else channel * (P * Q * R) + place
    tl.store(out + at, tl.load(tokens + batch * t_batch + token * t_token + value * t_value, mask=inside), mask=inside)


def launch(tokens: Tensor, grid: list[int], patch: list[int], channels_last: bool) -> Tensor:
    check_launch(unpatchify_kernel, tokens)
    out, (p, q, r) = fake(tokens, grid, patch, channels_last), patch
    if count := out.numel():
        _, c, *sides = out.shape
        constants = {"P": p, "Q": q, "R": r, "LAST": channels_last}
        unpatchify_kernel[(-(-count // BLOCK),)](out, tokens, count, *sides, c, *tokens.stride(), **constants, BLOCK=BLOCK, num_warps=WARPS)
    return out


def kernels(arch: int) -> tuple[Kernel, ...]:
    numbers = ("count", "frames", "rows", "columns", "channels", "t_batch", "t_token")
    arguments: dict[str, Argument] = {"out": "*fp32", "tokens": "*bf16", **dict.fromkeys(numbers, "i32"), "t_value": 1}
    return (Kernel("unpatchify", unpatchify_kernel, {**arguments, "P": 1, "Q": 2, "R": 2, "LAST": False, "BLOCK": BLOCK}, WARPS, 1),)


def examples(make: Make) -> Iterator[tuple[Any, ...]]:
    for last in (False, True):
        for b, c, grid, patch in ((2, 3, [2, 2, 3], [1, 2, 2]), (1, 4, [2, 2, 3], [2, 3, 1]), (1, 1, [1, 1, 1], [1, 1, 1]), (0, 2, [1, 2, 2], [1, 2, 2])):
            yield make(b, prod(grid), c * prod(patch)), grid, patch, last


OP = define("unpatchify", reference=reference, fake=fake, launch=launch, kernels=kernels, examples=examples)
