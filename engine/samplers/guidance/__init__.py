"""Guidance: a generator between a sampler and the network that makes one wanted velocity out of the network's branches.

A branch is a condition by name: "text" is the request's prompt, "null" the negative or empty one, "bare" that without the
request's picture too. One file a rule; each says what it costs and where it comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from reelstep.engine.samplers.ns import Sampler
from reelstep.engine.samplers.paths import Path
from reelstep.errors import ConfigError, unknown
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
`state.nfe` counts the velocities made before this one.
"""


@dataclass(frozen=True)
class Option:
    """A number that tunes a rule: what it is where nobody gives it, and between what it may lie."""

    default: float
    low: float
    high: float
    meaning: str


def complete(what: str, options: Mapping[str, Option], given: Mapping[str, float]) -> dict[str, float]:
    """All options, in order. Raises NotFound for one that `what` does not have, ConfigError for one out of range."""
    for name, value in given.items():
        if name not in options:
            raise unknown(f"option of {what}", name[:80], options)
        low, high = options[name].low, options[name].high
        if not low <= value <= high:  # NaN is not
            raise ConfigError(f"option {name!r} of {what} is {value}; {low:g} to {high:g}: {options[name].meaning}")
    return {name: given.get(name, option.default) for name, option in options.items()}


@dataclass(frozen=True)
class Guidance:
    """A rule by name, before it knows a request. rule: (scale, path, *options in order) -> Rule."""

    name: str
    rule: Callable[..., Rule]
    options: Mapping[str, Option] = field(default_factory=dict)
    is_field: bool = False  # the velocity depends on x and t alone, not on what came before, so that a solver can be fitted to it
    measures: bool = False  # decides by comparing branches, so while it asks for several no step cache may stand in for the network

    def build(self, scale: float, path: Path, given: Mapping[str, float]) -> Rule:
        """The rule of one request. Raises ConfigError for a scale, and as `complete` does for options."""
        if not (math.isfinite(scale) and scale >= 0):
            raise ConfigError(f"guidance scale {scale}; a finite number from 0 (prompt ignored) over 1 (unguided) upwards")
        return self.rule(scale, path, *self.complete(given).values())

    def complete(self, given: Mapping[str, float]) -> dict[str, float]:
        """All options, as `complete` gives and refuses them."""
        return complete(f"guidance {self.name!r}", self.options, given)


def text_only(x: Tensor, t: float, state: GuidanceState) -> Guided:
    """The prompt's velocity as it is: what every rule with scale 1 comes to."""
    (text,) = yield Query(x, t, ("text",))
    return text


def null_only(x: Tensor, t: float, state: GuidanceState) -> Guided:
    """The velocity that ignores the prompt: scale 0."""
    (null,) = yield Query(x, t, ("null",))
    return null


def rows_dot(x: Tensor, y: Tensor) -> Tensor:
    """Inner product of each row over all its other dimensions, shaped [B, 1, ...] to scale rows with."""
    return (x * y).flatten(1).sum(1).view(-1, *(1,) * (x.ndim - 1))


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


GUIDANCE: Registry[Guidance] = Registry(
    "guidance",
    {
        "none": "reelstep.engine.samplers.guidance.none:GUIDANCE",
        "cfg": "reelstep.engine.samplers.guidance.cfg:GUIDANCE",
        "interval": "reelstep.engine.samplers.guidance.interval:GUIDANCE",
        "cfg_zero": "reelstep.engine.samplers.guidance.cfg_zero:GUIDANCE",
        "apg": "reelstep.engine.samplers.guidance.apg:GUIDANCE",
        "adaptive": "reelstep.engine.samplers.guidance.adaptive:GUIDANCE",
        "adaptive_x1": "reelstep.engine.samplers.guidance.adaptive:GUIDANCE_X1",
        "delta_hold": "reelstep.engine.samplers.guidance.delta_hold:GUIDANCE",
        "picture_and_text": "reelstep.engine.samplers.guidance.picture_and_text:GUIDANCE",
    },
)
