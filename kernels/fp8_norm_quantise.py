"""A norm, adaptive layer norm's affine part and FP8 quantisation in one pass: what a matrix product in FP8 reads, without the tensor in between.

B batch, L tokens, D width. Values are E4M3 (Micikevicius et al. 2022, arXiv:2209.05433), whose largest is 448; a float32 scale per row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reelstep.errors import ConfigError
from reelstep.kernels.jit import check_launch, interpreted, jit, launch_rows, modulated, normed, per_token, read, row_tile, tl, unit_rows, write
from reelstep.kernels.op import Argument, Kernel, Make, check_rank, check_shape, define, wide

LARGEST = 448.0
SMALLEST = 1e-12
"""Of a row's largest magnitude, so that a row of zeros has a scale to divide by."""


def fp8_norm_quantise(
    x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None, weight: Tensor | None = None, eps: float = 1e-6, centred: bool = False
) -> tuple[Tensor, Tensor]:
    """x: [B, L, D] -> values [B, L, D] in float8_e4m3fn and a float32 step [B, L] per row: values * step is about norm(x) * weight * (1 + scale) + shift.

    scale, shift: [B, D] or [B, L, D]; weight: [D]; centred: LayerNorm instead of RMSNorm. Raises ConfigError for shapes that do not fit.
    """
    check_rank("fp8_norm_quantise", "x", x, "B L D")
    b, length, d = x.shape
    if (scale is None) != (shift is None):
        raise ConfigError("fp8_norm_quantise: scale and shift are given or left out together")
    if scale is not None and shift is not None:
        check_shape("fp8_norm_quantise", "scale", scale, (b, d), (b, length, d))
        check_shape("fp8_norm_quantise", "shift", shift, tuple(scale.shape))
    if weight is not None:
        check_shape("fp8_norm_quantise", "weight", weight, (d,))
    out: tuple[Tensor, Tensor] = OP(x, scale, shift, weight, eps, centred)
    return out


def e4m3_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., K] as values in E4M3 and a float32 step for each row, [...]: that of a row of zeros is 0 in float16."""
    x = x.float()
    step = x.abs().amax(-1).clamp_min(SMALLEST) / LARGEST
    return (x / step[..., None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), step


def reference(x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    gain = None if weight is None else wide(weight)
    y = F.layer_norm(wide(x), x.shape[-1:], gain, None, eps) if centred else F.rms_norm(wide(x), x.shape[-1:], gain, eps)
    if scale is not None and shift is not None:
        scale, shift = (v[:, None] if v.ndim == 2 else v for v in (scale, shift))
        y = y * (1 + wide(scale)) + wide(shift)
    values, step = e4m3_rows(y)
    return values, step.float()


def fake(x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[:2], dtype=torch.float32)


@jit
def rounded_to_e4m3(y: tl.tensor) -> tl.tensor:
    """float32 to the nearest number that E4M3 has, ties to even, at most 448. GPUs do so as they convert; Triton's interpreter rounds ties up, drops the
    carry, and takes what rounding has carried past 448 for NaN.
    """
    y = tl.minimum(tl.maximum(y, -448.0), 448.0)
    bits = y.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).to(tl.float32, bitcast=True)
    subnormal = (y + 24576.0) - 24576.0  # 1.5 * 2**14, where the last bit of float32 is worth 2**-9
    return tl.where(tl.abs(y) < 0.015625, subnormal, normal)


@jit
def fp8_norm_quantise_kernel(
    values: tl.tensor, steps: tl.tensor, x: tl.tensor, scale: tl.tensor, shift: tl.tensor, weight: tl.tensor, rows: tl.tensor,
    length: tl.tensor, width: tl.tensor, x_batch: tl.tensor, x_token: tl.tensor, m_batch: tl.tensor, m_token: tl.tensor, eps: tl.tensor,
    smallest: tl.tensor, CENTRED: tl.constexpr, ROUND: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch, token, there = (row // length).to(tl.int64), (row % length).to(tl.int64), row < rows
    tiles = read(x, batch * x_batch + token * x_token, there, width, PARTS, BLOCK)
    tiles = normed(tiles, weight, width, eps, CENTRED, PARTS, BLOCK)
    if scale is not None:
        tiles = modulated(tiles, scale, shift, batch * m_batch + token * m_token, there, width, PARTS, BLOCK)
    magnitudes = tl.abs(tiles[0])
    for part in tl.static_range(1, PARTS):
        magnitudes = tl.maximum(magnitudes, tl.abs(tiles[part]))
    largest = tl.maximum(tl.max(magnitudes, 1), smallest)
    # One division for a row: with one for each value an H100 waits for arithmetic and not for memory.
    factor = 448.0 / largest
    quantised: tl.tuple = ()
    for part in tl.static_range(PARTS):
        value = tiles[part] * factor[:, None]
        if ROUND:
            value = rounded_to_e4m3(value)
        quantised = quantised + (value,)
    write(values, row.to(tl.int64) * width, quantised, there, width, PARTS, BLOCK)
    tl.store(steps + row, largest / 448.0, mask=there)


def launch(x: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor | None, eps: float, centred: bool) -> tuple[Tensor, Tensor]:
    check_launch(fp8_norm_quantise_kernel, x)
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9):
        return reference(x, scale, shift, weight, eps, centred)  # Ampere has no instruction that makes E4M3
    b, length, d = x.shape
    values, steps = fake(x, scale, shift, weight, eps, centred)
    x, gain = unit_rows(x), None if weight is None else weight.contiguous()
    strides: tuple[int, ...] = (*x.stride()[:2], 0, 0)
    if scale is not None and shift is not None:
        scale, shift = per_token(length, scale, shift)
        strides = (*x.stride()[:2], *scale.stride()[:2])
    arguments = (values, steps, x, scale, shift, gain, b * length, length, d, *strides, eps, SMALLEST)
    launch_rows(fp8_norm_quantise_kernel, b * length, d, *arguments, CENTRED=centred, ROUND=interpreted(fp8_norm_quantise_kernel))
    return values, steps


def kernels(arch: int) -> tuple[Kernel, ...]:
    tile = row_tile(6144)  # Movie Gen 30B
    types = {"values": "*fp8e4nv", "steps": "*fp32", **dict.fromkeys(("x", "scale", "shift", "weight"), "*bf16")}
    numbers = dict.fromkeys(("rows", "length", "width", "x_batch", "x_token", "m_batch"), "i32")
    arguments: dict[str, Argument] = {
        **types,
        **numbers,
        "m_token": "i32",
        "eps": "fp32",
        "smallest": "fp32",
        "CENTRED": False,
        "ROUND": False,
        **tile.constants,
    }
    return (Kernel("fp8_norm_quantise", fp8_norm_quantise_kernel, arguments, tile.warps, 1, min_arch=89),)


def examples(make: Make) -> Iterator[tuple[Any, ...]]:
    for b, length, d in ((2, 5, 48), (1, 1, 1), (0, 4, 8), (2, 3, 65), (1, 2, 1536)):
        yield make(b, length, d), make(b, d), make(b, d), make(d), 1e-6, False
    yield make(2, 7, 100), None, None, None, 1e-5, True
    yield make(2, 7, 32), make(2, 7, 32), make(2, 7, 32), None, 1e-6, False
    yield make(2, 3, 32), make(2, 96)[:, 32:64], make(2, 32), None, 1e-6, False
    yield torch.zeros_like(make(1, 2, 16)), None, None, make(16), 1e-6, False


OP = define("fp8_norm_quantise", reference=reference, fake=fake, launch=launch, kernels=kernels, examples=examples)
