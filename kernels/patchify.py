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

BLOCK, WARPS = 1024, 4


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
    out: tl.tensor, x: tl.tensor, count: tl.tensor, frames: tl.tensor, rows: tl.tensor, columns: tl.tensor, channels: tl.tensor,
    x_batch: tl.tensor, x_channel: tl.tensor, x_frame: tl.tensor, x_row: tl.tensor, x_column: tl.tensor,
    P: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Walks the tokens in memory order: writes are whole lines, reads runs of R whose lines neighbouring tokens share.

    frames, rows, columns: of tokens.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    volume = P * Q * R * channels
    token, i = at // volume, (at % volume).to(tl.int32)
    channel = i % channels if LAST else i // (P * Q * R)
    i = i // channels if LAST else i % (P * Q * R)
    column = token % columns * R + i % R
    row = token // columns % rows * Q + i // R % Q
    frame = token // columns // rows % frames * P + i // R // Q
    batch = token // columns // rows // frames
    source = batch * x_batch + channel.to(tl.int64) * x_channel + frame * x_frame + row * x_row + column * x_column
    tl.store(out + at, tl.load(x + source, mask=inside), mask=inside)


def launch(x: Tensor, patch: list[int], channels_last: bool) -> Tensor:
    check_launch(patchify_kernel, x)
    out, (p, q, r) = fake(x, patch, channels_last), patch
    if count := out.numel():
        _, c, f, h, w = x.shape
        sizes, constants = (f // p, h // q, w // r, c), {"P": p, "Q": q, "R": r, "LAST": channels_last}
        patchify_kernel[(-(-count // BLOCK),)](out, x, count, *sizes, *x.stride(), **constants, BLOCK=BLOCK, num_warps=WARPS)
    return out


def kernels(arch: int) -> tuple[Kernel, ...]:
    numbers = ("count", "frames", "rows", "columns", "channels", "x_batch", "x_channel", "x_frame", "x_row")
    arguments: dict[str, Argument] = {"out": "*bf16", "x": "*fp32", **dict.fromkeys(numbers, "i32"), "x_column": 1}
    return (Kernel("patchify", patchify_kernel, {**arguments, "P": 1, "Q": 2, "R": 2, "LAST": False, "BLOCK": BLOCK}, WARPS, 1),)


def examples(make: Make) -> Iterator[tuple[Any, ...]]:
    for last in (False, True):
        for sizes, patch in (((2, 3, 2, 4, 6), [1, 2, 2]), ((1, 4, 4, 6, 3), [2, 3, 1]), ((1, 1, 1, 1, 1), [1, 1, 1]), ((0, 2, 1, 4, 4), [1, 2, 2])):
            yield make(*sizes), patch, last


OP = define("patchify", reference=reference, fake=fake, launch=launch, kernels=kernels, examples=examples)
