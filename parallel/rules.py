"""Rule tables: which logical axis each dim of a parameter or an activation is, and which mesh axis a logical axis lies on.

Kept outside the networks, one table per family. Patterns are of dotted module paths, "*" for anything between two dots ("blocks.*.ffn") and "**" for
anything; a parameter's is its whole name.
In a tuple of axes, "" is a dim that is never split, and "3 heads" one that holds three runs of heads one after another (a fused q, k, v).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, TypeVar

from reelstep.errors import ConfigError, unknown
from reelstep.parallel.mesh import Axis
from reelstep.registry import Registry

Axes = tuple[str, ...]
Found = TypeVar("Found")


@dataclass(frozen=True)
class AttentionRule:
    """What a module's attention does where its sequence is split.

    queries, keys: logical axes that were joined along the sequence, in any order. exchange: "context" gives every rank all keys by the mesh's
    Ulysses and ring; "gather" gathers them, which moves fewer bytes where keys are few (text).
    """

    queries: Axes
    keys: Axes
    exchange: Literal["context", "gather"]


@dataclass(frozen=True)
class Rules:
    """How one family of networks is laid out."""

    axes: Mapping[str, Axis | None]  # logical axis -> mesh axis; None: every rank has all of it
    parameters: Mapping[str, Axes]  # exactly one pattern for every parameter and persistent buffer; () for one that every rank has whole
    attributes: Mapping[str, str]  # integer attributes of modules that count an axis: set to this rank's share, and the unit in which it is split
    inputs: Mapping[str, Mapping[int, Axes]]  # positional arguments of modules that arrive whole and are split
    made: Mapping[str, Axes]  # outputs of modules that every rank makes whole, of which it keeps its part
    outputs: Mapping[str, Axes]  # outputs of modules that are gathered
    attention: Mapping[str, AttentionRule]

    def __post_init__(self) -> None:
        used = [*self.attributes.values()]
        inputs = (axes for arguments in self.inputs.values() for axes in arguments.values())
        for axes in (*self.parameters.values(), *self.made.values(), *self.outputs.values(), *inputs):
            used += [axis_of(dim)[1] for dim in axes]
        for rule in self.attention.values():
            used += [*rule.queries, *rule.keys]
        for axis in used:
            if axis and axis not in self.axes:
                raise unknown("logical axis", axis, self.axes)

    def on(self, **axes: Axis | None) -> Rules:
        """The same table with some logical axes on other mesh axes. Raises NotFound for a logical axis that it has not."""
        for axis in axes:
            if axis not in self.axes:
                raise unknown("logical axis", axis, self.axes)
        return replace(self, axes={**self.axes, **axes})

    def of_parameter(self, name: str) -> Axes:
        """Raises ConfigError unless exactly one pattern names the parameter."""
        patterns = [pattern for pattern in self.parameters if regex(pattern).fullmatch(name)]
        if len(patterns) != 1:
            which = f"{len(patterns)} patterns ({', '.join(patterns)})" if patterns else f"no pattern of {', '.join(self.parameters)}"
            raise ConfigError(f"parameter {name!r} is named by {which}; a rule table names every parameter once")
        return self.parameters[patterns[0]]


@cache
def regex(pattern: str) -> re.Pattern[str]:
    parts = re.findall(r"\*\*|\*|\[[^]]+\]|[^*[]+", pattern)
    return re.compile("".join({"**": ".*", "*": "[^.]*"}.get(part, part if part[0] == "[" else re.escape(part)) for part in parts))


def axis_of(dim: str) -> tuple[int, str]:
    """Runs and logical axis of a dim: "3 heads" is (3, "heads")."""
    runs, _, axis = dim.rpartition(" ")
    return int(runs or 1), axis


def matching(table: Mapping[str, Found], names: Iterable[str]) -> dict[str, Found]:
    """The entries of a table by the names that its patterns find. Raises ConfigError for a pattern that finds none."""
    names = list(names)
    found: dict[str, Found] = {}
    for pattern, entry in table.items():
        hits = [name for name in names if regex(pattern).fullmatch(name)]
        if not hits:
            raise ConfigError(f"rule {pattern!r} finds nothing among {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}; is it another family's table?")
        found |= dict.fromkeys(hits, entry)
    return found


MOVIE_GEN = Rules(
    axes={"heads": "tp", "ffn": "tp", "sequence": "cp", "text": None},
    parameters={
        "blocks.*.*_attention.[qkv].weight": ("heads", ""),
        "blocks.*.*_attention.out.weight": ("", "heads"),
        "blocks.*.*_attention.[qk]_norm.weight": (),  # over the values of one head
        "blocks.*.ffn.w[13].weight": ("ffn", ""),
        "blocks.*.ffn.w2.weight": ("", "ffn"),
        "blocks.*.norm[12].weight": (),
        "blocks.*.table": (),  # adaLN is of the width, which no rank splits
        "time.**": (),
        "text.**": (),
        "patch_*.weight": (),
        "positions.*": (),
        "norm.weight": (),
        "table": (),
    },
    attributes={"blocks.*.*_attention.heads": "heads"},
    inputs={
        "patch_in": {0: ("", "sequence", "")},
        "blocks.*.cross_attention": {1: ("", "text", "")},
    },
    made={"positions": ("sequence", "")},
    outputs={"patch_out": ("", "sequence", "")},
    attention={
        "blocks.*.self_attention": AttentionRule(("sequence",), ("sequence",), "context"),
        "blocks.*.cross_attention": AttentionRule(("sequence",), ("text",), "gather"),
    },
)
"""Text is short, so that every rank has it whole; `on(text="cp")` splits its projections too and gathers keys and values."""

BYTE_TEXT = Rules(
    axes={"heads": "tp", "ffn": "tp"},
    parameters={
        "layers.*.qkv.weight": ("3 heads", ""),
        "layers.*.out.weight": ("", "heads"),
        "layers.*.up.weight": ("ffn", ""),
        "layers.*.down.weight": ("", "ffn"),
        "layers.*.norm[12].weight": (),
        "embedding.weight": (),
        "position": (),
        "norm.weight": (),
    },
    attributes={"layers.*.heads": "heads"},
    inputs={},
    made={},
    outputs={},
    attention={},
)
"""A text encoder's sequence is short and runs once a request: it is worth splitting over heads only."""

RULES: Registry[Rules] = Registry("rule table", {"movie-gen": "reelstep.parallel.rules:MOVIE_GEN", "byte-text": "reelstep.parallel.rules:BYTE_TEXT"})
