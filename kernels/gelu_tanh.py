"""The middle of a plain feed-forward layer: GELU in its tanh form, x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).

Hendrycks and Gimpel 2016, arXiv:1606.08415.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from reelstep.kernels.jit import check_launch, jit, tl
from reelstep.kernels.op import Kernel, Make, define, wide

BLOCK, WARPS = 2048, 4
"""16 values a thread: two loads of 16 bytes in bfloat16."""


def gelu_tanh(x: Tensor) -> Tensor:
    """x: any shape."""
    out: Tensor = OP(x)
    return out


def reference(x: Tensor) -> Tensor:
    return F.gelu(wide(x), approximate="tanh").to(x.dtype)


def fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@jit
def gelu_tanh_kernel(out: tl.tensor, x: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    # (1 + tanh z) / 2 is the logistic function of 2 z, which needs one exponential and no branch; 2 sqrt(2 / pi) = 1.5957691...
    y = v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


def launch(x: Tensor) -> Tensor:
    check_launch(gelu_tanh_kernel, x)
    out, x = x.new_empty(x.shape), x.contiguous()
    if out.numel():
        gelu_tanh_kernel[(-(-out.numel() // BLOCK),)](out, x, out.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return out


def kernels(arch: int) -> tuple[Kernel, ...]:
    return (Kernel("gelu_tanh", gelu_tanh_kernel, {"out": "*bf16", "x": "*bf16", "count": "i32", "BLOCK": BLOCK}, WARPS, 1),)


def examples(make: Make) -> Iterator[tuple[Any, ...]]:
    for sizes in ((2, 5, 48), (1,), (0, 4), (7, 65), (5000,)):
        yield (make(*sizes),)


OP = define("gelu_tanh", reference=reference, fake=fake, launch=launch, kernels=kernels, examples=examples)
