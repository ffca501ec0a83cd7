"""RMS norm of queries and keys, then a rotation of each pair of values by an angle of the token's place in time, height and width.

B batch, L tokens of the queries, S of the keys, N heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reelstep.errors import ConfigError
from reelstep.kernels.jit import check_launch, jit, launch_rows, normed, read, row_tile, tl, unit_rows, write
from reelstep.kernels.op import Argument, Kernel, Make, check_rank, check_shape, define, wide


def qk_norm_rope(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None = None, sin: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """q: [B, L, N, K]; k: [B, S, N, K]; weights: [K] for a norm of each head, [N * K] for one over all heads. Gives both in their shape and dtype.

    cos, sin: [L, K / 2] of `rotary_3d`, on pairs (x[2i], x[2i + 1]). None for a model whose learned positions are added to its tokens, and for
    attention to a text: then only the norm is left. Raises ConfigError for shapes that do not fit. Rotary: Su et al. 2021, arXiv:2104.09864.
    """
    for what, x, weight in (("q", q, q_weight), ("k", k, k_weight)):
        check_rank("qk_norm_rope", what, x, "B L N K")
        heads, width = x.shape[2:]
        if weight is not None:
            check_shape("qk_norm_rope", f"{what}_weight", weight, (width,), (heads * width,))
        if cos is not None and sin is not None:
            if width % 2:
                raise ConfigError(f"qk_norm_rope: {what} has head dim {width}; a rotation turns pairs, so it must be even")
            check_shape("qk_norm_rope", "cos", cos, (x.shape[1], width // 2))
            check_shape("qk_norm_rope", "sin", sin, tuple(cos.shape))
    if (cos is None) != (sin is None):
        raise ConfigError("qk_norm_rope: a rotation needs both; cos and sin are given or left out together")
    out: tuple[Tensor, Tensor] = OP(q, k, q_weight, k_weight, cos, sin, eps)
    return out


def rotary_3d(grid: tuple[int, int, int], width: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin [L, width / 2] in float32 of tokens in (t, h, w) order. Height and width have width // 6 pairs each, time the rest.

    Made in float64: an angle of 1e5 has lost four digits in float32. Raises ConfigError for an odd width.
    """
    if width % 2:
        raise ConfigError(f"rotary_3d: head dim {width}; a rotation turns pairs, so it must be even")
    space = width // 6
    pairs = (width // 2 - 2 * space, space, space)
    places = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    frequencies = [theta ** -(torch.arange(n, dtype=torch.float64) / max(n, 1)) for n in pairs]
    angles = torch.cat([place.flatten()[:, None] * frequency for place, frequency in zip(places, frequencies, strict=True)], dim=1)
    return angles.cos().float(), angles.sin().float()


def _reference(x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    y = wide(x)
    across = weight is not None and weight.shape[0] != x.shape[3]
    y = y.flatten(2) if across else y
    y = F.rms_norm(y, y.shape[-1:], None if weight is None else wide(weight), eps)
    y = y.reshape(x.shape) if across else y  # elsewhere a view in every graph between a norm and the attention that could take its operand as it lies
    if cos is not None and sin is not None:
        even, odd = y[..., ::2], y[..., 1::2]
        c, s = wide(cos)[:, None], wide(sin)[:, None]
        y = torch.stack([even * c - odd * s, even * s + odd * c], dim=-1).flatten(-2)
    return y.to(x.dtype)


def reference(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return _reference(q, q_weight, cos, sin, eps), _reference(k, k_weight, cos, sin, eps)


def fake(q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


@jit
def qk_norm_rope_kernel(
    out: tl.tensor, x: tl.tensor, weight: tl.tensor, cos: tl.tensor, sin: tl.tensor, rows: tl.tensor, length: tl.tensor, heads: tl.tensor,
    width: tl.tensor, pairs: tl.tensor, x_batch: tl.tensor, x_token: tl.tensor, x_head: tl.tensor, eps: tl.tensor,
    ROWS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """A row is a head, or, where the norm is over all of them, a token: then heads is 1. pairs: of one head, after which the angles repeat."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head, token, batch, there = row % heads, row // heads % length, row // heads // length, row < rows
    at = batch.to(tl.int64) * x_batch + token.to(tl.int64) * x_token + head.to(tl.int64) * x_head
    tiles = normed(read(x, at, there, width, PARTS, BLOCK), weight, width, eps, False, PARTS, BLOCK)
    if cos is not None:
        turned: tl.tuple = ()
        for part in tl.static_range(PARTS):
            pair = part * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
            angle, known = token[:, None] * pairs + (pair % pairs)[None, :], there[:, None] & (pair < width // 2)[None, :]
            c, s = tl.load(cos + angle, mask=known, other=0.0), tl.load(sin + angle, mask=known, other=0.0)
            # Pairs are split in registers, so that memory is read in whole lines and not every second value.
            even, odd = tl.split(tl.reshape(tiles[part], (ROWS, BLOCK // 2, 2)))
            turned = turned + (tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (ROWS, BLOCK)),)
        tiles = turned
    write(out, row.to(tl.int64) * width, tiles, there, width, PARTS, BLOCK)


def _launch(x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float) -> Tensor:
    b, length, heads, k = x.shape
    across = weight is not None and weight.shape[0] != k
    out, x = x.new_empty(x.shape), unit_rows(x)
    if across:
        x = (x if x.stride(2) == k else x.contiguous()).reshape(b, length, 1, heads * k)
    heads, width = x.shape[2:]
    rows = b * length * heads
    launch_rows(qk_norm_rope_kernel, rows, width, out, x, weight, cos, sin, rows, length, heads, width, k // 2, *x.stride()[:3], eps)
    return out


def launch(q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    check_launch(qk_norm_rope_kernel, q)
    q_weight, k_weight, cos, sin = (None if v is None else v.contiguous() for v in (q_weight, k_weight, cos, sin))
    return _launch(q, q_weight, cos, sin, eps), _launch(k, k_weight, cos, sin, eps)


def kernels(arch: int) -> tuple[Kernel, ...]:
    numbers = dict.fromkeys(("rows", "length", "heads", "width", "pairs", "x_batch", "x_token", "x_head"), "i32")
    made = []
    models = (("qk_norm", 128, None), ("qk_norm_rope", 128, "*fp32"), ("qk_norm_rope_all_heads", 5120, "*fp32"))  # Movie Gen, HunyuanVideo, Wan
    for name, width, angles in models:
        tile = row_tile(width)
        arguments: dict[str, Argument] = {
            "out": "*bf16",
            "x": "*bf16",
            "weight": "*bf16",
            "cos": angles,
            "sin": angles,
            **numbers,
            "eps": "fp32",
            **tile.constants,
        }
        if width > 128:
            arguments["heads"] = 1
        made.append(Kernel(name, qk_norm_rope_kernel, arguments, tile.warps, 1))
    return tuple(made)


def examples(make: Make) -> Iterator[tuple[Any, ...]]:
    f32 = torch.float32
    for b, length, n, k in ((2, 5, 3, 16), (1, 1, 1, 2), (0, 4, 2, 8), (2, 9, 2, 96), (1, 3, 2, 128)):
        cos, sin = make(length, k // 2, dtype=f32), make(length, k // 2, dtype=f32)
        yield make(b, length, n, k), make(b, length, n, k), make(k), make(k), cos, sin, 1e-6
        yield make(b, length, n, k), make(b, length, n, k), make(n * k), make(n * k), cos, sin, 1e-6
    yield make(2, 5, 3, 16), make(2, 7, 3, 16), make(16), make(16), None, None, 1e-6
    yield make(2, 5, 3, 17), make(2, 0, 3, 17), None, None, None, None, 1e-5


OP = define("qk_norm_rope", reference=reference, fake=fake, launch=launch, kernels=kernels, examples=examples)
