"""Attention over a sequence that lies on several ranks.

Ulysses (Jacobs et al. 2023, arXiv:2309.14509): an all-to-all trades pieces of the sequence for heads, so that each rank attends with some heads over all
of it. Ring (Liu et al. 2023, arXiv:2310.01889): keys and values go round, and partial results are merged by their log-sum-exp. Their product is USP
(Fang and Zhao 2024, arXiv:2405.07719). Where keys are few they are gathered. Softmax does not care in which order keys lie, so a sequence that was
joined of two split ones (text and image) needs no other treatment: its ranks' lengths are the sums.

B batch, N heads, L queries, S keys, K head dim; all of this rank's share unless called whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from reelstep.errors import ConfigError
from reelstep.kernels.attention import attention
from reelstep.kernels.lse_merge import lse_merge
from reelstep.kernels.op import wide
from reelstep.parallel.collectives import GROUP, Communicator, communicator_of
from reelstep.parallel.mesh import bounds, shares
from reelstep.parallel.rules import AttentionRule, Axes

MASKED = -1e30
"""Added to the score of a key that does not count. Finite: -inf minus -inf, in a part where no key counts, would be NaN."""


class Attended(nn.Module):
    """A module whose attention reaches over the ranks. Its own code calls `scaled_dot_product_attention` and is not told."""

    def __init__(self, inner: nn.Module, rule: AttentionRule, lengths: Callable[[Axes], tuple[int, ...] | None], comm: Communicator) -> None:
        super().__init__()
        self.inner = inner
        self.rule, self.lengths, self.comm = rule, lengths, comm

    def forward(self, *args: Any) -> Any:
        with _Replace(self.attend):
            return self.inner(*args)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        queries, keys = self.lengths(self.rule.queries), self.lengths(self.rule.keys)
        if keys is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if self.rule.exchange == "gather" or queries is None:
            return gathered(q, k, v, mask, keys, self.comm)
        return usp(q, k, v, mask, keys, self.comm)


class _Replace(TorchFunctionMode):
    """Inside, attention is `attend`."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self.attend(*_plain(*args, **(kwargs or {})))


