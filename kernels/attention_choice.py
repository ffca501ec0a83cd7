"""The table of attentions, best first, and the choice between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from reelstep.errors import ConfigError
from reelstep.registry import Registry

AUTO = "auto"


@dataclass(frozen=True)
class Implementation:
    """One way to run `attention`. Both callables take q [B, N, L, K] and lengths [B] or None."""

    name: str
    refuses: Callable[[Tensor, Tensor | None], str | None]  # why it cannot run these, or None
    run: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]  # q, k, v, lengths, scale -> out, lse; never with nothing to do


ATTENTIONS: Registry[Implementation] = Registry(
    "attention",
    {
        "fa3": "reelstep.kernels.attention_fa3:IMPLEMENTATION",
        "sdpa": "reelstep.kernels.attention_sdpa:IMPLEMENTATION",
        "triton": "reelstep.kernels.attention_triton:IMPLEMENTATION",
        "reference": "reelstep.kernels.attention:IMPLEMENTATION",
    },
)


def choose(name: str, q: Tensor, lengths: Tensor | None) -> Implementation:
    """The one called `name`; for "auto" the first that takes these tensors. Raises NotFound for an unknown name, ConfigError if that one refuses."""
    if name == AUTO:
        return next(found for found in ATTENTIONS.values() if found.refuses(q, lengths) is None)
    if why := ATTENTIONS[name].refuses(q, lengths):
        able = [other for other in ATTENTIONS if ATTENTIONS[other].refuses(q, lengths) is None]
        raise ConfigError(f"attention {name!r} cannot run here: {why}; use {AUTO!r}, or one of {able}")
    return ATTENTIONS[name]
