"""Step caches: a rule between one branch of the network and its weights. Where little has changed since an evaluation that ran whole, the
blocks are skipped and what they added then is added again.

A network is run in pieces: `denoise_embed` makes tokens of x, `denoise_first` is the first block, `denoise_rest` the other blocks and the head,
`denoise_last` the head alone; `denoise` is all of it at once. One file a rule; each says what it looks at. Every branch of every output has a
memory of its own.

Tokens [1, ...], one sample at a time; velocities of x's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torch import Tensor

from reelstep.engine.samplers.guidance import Option, complete
from reelstep.errors import ConfigError
from reelstep.registry import Registry

PIECES = ("denoise_embed", "denoise_first", "denoise_rest", "denoise_last")
"""The programs that a model must have beside the whole `denoise`."""

Edges = Mapping[str, Tensor]
"""Tensors by name, in or out of a piece."""


class Piece(NamedTuple):
    """What to run, `denoise` or one of PIECES. It is answered with its outputs by name."""

    program: str
    inputs: Edges


@dataclass(frozen=True)
class Memory:
    """What a branch keeps from one evaluation to the next.

    signal: what the next one's is compared with. residual: what the skipped blocks added when they last ran. distance: since then, as
    the rule counts it.
    """

    signal: Tensor
    residual: Tensor
    distance: float = 0.0


class Outcome(NamedTuple):
    """velocity: of the branch, as the network gives it. memory: to keep, None where no later evaluation reads one. cached: the blocks were skipped."""

    velocity: Tensor
    memory: Memory | None = None
    cached: bool = False


Evaluation = Generator[Piece, Edges, Outcome]
"""One branch of the network at one point: yields pieces to run, is sent their outputs. It writes to nothing, so it can be begun again."""


@dataclass(frozen=True)
class Rule:
    """A step cache of one request.

    evaluations: of the solver's table; the leading `first` and the trailing `last` of them always run. threshold: the distance from which on
    the network runs. block: whether the first block runs before that is known; its signal is what the block adds, else the input of the
    block's attention. follows: the signal is compared with that of the evaluation before, else with that of the last one that ran whole.
    grow: (distance so far, relative change of the signal) -> distance. fresh_pairs: several branches asked for at once always run.
    """

    evaluations: int
    threshold: float
    first: float
    last: float
    block: bool
    follows: bool
    grow: Callable[[float, float], float]
    fresh_pairs: bool

    def may_skip(self, index: int) -> bool:
        """Whether evaluation `index` is none of those that run in any case."""
        return self.first <= index < self.evaluations - self.last

    def evaluate(self, inputs: Edges, index: int, branches: int, memory: Memory | None) -> Evaluation:
        """Evaluation `index` of the solver for one of the `branches` that are asked for together. inputs: of the whole network."""
        if not self.first - 1 <= index < self.evaluations - self.last:  # nobody will look back at it
            return Outcome((yield Piece("denoise", inputs))["velocity"])
        condition = {name: inputs[name] for name in ("condition",) if name in inputs}
        embedded = yield Piece("denoise_embed", {"x": inputs["x"], "modulation": inputs["modulation"], **condition})
        shared = {"modulation": inputs["modulation"], "context": inputs["context"]}
        hidden, signal = embedded["hidden"], embedded["signal"]
        if self.block:
            hidden = (yield Piece("denoise_first", {"hidden": hidden, **shared}))["hidden"]
            signal = hidden - embedded["hidden"]
        if memory is not None and not (self.fresh_pairs and branches > 1):
            distance = self.grow(memory.distance, float(relative_change(memory.signal, signal)))
            if self.may_skip(index) and distance < self.threshold:  # NaN is not
                head = yield Piece("denoise_last", {"hidden": hidden, "residual": memory.residual, "modulation": inputs["modulation"]})
                return Outcome(head["velocity"], Memory(signal if self.follows else memory.signal, memory.residual, distance), cached=True)
        begun = hidden
        if not self.block:
            hidden = (yield Piece("denoise_first", {"hidden": hidden, **shared}))["hidden"]
        rest = yield Piece("denoise_rest", {"hidden": hidden, **shared})
        return Outcome(rest["velocity"], Memory(signal, rest["residual"] + (hidden - begun)))


def whole(inputs: Edges) -> Evaluation:
    """Without a step cache."""
    return Outcome((yield Piece("denoise", inputs))["velocity"])


def relative_change(before: Tensor, now: Tensor) -> Tensor:
    """Mean of |now - before| over mean of |before|, of each row [B]."""
    return (now - before).abs().flatten(1).mean(1) / before.abs().flatten(1).mean(1)


OPTIONS = {
    "first": Option(1.0, 1.0, 1000.0, "evaluations at the start that run in any case"),
    "last": Option(1.0, 0.0, 1000.0, "evaluations at the end that run in any case"),
}
"""Of every rule, behind its threshold."""


@dataclass(frozen=True)
class StepCache:
    """A rule by name, before it knows a request. rule: (evaluations, fresh_pairs, *options in order) -> Rule. Every rule has a `threshold`."""

    name: str
    rule: Callable[..., Rule]
    options: Mapping[str, Option]

    def build(self, evaluations: int, fresh_pairs: bool, given: Mapping[str, float]) -> Rule | None:
        """The rule of one request; None for threshold 0, at which nothing would ever be skipped. Raises as `complete` does, and ConfigError where
        `first` and `last` leave nothing to skip."""
        options = self.complete(given)
        rule = self.rule(evaluations, fresh_pairs, *options.values())
        if evaluations <= rule.first + rule.last:
            raise ConfigError(
                f"step cache {self.name!r} runs the first {rule.first:g} and the last {rule.last:g} evaluations in any case, and there are {evaluations}; "
                "take more steps, lower 'first' and 'last', or leave the step cache out"
            )
        return rule if rule.threshold else None

    def complete(self, given: Mapping[str, float]) -> dict[str, float]:
        """All options, in order. Raises NotFound for one that the rule does not have, ConfigError for one out of range."""
        return complete(f"step cache {self.name!r}", self.options, given)


@dataclass(frozen=True)
class CacheOptions:
    """Options of a step cache, as calibrated. Raises NotFound and ConfigError as `StepCache.complete` does."""

    rule: str
    options: Mapping[str, float]

    def __post_init__(self) -> None:
        STEP_CACHES[self.rule].complete(self.options)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CacheOptions:
        return cls(**data)


STEP_CACHES: Registry[StepCache] = Registry(
    "step cache",
    {
        "teacache": "reelstep.engine.samplers.step_cache.teacache:STEP_CACHE",
        "first_block": "reelstep.engine.samplers.step_cache.first_block:STEP_CACHE",
    },
)
