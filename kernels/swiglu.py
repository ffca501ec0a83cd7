"""The middle of a gated feed-forward layer: silu(a) * b.

Shazeer 2020, arXiv:2002.05202. D width of the middle.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from reelstep.kernels.jit import as_rows, check_launch, jit, power_of_two, tl
from reelstep.kernels.op import Argument, Kernel, Make, check_shape, define, wide

BLOCK, WARPS = 4096, 8
"""Values of a row in one program, 16 a thread. Rows are wide and nothing is summed over them, so they need not fit one."""


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """a, b: [..., D], of one shape; two chunks of one wider tensor are read where they are. Raises ConfigError if their shapes differ."""
    check_shape("swiglu", "b", b, tuple(a.shape))
    out: Tensor = OP(a, b)
    return out


def reference(a: Tensor, b: Tensor) -> Tensor:
    return (F.silu(wide(a)) * wide(b)).to(a.dtype)


def fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape)


@jit
def swiglu_kernel(out: tl.tensor, a: tl.tensor, b: tl.tensor, width: tl.tensor, a_row: tl.tensor, b_row: tl.tensor, BLOCK: tl.constexpr) -> None:
    row, col = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < width
    x = tl.load(a + row * a_row + col, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(b + row * b_row + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + col, (x * tl.sigmoid(x) * y).to(out.dtype.element_ty), mask=inside)


def launch(a: Tensor, b: Tensor) -> Tensor:
    check_launch(swiglu_kernel, a)
    out, width = a.new_empty(a.shape), a.shape[-1]
    if out.numel():
        a, b = as_rows(a), as_rows(b)
        block = min(power_of_two(width), BLOCK)
        swiglu_kernel[(a.shape[0], -(-width // block))](out, a, b, width, a.stride(0), b.stride(0), BLOCK=block, num_warps=WARPS)
    return out


def kernels(arch: int) -> tuple[Kernel, ...]:
    arguments: dict[str, Argument] = {**dict.fromkeys(("out", "a", "b"), "*bf16"), **dict.fromkeys(("width", "a_row", "b_row"), "i32"), "BLOCK": BLOCK}
    return (Kernel("swiglu", swiglu_kernel, arguments, WARPS, 1),)


def examples(make: Make) -> Iterator[tuple[Any, ...]]:
    for sizes in ((2, 5, 48), (1,), (0, 4, 8), (3, 0), (7, 65), (2, 2050)):
        yield make(*sizes), make(*sizes)
    yield tuple(make(3, 4, 64).chunk(2, -1))


OP = define("swiglu", reference=reference, fake=fake, launch=launch, kernels=kernels, examples=examples)
