"""Norm of the tokens, then adaptive layer norm's affine part, in one pass: norm(x) * weight * (1 + scale) + shift.

B batch, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from reelstep.kernels.jit import check_launch, jit, launch_rows, modulated, normed, per_token, read, row_tile, tl, unit_rows, write
from reelstep.kernels.op import Argument, Kernel, Make, check_rank, check_shape, define, wide


def rms_modulate(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None = None, eps: float = 1e-6, centred: bool = False) -> Tensor:
    """x: [B, L, D]; scale, shift: [B, D], or [B, L, D] for a model with a time per token; weight: [D]. Gives [B, L, D] in x's dtype.

    centred: LayerNorm instead of RMSNorm. Raises ConfigError for shapes that do not fit. RMSNorm: Zhang and Sennrich 2019, arXiv:1910.07467; adaLN:
    Peebles and Xie 2023, arXiv:2212.09748.
    """
    check_rank("rms_modulate", "x", x, "B L D")
    b, length, d = x.shape
    for what, v in (("scale", scale), ("shift", shift)):
        check_shape("rms_modulate", what, v, (b, d), (b, length, d))
    check_shape("rms_modulate", "shift", shift, tuple(scale.shape))
    if weight is not None:
        check_shape("rms_modulate", "weight", weight, (d,))
    out: Tensor = OP(x, scale, shift, weight, eps, centred)
    return out


def reference(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, eps: float, centred: bool) -> Tensor:
    gain = None if weight is None else wide(weight)
    y = F.layer_norm(wide(x), x.shape[-1:], gain, None, eps) if centred else F.rms_norm(wide(x), x.shape[-1:], gain, eps)
    if scale.ndim == 2:
        scale, shift = scale[:, None], shift[:, None]
    return (y * (1 + wide(scale)) + wide(shift)).to(x.dtype)


def fake(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, eps: float, centred: bool) -> Tensor:
    return x.new_empty(x.shape)


@jit
def rms_modulate_kernel(
    out: tl.tensor, x: tl.tensor, scale: tl.tensor, shift: tl.tensor, weight: tl.tensor, rows: tl.tensor, length: tl.tensor, width: tl.tensor,
    x_batch: tl.tensor, x_token: tl.tensor, m_batch: tl.tensor, m_token: tl.tensor, eps: tl.tensor,
    CENTRED: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Strides are those of x and of the modulation, which may be a chunk of a wider tensor or have no stride along the tokens."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch, token, there = (row // length).to(tl.int64), (row % length).to(tl.int64), row < rows
    tiles = read(x, batch * x_batch + token * x_token, there, width, PARTS, BLOCK)
    tiles = normed(tiles, weight, width, eps, CENTRED, PARTS, BLOCK)
    tiles = modulated(tiles, scale, shift, batch * m_batch + token * m_token, there, width, PARTS, BLOCK)
    write(out, row.to(tl.int64) * width, tiles, there, width, PARTS, BLOCK)


def launch(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor | None, eps: float, centred: bool) -> Tensor:
    check_launch(rms_modulate_kernel, x)
    b, length, d = x.shape
    out, x, (scale, shift) = x.new_empty(x.shape), unit_rows(x), per_token(length, scale, shift)
    gain = None if weight is None else weight.contiguous()
    strides = (*x.stride()[:2], *scale.stride()[:2])
    launch_rows(rms_modulate_kernel, b * length, d, out, x, scale, shift, gain, b * length, length, d, *strides, eps, CENTRED=centred)
    return out


def kernels(arch: int) -> tuple[Kernel, ...]:
    tile = row_tile(6144)  # Movie Gen 30B
    types = dict.fromkeys(("out", "x", "scale", "shift", "weight"), "*bf16")
    numbers = dict.fromkeys(("rows", "length", "width", "x_batch", "x_token", "m_batch"), "i32")
    arguments: dict[str, Argument] = {**types, **numbers, "m_token": "i32", "eps": "fp32", "CENTRED": False, **tile.constants}
    return (Kernel("rms_modulate", rms_modulate_kernel, arguments, tile.warps, 1),)


def examples(make: Make) -> Iterator[tuple[Any, ...]]:
    for b, length, d in ((2, 5, 48), (1, 1, 1), (3, 33, 64), (0, 4, 8), (2, 0, 8), (1, 2, 1536), (2, 3, 65)):
        yield make(b, length, d), make(b, d), make(b, d), make(d), 1e-6, False
    yield make(2, 7, 100), make(2, 100), make(2, 100), None, 1e-5, True
    yield make(2, 7, 96), make(2, 7, 96), make(2, 7, 96), None, 1e-6, False
    yield make(2, 3, 32), make(2, 96)[:, 32:64], make(2, 32), None, 1e-6, False


OP = define("rms_modulate", reference=reference, fake=fake, launch=launch, kernels=kernels, examples=examples)
