"""A program that takes low-rank adapters as an input: every row brings its own, so rows of one batch may differ in them and nothing is rebuilt.

Hu et al. 2021, arXiv:2106.09685, equation 3: y = W x + (alpha / r) B A x. Here `down` is A transposed and `up` is B transposed, with all factors in it.
B rows, N numbers of a row's adapter, R its rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import Linear

from reelstep.compiler.program import Program, TensorSpec
from reelstep.errors import ConfigError

INPUT = "lora"
"""The input that such a program has behind its own, [B, N]."""
SUFFIX = "_lora"
"""Of the program's name: `denoise_lora` is `denoise` with that input."""


class Layer(NamedTuple):
    """A linear layer that may be adapted, by its path in the transformer."""

    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Layout:
    """How the pairs of all layers lie in the N numbers of a row: layer by layer, `down` [inputs, R], then `up` [R, outputs].

    Raises ConfigError for a rank that is no number from 1 to the smallest side of a layer, from which on a whole matrix would be smaller.
    """

    rank: int
    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        most = min(min(layer.inputs, layer.outputs) for layer in self.layers)
        if not 1 <= self.rank <= most:
            raise ConfigError(f"LoRA rank {self.rank}; from 1 to {most}, the smallest side of a layer that is adapted")

    @property
    def numbers(self) -> int:
        """N."""
        return self.rank * sum(layer.inputs + layer.outputs for layer in self.layers)

    def pairs(self, packed: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of packed [B, N]: for each layer `down` [B, inputs, R] and `up` [B, R, outputs]."""
        begin = 0
        for _, inputs, outputs in self.layers:
            middle, end = begin + inputs * self.rank, begin + (inputs + outputs) * self.rank
            yield packed[:, begin:middle].unflatten(1, (inputs, self.rank)), packed[:, middle:end].unflatten(1, (self.rank, outputs))
            begin = end

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layout:
        return cls(data["rank"], tuple(Layer(*layer) for layer in data["layers"]))


def layers_of(linears: Mapping[str, Linear]) -> tuple[Layer, ...]:
    return tuple(Layer(name, linear.in_features, linear.out_features) for name, linear in linears.items())


def patterns(layers: tuple[Layer, ...]) -> str:
    """The names with their numbers as stars, for people."""
    return ", ".join(dict.fromkeys(re.sub(r"\d+", "*", layer.name) for layer in layers))


class Adapted(nn.Module):
    """A module of which some linear layers add, for each row, what the row's own pair makes of the layer's input. The module itself knows nothing of it."""

    def __init__(self, module: nn.Module, linears: Mapping[str, Linear], layout: Layout) -> None:
        super().__init__()
        self.module = module
        self._linears = tuple(linears.values())  # in a tuple, so that they are not registered twice
        self._layout = layout

    def forward(self, *inputs: Tensor) -> Any:
        """The module's inputs, each [B, ...], and packed [B, N] behind them."""
        *own, packed = inputs
        hooks = [linear.register_forward_hook(partial(add_pair, *pair)) for linear, pair in zip(self._linears, self._layout.pairs(packed), strict=True)]
        try:
            return self.module(*own)
        finally:
            for hook in hooks:
                hook.remove()


def add_pair(down: Tensor, up: Tensor, linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A forward hook. inputs: one tensor [B, L, inputs of the layer]; down and up as of `Layout.pairs`."""
    (x,) = inputs
    return output + (x @ down) @ up


def with_lora(program: Program, linears: Mapping[str, Linear], layout: Layout) -> Program:
    """The program with adapters as an input, on the same weights. linears: those of its module, in the layout's order."""
    edge = TensorSpec(INPUT, "float32", ("B", layout.numbers))
    return replace(program, name=program.name + SUFFIX, module=Adapted(program.module, linears, layout), inputs=(*program.inputs, edge))
