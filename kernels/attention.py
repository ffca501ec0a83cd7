"""Attention that also gives the logarithm of its softmax's sum, so that attentions to parts of the keys can be merged.

B batch, N heads, L queries, S keys, K head dim. out = softmax(scale q k^T) v, lse = log sum exp(scale q k^T).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reelstep.errors import ConfigError
from reelstep.kernels.attention_choice import AUTO, Implementation, choose
from reelstep.kernels.attention_triton import kernels, launch_attention
from reelstep.kernels.op import Make, check_rank, check_shape, define, wide


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, scale: float | None = None, implementation: str = AUTO) -> tuple[Tensor, Tensor]:
    """q: [B, N, L, K]; k, v: [B, N, S, K]; lengths: [B] int32, how many of the keys count, None for all. Gives out [B, N, L, K] and lse [B, N, L].

    out is in q's dtype and lies in memory as [B, L, N, K], so that joining the heads is free; lse is float32, natural, -inf (and out 0) for no key. Where
    keys count but the scores of all of them are -inf, "triton" and "reference" say the same, while "sdpa" and "fa3" give the lse of their library: 0 on a CPU.
    scale: K ** -0.5 if None. implementation: a name of ATTENTIONS. Raises ConfigError for shapes, dtypes or a scale that do not fit.
    """
    check_rank("attention", "q", q, "B N L K")
    check_rank("attention", "k", k, "B N S K")
    b, n, _, width = q.shape
    if width == 0:
        raise ConfigError("attention: heads of no values (K is 0); give each at least one")
    check_shape("attention", "k", k, (b, n, k.shape[2], width))
    check_shape("attention", "v", v, tuple(k.shape))
    if lengths is not None:
        check_shape("attention", "lengths", lengths, (b,))
        if lengths.dtype != torch.int32:
            raise ConfigError(f"attention: lengths are {lengths.dtype}; make them int32")
    if not q.dtype == k.dtype == v.dtype:
        raise ConfigError(f"attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; cast them to one dtype")
    factor = width**-0.5 if scale is None else scale
    if factor <= 0:
        raise ConfigError(f"attention: scale {factor}; it must be above 0, since the largest score is found before it is scaled")
    out: tuple[Tensor, Tensor] = OP(q, k, v, lengths, factor, implementation)
    return out


def counted(lengths: Tensor, keys: int) -> Tensor:
    """lengths [B] -> which keys count, [B, 1, 1, S]."""
    return (torch.arange(keys, device=lengths.device) < lengths[:, None])[:, None, None]


def _formula(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    scores = scale * wide(q) @ wide(k).mT
    if lengths is not None:
        scores = scores.masked_fill(~counted(lengths, k.shape[2]), -torch.inf)
    lse = scores.logsumexp(-1)
    out = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp() @ wide(v)
    return as_tokens(out.to(q.dtype)), lse


def as_tokens(out: Tensor) -> Tensor:
    """[B, N, L, K], in memory [B, L, N, K]."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def reference(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, implementation: str) -> tuple[Tensor, Tensor]:
    return _formula(q, k, v, lengths, scale)


def decomposition(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, implementation: str) -> tuple[Tensor, Tensor]:
    """Backends have an attention without lse; where nothing reads that, the scores below are dead code."""
    mask = None if lengths is None else counted(lengths, k.shape[2])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = scale * wide(q) @ wide(k).mT
    if lengths is None or mask is None:
        return out, scores.logsumexp(-1)
    return out.masked_fill((lengths <= 0)[:, None, None, None], 0), scores.masked_fill(~mask, -torch.inf).logsumexp(-1)  # no key: a runtime may give NaN


def run(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, implementation: str) -> tuple[Tensor, Tensor]:
    chosen = choose(implementation, q, lengths)
    if q.numel() == 0 or k.numel() == 0:
        out, lse = fake(q, k, v, lengths, scale, implementation)
        return out.zero_(), lse.fill_(-torch.inf)
    return chosen.run(q, k, v, lengths, scale)


def fake(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, implementation: str) -> tuple[Tensor, Tensor]:
    b, n, length, width = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(b, length, n, width).transpose(1, 2), q.new_empty(b, n, length, dtype=lse_dtype)


def launch(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, implementation: str) -> tuple[Tensor, Tensor]:
    return launch_attention(q, k, v, lengths, scale)


def examples(make: Make) -> Iterator[tuple[Any, ...]]:
    usual, empty = ((2, 2, 5, 7, 16), (1, 1, 1, 1, 8), (1, 2, 40, 70, 24), (2, 1, 64, 64, 32)), ((0, 2, 3, 4, 8), (1, 2, 0, 4, 8), (1, 1, 3, 0, 8))
    for b, n, length, keys, width in usual + empty:
        yield make(b, n, length, width), make(b, n, keys, width), make(b, n, keys, width), None, width**-0.5, AUTO
    q, k, v = make(3, 2, 9, 16), make(3, 2, 37, 16), make(3, 2, 37, 16)
    yield q, k, v, torch.tensor([37, 5, 0, 5, 33, 5], dtype=torch.int32, device=q.device)[::2], 0.5, AUTO


def _never(q: Tensor, lengths: Tensor | None) -> None:
    return None


IMPLEMENTATION = Implementation("reference", _never, _formula)

OP = define("attention", reference=reference, decomposition=decomposition, run=run, fake=fake, launch=launch, kernels=kernels, examples=examples)
