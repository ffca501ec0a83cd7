"""How far a value may be off: twice what the formula itself is off by against float64, and one rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from reelstep.kernels.op import tensors_of

E4M3_TIES = 0.01
"""Of the numbers in E4M3 that may be the neighbour of the right one: those that lie between two, and fall to the other side by a rounding in float32."""
FROM_HALVES = 2**-15
"""What torch's own attentions may be off by in lse, relative to the largest, for inputs of half precision: the one on a CPU is by 2**-17."""


def doubled(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """With tensors of floating numbers in float64."""
    found: tuple[Any, ...] = pytree.tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, arguments)
    return found


def relative(found: Tensor, truth: Tensor) -> float:
    """Of the norms, in float64."""
    truth = truth.double()
    return float((found.double().to(truth.device) - truth).norm() / truth.norm())


def largest_error(found: Tensor, truth: Tensor) -> float:
    """Infinities must agree and then differ by nothing."""
    found, truth = found.double(), truth.double()
    return float(torch.where(found == truth, 0.0, (found - truth).abs()).amax()) if truth.numel() else 0.0


def error_and_bound(found: Any, formula: Any, truth: Any, float32: float) -> tuple[float, float]:
    """Of the output that is nearest to its bound: twice the formula's own error against float64, and one rounding; `float32` of the largest value there.

    One in E4M3, where a rounding of the largest would hide all others, counts in numbers of the type: how far the furthest is off, and how many are.
    """
    pairs = []
    for one, like, exact in zip_longest(tensors_of(found), tensors_of(formula), tensors_of(truth)):
        if (one.shape, one.dtype) != (like.shape, like.dtype):
            return math.inf, 0.0
        if one.dtype == torch.float8_e4m3fn:
            mine, right = ordinal(one), ordinal(exact)
            pairs += [(largest_error(mine, right), 1.0), (float((mine != right).sum()), max(1.0, E4M3_TIES * mine.numel()))]
            continue
        finite = exact.double()[exact.double().isfinite()]
        step = float32 if one.dtype == torch.float32 else torch.finfo(one.dtype).eps
        bound = 2 * largest_error(like, exact) + step * (float(finite.abs().amax()) if finite.numel() else 0.0)
        pairs.append((largest_error(one, exact), bound))
    return worst(pairs)


def ordinal(x: Tensor) -> Tensor:
    """Numbers in E4M3 counted from 0, the next larger one being one more."""
    bits = x.view(torch.int8).int()
    return torch.where(bits < 0, -(bits & 0x7F), bits)


def worst(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The error that is the most times its bound; NaN before all, and what is exact, or has no values, after all."""

    def times(pair: tuple[float, float]) -> float:
        error, bound = pair
        return math.inf if math.isnan(error) else error / bound if bound else math.inf if error else -1.0

    return max(pairs, key=times)
