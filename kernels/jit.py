"""Triton where it is installed, and what its kernels share. Without it every op still has its formula; with TRITON_INTERPRET=1 kernels run on a CPU.

In a kernel's signature `tl.tensor` is the address of a tensor's first element, or None for one that is not there, or a number.
Kernels over rows hold a tile [ROWS, BLOCK] in registers: BLOCK is the width rounded up to a power of two, and narrow rows share a program.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reelstep.errors import ConfigError

__all__ = [
    "HAS_TRITON", "MAX_WIDTH", "RowTile", "as_rows", "check_launch", "interpreted", "jit", "launch_rows", "modulated", "normed", "per_token", "row_tile",
    "tl", "triton", "unit_rows",
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


@dataclass(frozen=True)
class RowTile:
    """How many rows of which padded width one program takes, and with how many warps."""

    rows: int
    block: int
    warps: int

    @property
    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "BLOCK": self.block}


def row_tile(width: int) -> RowTile:
    """A tile of 2048 values or one row: 16 values a thread are two loads of 16 bytes in bfloat16. Raises ConfigError above MAX_WIDTH."""
    if width > MAX_WIDTH:
        raise ConfigError(f"a row of {width} values does not fit the registers of one program; at most {MAX_WIDTH}")
    block = 1 << max(width - 1, 1).bit_length()
    rows = max(1, 2048 // block)
    return RowTile(rows, block, min(16, max(4, rows * block // 512)))


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


def per_token(v: Tensor, length: int) -> Tensor:
    """A vector per batch row [B, D] seen as one per token, [B, L, D], without a copy; one per token stays."""
    return unit_rows(v if v.ndim == 3 else v[:, None].expand(-1, length, -1))


@jit
def normed(x: tl.tensor, weight: tl.tensor, col: tl.tensor, width: tl.tensor, eps: tl.tensor, CENTRED: tl.constexpr) -> tl.tensor:
    """A float32 tile [ROWS, BLOCK], zero beyond `width`, divided by its rows' root mean square; by their deviation if CENTRED."""
    within = col < width
    if CENTRED:
        x = tl.where(within[None, :], x - (tl.sum(x, 1) / width)[:, None], 0.0)
    x = x * tl.rsqrt(tl.sum(x * x, 1) / width + eps)[:, None]
    if weight is not None:
        x = x * tl.load(weight + col, mask=within, other=0.0).to(tl.float32)[None, :]
    return x


@jit
def modulated(y: tl.tensor, scale: tl.tensor, shift: tl.tensor, at: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """y (1 + scale) + shift, the vectors read at the offsets `at`."""
    return y * (1.0 + tl.load(scale + at, mask=inside, other=0.0).to(tl.float32)) + tl.load(shift + at, mask=inside, other=0.0).to(tl.float32)
