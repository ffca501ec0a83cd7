"""Attention in Triton: one program per block of queries, keys streamed past it, softmax kept up to date as they come.

B batch, N heads, L queries, S keys, K head dim. Dao 2023, arXiv:2307.08691, algorithm 1. Scores are kept in units of log 2, since the hardware has an
exponential of base 2 only and the factor disappears in the scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from reelstep.kernels.attention_choice import Implementation
from reelstep.kernels.jit import HAS_TRITON, check_launch, interpreted, jit, power_of_two, tl, triton, unit_rows
from reelstep.kernels.op import Argument, Kernel

LOG2_E = math.log2(math.e)
MAX_HEAD = 256


@dataclass(frozen=True)
class Tile:
    """Queries and keys of one step, warps, and how many steps of keys are in flight."""

    queries: int
    keys: int
    warps: int
    stages: int


# Bytes of shared memory at head dim 128 in half precision: 256 a query, 512 a key and stage. 227 kB are usable on sm90 and sm100 (two stages of 128 keys
# and 128 queries take 160), 163 on sm80, 99 on sm89 and sm120. SMALL fits rows of 512 bytes everywhere; TINY fits those of 1 kB, which float32 has at 256.
SMALL, TINY = Tile(64, 32, 8, 2), Tile(32, 16, 4, 2)
TILES = {
    80: (Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(64, 64, 8, 3), SMALL),
    89: (Tile(128, 32, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), SMALL),
    90: (Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(128, 128, 8, 2), SMALL),
    100: (Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), SMALL),
    120: (Tile(128, 32, 8, 3), Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), SMALL),
}
"""By arch; the first is what is compiled ahead, and on a GPU the fastest is found once for each number of queries and of keys, head dim and dtype."""

INTERPRETED = Tile(64, 64, 4, 1)


@jit
def attend(
    acc: tl.tensor, largest: tl.tensor, total: tl.tensor, q: tl.tensor, k_at: tl.tensor, v_at: tl.tensor, key: tl.tensor, col: tl.tensor,
    length: tl.tensor, width: tl.tensor, scale: tl.tensor,
    MASKED: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """One step: the keys `key`, of which only those before `length` count. Scores are unscaled until they enter the exponential, in one multiply-add."""
    if WHOLE and not MASKED:
        k, v = tl.load(k_at), tl.load(v_at)
    else:
        k = tl.load(k_at, mask=(col < width)[:, None] & (key < length)[None, :], other=0.0)
        v = tl.load(v_at, mask=(key < length)[:, None] & (col < width)[None, :], other=0.0)
    scores = tl.dot(q, k, input_precision="ieee" if EXACT else "tf32")
    if MASKED:
        scores = tl.where((key < length)[None, :], scores, -float("inf"))
    largest_now = tl.maximum(largest, tl.max(scores, 1) * scale)
    p = tl.math.exp2(scores * scale - largest_now[:, None])
    shrink = tl.math.exp2(largest - largest_now)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee" if EXACT else "tf32")
    return acc, largest_now, total * shrink + tl.sum(p, 1)


@jit
def attention_kernel(
    out: tl.tensor, lse: tl.tensor, q: tl.tensor, k: tl.tensor, v: tl.tensor, lengths: tl.tensor, scale: tl.tensor, queries: tl.tensor,
    keys: tl.tensor, heads: tl.tensor, width: tl.tensor, q_batch: tl.tensor, q_head: tl.tensor, q_token: tl.tensor, k_batch: tl.tensor,
    k_head: tl.tensor, k_token: tl.tensor, v_batch: tl.tensor, v_head: tl.tensor, v_token: tl.tensor,
    HEAD: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
) -> None:  # fmt: skip
    """Full blocks of keys first, then the rest, masked. Writes out as [B, L, N, K].

    scale includes log2(e). HEAD: width, up to a power of two; WHOLE: equal to it; EXACT: products of float32 in float32.
    """
    # Programs of one head are next to each other, so that its keys are in the cache. All are on one axis of the grid: the others end at 65,535.
    tile, row = tl.program_id(0) % tl.cdiv(queries, QUERIES), tl.program_id(0) // tl.cdiv(queries, QUERIES)
    # Addresses are one of 64 bits for what a program or a step shares, and 32 bits within its tile: registers are what runs out first here.
    first, batch, head = tile.to(tl.int64) * QUERIES, (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    query, key, col = tl.arange(0, QUERIES), tl.arange(0, KEYS), tl.arange(0, HEAD)
    inside = (query < queries - first)[:, None] & (col < width)[None, :]
    q_tile = tl.load(q + batch * q_batch + head * q_head + first * q_token + (query[:, None] * q_token + col[None, :]), mask=inside, other=0.0)
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    k_within, v_within = key[None, :] * k_token + col[:, None], key[:, None] * v_token + col[None, :]
    k_step, v_step = tl.cast(k_token, tl.int64) * KEYS, tl.cast(v_token, tl.int64) * KEYS
    length = keys
    if lengths is not None:
        length = tl.minimum(tl.load(lengths + batch), keys)
    full = length // KEYS * KEYS
    acc = tl.zeros((QUERIES, HEAD), tl.float32)
    # The least finite number: a score of -inf may come first, and -inf from -inf is NaN.
    largest, total = tl.full((QUERIES,), -3.4028234663852886e38, tl.float32), tl.zeros((QUERIES,), tl.float32)
    for start in tl.range(0, full, KEYS):
        acc, largest, total = attend(acc, largest, total, q_tile, k + k_within, v + v_within, start + key, col, length, width, scale, False, WHOLE, EXACT)
        k += k_step
        v += v_step
    if full < length:
        acc, largest, total = attend(acc, largest, total, q_tile, k + k_within, v + v_within, full + key, col, length, width, scale, True, WHOLE, EXACT)
    some = tl.where(total == 0.0, 1.0, total)
    out += ((batch * queries + first) * heads + head) * width
    tl.store(out + query[:, None] * (heads * width) + col[None, :], (acc / some[:, None]).to(out.dtype.element_ty), mask=inside)
    lse += (batch * heads + head) * queries + first
    log = tl.where(total == 0.0, -float("inf"), (largest + tl.math.log2(some)) * 0.6931471805599453)
    tl.store(lse + query, log, mask=query < queries - first)


def tiles(arch: int, row_bytes: int) -> tuple[Tile, ...]:
    """Worth trying for rows of HEAD values; the last fits every arch."""
    return (*TILES.get(arch, TILES[80]), *((TINY,) if row_bytes > 512 else ()))


@cache
def _tuned(arch: int, row_bytes: int) -> Any:
    """The kernel that measures its tiles on the first tensors of their key and keeps the fastest for all later ones, of any batch, heads and lengths; tiles
    that do not fit the GPU are left out.
    """
    configs = [triton.Config({"QUERIES": t.queries, "KEYS": t.keys}, num_warps=t.warps, num_stages=t.stages) for t in tiles(arch, row_bytes)]
    return triton.autotune(configs, key=["queries", "keys", "width"])(attention_kernel)


def launch_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    check_launch(attention_kernel, q)
    (b, n, queries, width), keys = q.shape, k.shape[2]
    out, lse = q.new_empty(b, queries, n, width), q.new_empty(b, n, queries, dtype=torch.float32)
    if out.numel() == 0:
        return out.transpose(1, 2), lse
    q, k, v, lengths = unit_rows(q), unit_rows(k), unit_rows(v), None if lengths is None else lengths.contiguous()
    if interpreted(attention_kernel) and q.dtype == torch.bfloat16:
        q, k, v = q.float(), k.float(), v.float()  # the interpreter would multiply the integers that hold the bits
    head = max(16, power_of_two(width))
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    arguments = (out, lse, q, k, v, lengths, scale * LOG2_E, queries, keys, n, width, *strides)
    constants = {"HEAD": head, "WHOLE": head == width, "EXACT": q.dtype == torch.float32}

    def grid(chosen: dict[str, Any]) -> tuple[int]:
        return (-(-queries // chosen["QUERIES"]) * b * n,)

    if interpreted(attention_kernel):
        attention_kernel[grid](*arguments, **constants, QUERIES=INTERPRETED.queries, KEYS=INTERPRETED.keys)
    else:
        major, minor = torch.cuda.get_device_capability(q.device)
        _tuned(10 * major + minor, head * q.element_size())[grid](*arguments, **constants)
    return out.transpose(1, 2), lse


def kernels(arch: int) -> tuple[Kernel, ...]:
    tile = TILES[arch][0]
    pointers = {"out": "*bf16", "lse": "*fp32", "q": "*bf16", "k": "*bf16", "v": "*bf16"}
    numbers = ("queries", "keys", "heads", "width", *(f"{x}_{dim}" for x in "qkv" for dim in ("batch", "head", "token")))
    constants = {"HEAD": 128, "WHOLE": True, "EXACT": False, "QUERIES": tile.queries, "KEYS": tile.keys}
    made = []
    for name, lengths in (("attention", None), ("attention_lengths", "*i32")):
        arguments: dict[str, Argument] = {**pointers, "lengths": lengths, "scale": "fp32", **dict.fromkeys(numbers, "i32"), **constants}
        made.append(Kernel(name, attention_kernel, arguments, tile.warps, tile.stages))
    return tuple(made)


def refuses(q: Tensor, lengths: Tensor | None) -> str | None:
    if not HAS_TRITON:
        return "Triton is not installed"
    if not q.is_cuda and not interpreted(attention_kernel):
        return f"Triton compiles for GPUs, and the tensors are on {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it takes float16, bfloat16 and float32, not {q.dtype}"
    return f"head dim {q.shape[-1]} is above {MAX_HEAD}" if q.shape[-1] > MAX_HEAD else None


IMPLEMENTATION = Implementation("triton", refuses, launch_attention)