def _plain(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What of the arguments can be exchanged. Raises ConfigError for what cannot."""
    for name, value in others.items():
        if value:
            raise ConfigError(f"attention with {name}={value} cannot be split over ranks; leave it out or run on a mesh with cp=1")
    if attn_mask is not None and (attn_mask.ndim != 4 or attn_mask.shape[1:3] != (1, 1)):
        raise ConfigError(f"an attention mask of shape {list(attn_mask.shape)} cannot be split over ranks; a mask of keys [B, 1, 1, S] can")
    return q, k, v, attn_mask


def gathered(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lengths: Sequence[int], comm: Communicator) -> Tensor:
    """This rank's queries to the keys of all cp ranks, which have lengths[i] of them: one all-gather of keys and values together."""
    k, v = comm.all_gather(torch.cat([k, v], dim=-1), "cp", 2, lengths).chunk(2, dim=-1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_whole_mask(mask, lengths, comm))


def usp(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lengths: Sequence[int], comm: Communicator) -> Tensor:
    """This rank's queries to the keys of all cp ranks, which have lengths[i] of both: Ulysses within a ring stage, a ring over the stages.

    Raises ConfigError if there are fewer heads than Ulysses ranks.
    """
    mesh, at = comm.mesh, comm.at
    mask = _whole_mask(mask, lengths, comm)
    stages = [tuple(lengths[i : i + mesh.ulysses]) for i in range(0, mesh.cp, mesh.ulysses)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if mesh.ring > 1:
            y: Tensor = ring_attention(q, k, v, mask, [sum(stage) for stage in stages], GROUP + "ring")
            return y
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    if mesh.ulysses == 1:
        return attend(q, k, v)
    heads, mine = shares(q.shape[1], mesh.ulysses, "attention heads"), stages[at["ring"]]
    return to_sequence(attend(*to_heads((q, k, v), heads, mine, comm)), heads, mine, comm)  # nested, so that what was exchanged is given back early


def to_heads(tensors: Sequence[Tensor], heads: Sequence[int], lengths: Sequence[int], comm: Communicator) -> tuple[Tensor, ...]:
    """Each [B, N, L, K] with all heads and this rank's tokens -> [B, heads[rank], sum(lengths), K], views of what one all-to-all brought.

    Tokens go first, so that what came from several ranks is whole as it lies: a long sequence is copied once, to be sent.
    """
    b, _, length, _ = tensors[0].shape
    n, widths = heads[comm.at["ulysses"]], [x.shape[3] for x in tensors]
    whole = comm.all_to_all(
        torch.cat([torch.cat([x[:, start:stop].permute(2, 0, 1, 3) for x in tensors], dim=3).reshape(-1) for start, stop in bounds(tuple(heads))]),
        "ulysses", [part * b * n * sum(widths) for part in lengths], [length * b * part * sum(widths) for part in heads],
    )  # fmt: skip
    return tuple(whole.view(sum(lengths), b, n, sum(widths)).permute(1, 2, 0, 3).split(widths, dim=3))


def to_sequence(x: Tensor, heads: Sequence[int], lengths: Sequence[int], comm: Communicator) -> Tensor:
    """The way back of `to_heads`, for one tensor."""
    b, n, _, width = x.shape
    length = lengths[comm.at["ulysses"]]
    received = [part * b * length * width for part in heads]
    parts = comm.all_to_all(x.permute(2, 1, 0, 3).reshape(-1), "ulysses", received, [part * n * b * width for part in lengths]).split(received)
    return torch.cat([part.reshape(length, size, b, width) for part, size in zip(parts, heads, strict=True)], dim=1).permute(2, 1, 0, 3)


def _whole_mask(mask: Tensor | None, lengths: Sequence[int], comm: Communicator) -> Tensor | None:
    """Masks of keys [B, 1, 1, S] of all ranks, as numbers to add to scores."""
    if mask is None:
        return None
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, MASKED)
    return comm.all_gather(mask, "cp", 3, lengths)


@torch.library.custom_op("reelstep::ring_attention", mutates_args=())
def ring_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lengths: Sequence[int], group: str) -> Tensor:
    """q: [B, N, L, K]; k, v: [B, N, S, K] of this ring stage, where stage i has S = lengths[i]; mask: [B, 1, 1, sum(lengths)], added. Gives [B, N, L, K].

    The next stage's keys and values travel while this stage's are used. One node in a graph, which is always cut there.
    """
    comm = communicator_of(group)
    stages, place = len(lengths), comm.at["ring"]
    held = torch.cat([k, v], dim=-1)
    out, lse = None, None
    for hop in range(stages):
        source = (place - hop) % stages
        if hop < stages - 1:
            coming = held.new_empty((*held.shape[:2], lengths[source - 1], held.shape[3]))
            arrived = comm.shift(held, coming, "ring")
        start, stop = bounds(tuple(lengths))[source]
        here_k, here_v = held.chunk(2, dim=-1)
        part, part_lse = _part(q, here_k, here_v, None if mask is None else mask[..., start:stop])
        # Sums stay in float32 until the end: a merge in bfloat16 would round once a hop.
        out, lse = (wide(part), part_lse) if out is None or lse is None else lse_merge(out, lse, part, part_lse)
        if hop < stages - 1:
            arrived()
            held = coming
    assert out is not None
    return out.to(q.dtype, memory_format=torch.contiguous_format, copy=True)


@ring_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lengths: Sequence[int], group: str) -> Tensor:
    return q.new_empty(q.shape)


def _part(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention to some of the keys, and its log-sum-exp.

    A mask rides along as one more value of each key, which meets a 1 in every query: the kernel knows lengths only, and a part's masked keys need
    not be its last.
    """
    if mask is None:
        return attention(q, k, v)
    scale = q.shape[-1] ** -0.5
    column = (mask.to(q.dtype) / scale).movedim(3, 2).expand(*k.shape[:3], 1)
    out, lse = attention(torch.cat([q, torch.ones_like(q[..., :1])], -1), torch.cat([k, column], -1), F.pad(v, (0, 1)), scale=scale)
    return out[..., :-1], lse
