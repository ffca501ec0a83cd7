"""A latent video cut into patches, each a token: [B, C, F, H, W] -> [B, L, P].

B batch, C channels, F H W frames and sides, L = F/p H/q W/r tokens in (t, h, w) order, P = C p q r values of a patch (p, q, r).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from reelstep.errors import ConfigError
from reelstep.kernels.jit import check_launch, jit, tl
from reelstep.kernels.op import Argument, Kernel, Make, check_rank, define
from reelstep.kernels.patch_tile import in_tokens, in_video, patch_tile, tile_place


def patchify(x: Tensor, patch: Sequence[int], channels_last: bool = False) -> Tensor:
    """x: [B, C, F, H, W] -> [B, L, P]. Values of a patch are in the order (C p q r), or (p q r C) if channels_last.

    Raises ConfigError unless patch is three sizes that divide F, H and W.
    """
    check_rank("patchify", "x", x, "B C F H W")
    if len(patch) != 3 or min(patch) < 1 or any(size % p for size, p in zip(x.shape[2:], patch, strict=True)):
        raise ConfigError(f"patchify: patch {tuple(patch)} does not divide F, H, W = {tuple(x.shape[2:])}; pad the latent or choose other sizes")
    out: Tensor = OP(x, list(patch), channels_last)
    return out


def reference(x: Tensor, patch: list[int], channels_last: bool) -> Tensor:
    p, q, r = patch
    b, c, f, h, w = x.shape
    cut = x.reshape(b, c, f // p, p, h // q, q, w // r, r)
    order = (0, 2, 4, 6, 3, 5, 7, 1) if channels_last else (0, 2, 4, 6, 1, 3, 5, 7)
    return cut.permute(order).clone(memory_format=torch.contiguous_format).reshape(b, (f // p) * (h // q) * (w // r), c * p * q * r)


def fake(x: Tensor, patch: list[int], channels_last: bool) -> Tensor:
    p, q, r = patch
    b, c, f, h, w = x.shape
    return x.new_empty(b, (f // p) * (h // q) * (w // r), c * p * q * r)


@jit
def patchify_kernel(
    out: tl.tensor, x: tl.tensor, frames: tl.tensor, rows: tl.tensor, columns: tl.tensor,
    x_batch: tl.tensor, x_channel: tl.tensor, x_frame: tl.tensor, x_row: tl.tensor, x_column: tl.tensor,
    P: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, C: tl.constexpr, LAST: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr, RUN: tl.constexpr,
) -> None:  # fmt: skip
    """frames, rows, columns: of tokens."""
    batch, frame, row, column = tile_place(frames, rows, columns, TOKENS)
    left = columns - column
    x += batch * x_batch + frame * P * x_frame + row * Q * x_row + column * R * x_column
    source, inside = in_video(left, x_channel, x_frame, x_row, x_column, P, Q, R, C, TOKENS, CHANNELS, PLACES, RUN)
    tile = tl.reshape(tl.load(x + source, mask=inside), (CHANNELS, PLACES, TOKENS, RUN))
    tile = tl.permute(tile, (2, 1, 3, 0)) if LAST else tl.permute(tile, (2, 0, 1, 3))
    out += (((batch * frames + frame) * rows + row) * columns + column) * (C * P * Q * R)
    target, inside = in_tokens(left, C * P * Q * R, 1, P, Q, R, C, LAST, TOKENS, CHANNELS, PLACES, RUN)
    tl.store(out + target, tl.reshape(tile, (TOKENS, CHANNELS * PLACES * RUN)), mask=inside)


def launch(x: Tensor, patch: list[int], channels_last: bool) -> Tensor:
    check_launch(patchify_kernel, x)
    out, (p, q, r) = fake(x, patch, channels_last), patch
    if out.numel():
        b, c, f, h, w = x.shape
        grid, tile = (f // p, h // q, w // r), patch_tile(c, patch, w // r)
        patchify_kernel[(tile.programs(b, grid),)](out, x, *grid, *x.stride(), LAST=channels_last, **tile.constants, num_warps=tile.warps)
    return out


def kernels(arch: int) -> tuple[Kernel, ...]:
    tile = patch_tile(16, [1, 2, 2], 48)  # Movie Gen 30B
    numbers = dict.fromkeys(("frames", "rows", "columns", "x_batch", "x_channel", "x_frame", "x_row"), "i32")
    arguments: dict[str, Argument] = {"out": "*bf16", "x": "*bf16", **numbers, "x_column": 1, "LAST": False, **tile.constants}
    return (Kernel("patchify", patchify_kernel, arguments, tile.warps, 1),)


def examples(make: Make) -> Iterator[tuple[Any, ...]]:
    for last in (False, True):
        for sizes, patch in (((2, 3, 2, 4, 6), [1, 2, 2]), ((1, 4, 4, 6, 3), [2, 3, 1]), ((1, 1, 1, 1, 1), [1, 1, 1]), ((0, 2, 1, 4, 4), [1, 2, 2])):
            yield make(*sizes), patch, last


OP = define("patchify", reference=reference, fake=fake, launch=launch, kernels=kernels, examples=examples)
