"""Join two attentions of the same queries to different keys: what ring attention does after each hop.

B batch, N heads, L queries, K head dim. With a = exp(lse_a), b = exp(lse_b): out = (a out_a + b out_b) / (a + b), lse = log(a + b). Rabe and Staats
2021, arXiv:2112.05682; Liu et al. 2023, arXiv:2310.01889.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from reelstep.kernels.jit import check_launch, jit, launch_rows, read, row_tile, tl, unit_rows, write
from reelstep.kernels.op import Kernel, Make, check_rank, check_shape, define, wide


def lse_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """out: [B, N, L, K]; lse: [B, N, L], natural logarithms, -inf where a query has met no key. Gives both for the union of the keys.

    out is in out_a's dtype: a ring that keeps it in float32 rounds once, at its end. lse is float32, or float64 if one is. Raises ConfigError for shapes
    that do not fit.
    """
    check_rank("lse_merge", "out_a", out_a, "B N L K")
    check_shape("lse_merge", "out_b", out_b, tuple(out_a.shape))
    for what, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        check_shape("lse_merge", what, lse, tuple(out_a.shape[:3]))
    out: tuple[Tensor, Tensor] = OP(out_a, lse_a, out_b, lse_b)
    return out


def reference(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    largest = torch.maximum(wide(lse_a), wide(lse_b))
    finite = torch.where(largest == -torch.inf, 0, largest)  # -inf from -inf is NaN
    a, b = (lse_a - finite).exp(), (lse_b - finite).exp()
    total = a + b
    whole = torch.where(total == 0, 1, total)[..., None]
    out = (a[..., None] * wide(out_a) + b[..., None] * wide(out_b)) / whole
    return out.to(out_a.dtype), finite + total.log()


def fake(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(lse_a.dtype, lse_b.dtype), torch.float32)
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape, dtype=dtype)


@jit
def lse_merge_kernel(
    out: tl.tensor, lse: tl.tensor, out_a: tl.tensor, lse_a: tl.tensor, out_b: tl.tensor, lse_b: tl.tensor, rows: tl.tensor, queries: tl.tensor,
    heads: tl.tensor, width: tl.tensor, a_batch: tl.tensor, a_head: tl.tensor, a_query: tl.tensor, b_batch: tl.tensor, b_head: tl.tensor,
    b_query: tl.tensor,
    ROWS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    query, head, batch = (row % queries).to(tl.int64), (row // queries % heads).to(tl.int64), (row // queries // heads).to(tl.int64)
    there = row < rows
    log_a = tl.load(lse_a + row, mask=there, other=0.0).to(tl.float32)
    log_b = tl.load(lse_b + row, mask=there, other=0.0).to(tl.float32)
    largest = tl.maximum(log_a, log_b)
    finite = tl.where(largest == -float("inf"), 0.0, largest)
    a, b = tl.exp(log_a - finite), tl.exp(log_b - finite)
    total = a + b
    whole = tl.where(total == 0.0, 1.0, total)
    x = read(out_a, batch * a_batch + head * a_head + query * a_query, there, width, PARTS, BLOCK)
    y = read(out_b, batch * b_batch + head * b_head + query * b_query, there, width, PARTS, BLOCK)
    merged: tl.tuple = ()
    for part in tl.static_range(PARTS):
        merged = merged + ((a / whole)[:, None] * x[part] + (b / whole)[:, None] * y[part],)
    write(out, row.to(tl.int64) * width, merged, there, width, PARTS, BLOCK)
    tl.store(lse + row, tl.where(total == 0.0, -float("inf"), finite + tl.log(whole)), mask=there)


def launch(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    check_launch(lse_merge_kernel, out_a)
    out, lse = fake(out_a, lse_a, out_b, lse_b)
    b, heads, queries, k = out_a.shape
    out_a, out_b, rows = unit_rows(out_a), unit_rows(out_b), b * heads * queries
    lse_a, lse_b, strides = lse_a.contiguous(), lse_b.contiguous(), (*out_a.stride()[:3], *out_b.stride()[:3])
    width = max(k, 1)  # heads of no values have lse all the same
    launch_rows(lse_merge_kernel, rows, width, out, lse, out_a, lse_a, out_b, lse_b, rows, queries, heads, k, *strides)
    return out, lse


def kernels(arch: int) -> tuple[Kernel, ...]:
    tile = row_tile(128)
    types = {"out": "*fp32", "lse": "*fp32", "out_a": "*fp32", "lse_a": "*fp32", "out_b": "*bf16", "lse_b": "*fp32"}
    numbers = ("rows", "queries", "heads", "width", "a_batch", "a_head", "a_query", "b_batch", "b_head", "b_query")
    return (Kernel("lse_merge", lse_merge_kernel, {**types, **dict.fromkeys(numbers, "i32"), **tile.constants}, tile.warps, 1),)


def examples(make: Make) -> Iterator[tuple[Any, ...]]:
    f32 = torch.float32
    for sizes in ((2, 3, 5, 16), (1, 1, 1, 1), (0, 2, 3, 8), (1, 2, 3, 0), (1, 2, 7, 96)):
        yield make(*sizes), 4 * make(*sizes[:3], dtype=f32), make(*sizes), 4 * make(*sizes[:3], dtype=f32)
    yield make(1, 2, 3, 8), 4 * make(1, 2, 3, dtype=torch.bfloat16), make(1, 2, 3, 8), 4 * make(1, 2, 3, dtype=torch.bfloat16)
    none = torch.full_like(make(2, 1, 3, dtype=f32), -torch.inf)
    yield make(2, 1, 3, 8, dtype=f32), make(2, 1, 3, dtype=f32), make(2, 1, 3, 8), none
    yield torch.zeros_like(make(2, 1, 3, 8)), none, torch.zeros_like(make(2, 1, 3, 8)), none


OP = define("lse_merge", reference=reference, fake=fake, launch=launch, kernels=kernels, examples=examples)
