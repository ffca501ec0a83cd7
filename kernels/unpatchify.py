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
from reelstep.kernels.patch_tile import in_tokens, in_video, patch_tile, tile_place


def unpatchify(tokens: Tensor, grid: Sequence[int], patch: Sequence[int], channels_last: bool = False) -> Tensor:
    """tokens: [B, L, P] -> [B, C, F, H, W]. grid: tokens along F, H, W. A patch is in the order (C p q r), or (p q r C) if channels_last.

    Raises ConfigError unless grid multiplies to L and patch divides P.
    """
    check_rank("unpatchify", "tokens", tokens, "B L P")
    if len(grid) != 3 or len(patch) != 3 or min(patch) < 1 or min(grid) < 0:
        raise ConfigError(f"unpatchify: grid {tuple(grid)}, patch {tuple(patch)}; both are three sizes, of a patch at least 1, of a grid at least 0")
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
    out: tl.tensor, tokens: tl.tensor, frames: tl.tensor, rows: tl.tensor, columns: tl.tensor, t_batch: tl.tensor, t_token: tl.tensor, t_value: tl.tensor,
    P: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, C: tl.constexpr, LAST: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr, RUN: tl.constexpr,
) -> None:  # fmt: skip
    """frames, rows, columns: of tokens."""
    batch, frame, row, column = tile_place(frames, rows, columns, TOKENS)
    left = columns - column
    tokens += batch * t_batch + ((frame * rows + row) * columns + column) * t_token
    source, inside = in_tokens(left, t_token, t_value, P, Q, R, C, LAST, TOKENS, CHANNELS, PLACES, RUN)
    tile = tl.load(tokens + source, mask=inside)
    if LAST:
        tile = tl.permute(tl.reshape(tile, (TOKENS, PLACES, RUN, CHANNELS)), (3, 1, 0, 2))
    else:
        tile = tl.permute(tl.reshape(tile, (TOKENS, CHANNELS, PLACES, RUN)), (1, 2, 0, 3))
    width = tl.cast(columns, tl.int64) * R
    out += ((batch * C * frames + frame) * P * rows + row) * Q * width + column * R
    target, inside = in_video(left, frames * P * rows * Q * width, rows * Q * width, width, 1, P, Q, R, C, TOKENS, CHANNELS, PLACES, RUN)
    tl.store(out + target, tl.reshape(tile, (CHANNELS * PLACES, TOKENS * RUN)), mask=inside)


def launch(tokens: Tensor, grid: list[int], patch: list[int], channels_last: bool) -> Tensor:
    check_launch(unpatchify_kernel, tokens)
    out = fake(tokens, grid, patch, channels_last)
    if out.numel():
        b, c = out.shape[:2]
        tile = patch_tile(c, patch, grid[2])
        unpatchify_kernel[(tile.programs(b, grid),)](out, tokens, *grid, *tokens.stride(), LAST=channels_last, **tile.constants, num_warps=tile.warps)
    return out


def kernels(arch: int) -> tuple[Kernel, ...]:
    tile = patch_tile(16, [1, 2, 2], 48)  # Movie Gen 30B
    numbers = dict.fromkeys(("frames", "rows", "columns", "t_batch", "t_token"), "i32")
    arguments: dict[str, Argument] = {"out": "*bf16", "tokens": "*bf16", **numbers, "t_value": 1, "LAST": False, **tile.constants}
    return (Kernel("unpatchify", unpatchify_kernel, arguments, tile.warps, 1),)


def examples(make: Make) -> Iterator[tuple[Any, ...]]:
    for last in (False, True):
        for b, c, grid, patch in ((2, 3, [2, 2, 3], [1, 2, 2]), (1, 4, [2, 2, 3], [2, 3, 1]), (1, 1, [1, 1, 1], [1, 1, 1]), (0, 2, [1, 2, 2], [1, 2, 2])):
            yield make(b, prod(grid), c * prod(patch)), grid, patch, last


OP = define("unpatchify", reference=reference, fake=fake, launch=launch, kernels=kernels, examples=examples)
