"""The end of a block: x + gate * y.

B batch, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from reelstep.kernels.jit import check_launch, jit, launch_rows, per_token, read, row_tile, tl, unit_rows, write
from reelstep.kernels.op import Argument, Kernel, Make, check_rank, check_shape, define, wide


def gated_residual(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x, y: [B, L, D]; gate: [B, D], or [B, L, D] for a model with a time per token. Gives [B, L, D] in x's dtype, that of the residual stream.

    Raises ConfigError for shapes that do not fit.
    """
    check_rank("gated_residual", "x", x, "B L D")
    b, length, d = x.shape
    check_shape("gated_residual", "y", y, (b, length, d))
    check_shape("gated_residual", "gate", gate, (b, d), (b, length, d))
    out: Tensor = OP(x, gate, y)
    return out


def reference(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    gate = gate[:, None] if gate.ndim == 2 else gate
    return (wide(x) + wide(gate) * wide(y)).to(x.dtype)


def fake(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@jit
def gated_residual_kernel(
    out: tl.tensor, x: tl.tensor, gate: tl.tensor, y: tl.tensor, rows: tl.tensor, length: tl.tensor, width: tl.tensor, x_batch: tl.tensor, x_token: tl.tensor,
    g_batch: tl.tensor, g_token: tl.tensor, y_batch: tl.tensor, y_token: tl.tensor, ROWS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    batch, token, there = (row // length).to(tl.int64), (row % length).to(tl.int64), row < rows
    a = read(x, batch * x_batch + token * x_token, there, width, PARTS, BLOCK)
    g = read(gate, batch * g_batch + token * g_token, there, width, PARTS, BLOCK)
    b = read(y, batch * y_batch + token * y_token, there, width, PARTS, BLOCK)
    tiles: tl.tuple = ()
    for part in tl.static_range(PARTS):
        tiles = tiles + (a[part] + g[part] * b[part],)
    write(out, row.to(tl.int64) * width, tiles, there, width, PARTS, BLOCK)


def launch(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    check_launch(gated_residual_kernel, x)
    b, length, d = x.shape
    out, x, (gate,), y = x.new_empty(x.shape), unit_rows(x), per_token(length, gate), unit_rows(y)
    strides = (*x.stride()[:2], *gate.stride()[:2], *y.stride()[:2])
    launch_rows(gated_residual_kernel, b * length, d, out, x, gate, y, b * length, length, d, *strides)
    return out


def kernels(arch: int) -> tuple[Kernel, ...]:
    tile = row_tile(6144)  # Movie Gen 30B
    numbers = dict.fromkeys(("rows", "length", "width", "x_batch", "x_token", "g_batch", "y_batch", "y_token"), "i32")
    arguments: dict[str, Argument] = {**dict.fromkeys(("out", "x", "gate", "y"), "*bf16"), **numbers, "g_token": "i32", **tile.constants}
    return (Kernel("gated_residual", gated_residual_kernel, arguments, tile.warps, 1),)


def examples(make: Make) -> Iterator[tuple[Any, ...]]:
    for b, length, d in ((2, 5, 48), (1, 1, 1), (0, 4, 8), (2, 3, 65), (1, 2, 3072)):
        yield make(b, length, d), make(b, d), make(b, length, d)
    yield make(2, 7, 32), make(2, 7, 32), make(2, 7, 32)
    yield make(2, 7, 32, dtype=torch.float32), make(2, 32, dtype=torch.float32), make(2, 7, 32)


OP = define("gated_residual", reference=reference, fake=fake, launch=launch, kernels=kernels, examples=examples)
