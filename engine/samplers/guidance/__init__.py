"""Guidance: a generator between a sampler and the network that makes one wanted velocity out of one or more network branches.

A branch is a condition by name: "text" is the request's prompt, "null" the negative or empty one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from reelstep.engine.samplers.ns import Sampler
from reelstep.errors import ConfigError
from reelstep.registry import Registry


class Query(NamedTuple):
    """Velocities wanted at (x, t), one for each branch. They are answered as a tuple in this order."""

    x: Tensor
    t: float
    branches: tuple[str, ...]


@dataclass
class GuidanceState:
    """All that guidance must remember between two calls. `vars(state)` is plain data that `torch.save` keeps bit for bit."""

    nfe: int = 0  # velocities given to the sampler
    forwards: int = 0  # branches that the network ran
    memory: dict[str, Tensor] = field(default_factory=dict)  # a rule's own: latches, past outputs


Guided = Generator[Query, tuple[Tensor, ...], Tensor]
"""Yields queries, is sent the tuple of velocities, returns a velocity (a rule) or the final state (a whole run)."""

Rule = Callable[[Tensor, float, GuidanceState], Guided]
"""Makes one guided velocity at (x, t).

It decides for all rows of x at once, so outputs that must latch on their own have samplers of their own. It writes to
`state.memory` only after its last query was answered: a run that was saved at a query asks again for that whole velocity.
"""


def none(scale: float) -> Rule:
    """No guidance: the network's velocity for the prompt. For guidance-distilled models too. Raises ConfigError unless scale is 1."""
    if scale != 1:
        raise ConfigError(f"guidance 'none' has no scale, but {scale} was asked; use 'cfg', or scale 1")
    return _text_only


def cfg(scale: float) -> Rule:
    """Classifier-free guidance, u = u_null + scale * (u_text - u_null). Scales 1 and 0 ask for the one branch they need.

    Ho and Salimans 2022, arXiv:2207.12598, in the convention where 1 is unguided. Raises ConfigError unless scale is finite and not negative.
    """
    if not (math.isfinite(scale) and scale >= 0):
        raise ConfigError(f"guidance scale {scale}; a finite number from 0 (prompt ignored) over 1 (unguided) upwards")
    if scale == 1:
        return _text_only
    if scale == 0:
        return _null_only

    def rule(x: Tensor, t: float, state: GuidanceState) -> Guided:
        text, null = yield Query(x, t, ("text", "null"))
        return null + scale * (text - null)

    return rule


def _text_only(x: Tensor, t: float, state: GuidanceState) -> Guided:
    (text,) = yield Query(x, t, ("text",))
    return text


def _null_only(x: Tensor, t: float, state: GuidanceState) -> Guided:
    (null,) = yield Query(x, t, ("null",))
    return null


def guided(sampler: Sampler, rule: Rule, state: GuidanceState) -> Guided:
    """Run a sampler with every velocity made by `rule`. Counts NFE and forwards in `state`, also over several such runs. Returns the final state."""
    try:
        x, t = next(sampler)
        while True:
            u = yield from _counted(rule(x, t, state), state)
            state.nfe += 1
            x, t = sampler.send(u)
    except StopIteration as done:
        final: Tensor = done.value
        return final


def _counted(velocity: Guided, state: GuidanceState) -> Guided:
    """The same queries, with every branch counted once it was answered."""
    try:
        query = next(velocity)
        while True:
            outputs = yield query
            if len(outputs) != len(query.branches):
                raise ConfigError(f"{len(outputs)} velocities for the branches {query.branches}; one for each is needed")
            state.forwards += len(query.branches)
            query = velocity.send(outputs)
    except StopIteration as done:
        guided_velocity: Tensor = done.value
        return guided_velocity


GUIDANCE: Registry[Callable[[float], Rule]] = Registry(
    "guidance",
    {
        "none": "reelstep.engine.samplers.guidance:none",
        "cfg": "reelstep.engine.samplers.guidance:cfg",
    },
)
