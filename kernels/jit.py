"""Triton where it is installed, and what its kernels share. Without it every op still has its formula; with TRITON_INTERPRET=1 kernels run on a CPU.

In a kernel's signature `tl.tensor` is the address of a tensor's first element, or None for one that is not there, or a number.
Kernels over rows hold them in registers, as PARTS tiles [ROWS, BLOCK] side by side. Narrow rows share a program; a wide one is in several parts, since a
tile's width is a power of two, and one that holds a row of 6144 values would leave a quarter of its threads with nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reelstep.errors import ConfigError

__all__ = [
    "HAS_TRITON", "MAX_WIDTH", "RowTile", "as_rows", "check_launch", "interpreted", "jit", "launch_rows", "modulated", "normed", "per_token",
    "power_of_two", "read", "row_tile", "tl", "triton", "unit_rows", "write",
]  # fmt: skip

try:
    import triton
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
except ImportError:  # no wheel for this platform, or a CPU build of PyTorch without the extra
    triton = tl = InterpretedFunction = None

HAS_TRITON = triton is not None

MAX_WIDTH = 32768
"""Of a row held in registers: 64 values a thread at 16 warps."""


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`; without Triton the function as it is, which nobody can launch."""
    return triton.jit(function) if HAS_TRITON else function


def interpreted(kernel: Any) -> bool:
    """Whether the kernel runs in Triton's interpreter."""
    return isinstance(kernel, InterpretedFunction)


def check_launch(kernel: Any, tensor: Tensor) -> None:
    """Raises ConfigError where `kernel` cannot run on the device of `tensor`."""
    if not HAS_TRITON:
        raise ConfigError("this kernel needs Triton; install reelstep[triton], or call the op, which then runs its formula")
    if not tensor.is_cuda and not interpreted(kernel):
        raise ConfigError(f"a Triton kernel was launched on {tensor.device}; move the tensors to a GPU, or set TRITON_INTERPRET=1 before Triton is imported")
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        raise ConfigError(
            f"tensors are on {tensor.device}, and Triton launches on cuda:{torch.cuda.current_device()}; enter torch.cuda.device({tensor.device.index})"
        )


def power_of_two(n: int) -> int:
    """The least that is not below n, as a tile's sides are."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class RowTile:
    """How many rows one program takes, in how many parts of which width, and with how many warps."""

    rows: int
    parts: int
    block: int
    warps: int

    @property
    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "PARTS": self.parts, "BLOCK": self.block}


def row_tile(width: int) -> RowTile:
    """Of 4096 values or one row; 8 values of a part are a thread's, one load of 16 bytes in bfloat16. Raises ConfigError above MAX_WIDTH."""
    if width > MAX_WIDTH:
        raise ConfigError(f"a row of {width} values does not fit the registers of one program; at most {MAX_WIDTH}")
    warps = 8 if width <= MAX_WIDTH // 2 else 16
    block = min(power_of_two(max(width, 2)), 256 * warps)
    parts = -(-width // block)
    return RowTile(max(1, 4096 // block) if parts == 1 else 1, parts, block, warps)


def launch_rows(kernel: Any, rows: int, width: int, *arguments: Any, **constants: Any) -> None:
    """Run a row kernel over `rows` rows, unless there is nothing to do."""
    if rows * width == 0:
        return
    tile = row_tile(width)
    kernel[(-(-rows // tile.rows),)](*arguments, **constants, **tile.constants, num_warps=tile.warps)


def unit_rows(x: Tensor) -> Tensor:
    """x itself if the elements of a row lie side by side, else a copy in which they do."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def as_rows(x: Tensor) -> Tensor:
    """[..., D] -> [rows, D], without a copy where the leading dims can be one: that of a chunk of a wider tensor can."""
    return unit_rows(x).reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])


def per_token(length: int, *vectors: Tensor) -> tuple[Tensor, ...]:
    """Vectors per batch row [B, D] seen as one per token, [B, L, D], with the same strides; those per token stay. What has to be copied is so before it is
    repeated.
    """
    alike = len({v.stride() for v in vectors}) == 1
    rows = (unit_rows(v) if alike else v.contiguous() for v in vectors)
    return tuple(v if v.ndim == 3 else v[:, None].expand(-1, length, -1) for v in rows)


@jit
def read(x: tl.tensor, at: tl.tensor, there: tl.tensor, width: tl.tensor, PARTS: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """Rows at the offsets `at` [ROWS] in float32, as a tuple of PARTS tiles [ROWS, BLOCK]; zero beyond `width`, and in rows that are not `there`."""
    tiles: tl.tuple = ()
    for part in tl.static_range(PARTS):
        col = part * BLOCK + tl.arange(0, BLOCK)
        tiles = tiles + (tl.load(x + at[:, None] + col[None, :], mask=there[:, None] & (col < width)[None, :], other=0.0).to(tl.float32),)
    return tiles


@jit
def write(out: tl.tensor, at: tl.tensor, tiles: tl.tuple, there: tl.tensor, width: tl.tensor, PARTS: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """The reverse of `read`, in the dtype of `out`."""
    for part in tl.static_range(PARTS):
        col = part * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + at[:, None] + col[None, :], tiles[part].to(out.dtype.element_ty), mask=there[:, None] & (col < width)[None, :])


@jit
def normed(
    tiles: tl.tuple, weight: tl.tensor, width: tl.tensor, eps: tl.tensor, CENTRED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """Rows of `read` divided by their root mean square; by their deviation if CENTRED."""
    if CENTRED:
        total = tiles[0]
        for part in tl.static_range(1, PARTS):
            total += tiles[part]
        mean = tl.sum(total, 1) / width
        centred: tl.tuple = ()
        for part in tl.static_range(PARTS):
            within = part * BLOCK + tl.arange(0, BLOCK) < width
            centred = centred + (tl.where(within[None, :], tiles[part] - mean[:, None], 0.0),)
        tiles = centred
    squares = tiles[0] * tiles[0]
    for part in tl.static_range(1, PARTS):
        squares += tiles[part] * tiles[part]
    factor = tl.rsqrt(tl.sum(squares, 1) / width + eps)
    found: tl.tuple = ()
    for part in tl.static_range(PARTS):
        x = tiles[part] * factor[:, None]
        if weight is not None:
            col = part * BLOCK + tl.arange(0, BLOCK)
            x = x * tl.load(weight + col, mask=col < width, other=0.0).to(tl.float32)[None, :]
        found = found + (x,)
    return found


@jit
def modulated(
    tiles: tl.tuple, scale: tl.tensor, shift: tl.tensor, at: tl.tensor, there: tl.tensor, width: tl.tensor, PARTS: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """x (1 + scale) + shift, the vectors read at the offsets `at`."""
    factors, terms = read(scale, at, there, width, PARTS, BLOCK), read(shift, at, there, width, PARTS, BLOCK)
    found: tl.tuple = ()
    for part in tl.static_range(PARTS):
        found = found + (tiles[part] * (1.0 + factors[part]) + terms[part],)
    return found
