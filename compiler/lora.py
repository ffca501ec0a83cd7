"""A program that takes low-rank adapters as an input: every row brings its own, so rows of one batch may differ in them and nothing is rebuilt.

Hu et al. 2021, arXiv:2106.09685, equation 3: y = W x + (alpha / r) B A x. Here `down` is A transposed and `up` is B transposed, with all factors in it.
B rows, N numbers of a row's adapter, R its rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import Linear

from reelstep.compiler.program import Program, TensorSpec
from reelstep.errors import ConfigError
from reelstep.parallel.tensor import SplitLinear

PROGRAM = "denoise"
"""What adapters change."""
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

    @property
    def places(self) -> Iterator[tuple[Layer, int]]:
        """Every layer, and where its pair begins."""
        return zip(self.layers, accumulate((self.rank * (layer.inputs + layer.outputs) for layer in self.layers), initial=0), strict=False)

    def pair(self, packed: Tensor, layer: Layer, begin: int) -> tuple[Tensor, Tensor]:
        """Views of packed [B, N]: a layer's `down` [B, inputs, R] and `up` [B, R, outputs]."""
        middle, end = begin + layer.inputs * self.rank, begin + (layer.inputs + layer.outputs) * self.rank
        return packed[:, begin:middle].unflatten(1, (layer.inputs, self.rank)), packed[:, middle:end].unflatten(1, (self.rank, layer.outputs))

    def pairs(self, packed: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Those of all layers."""
        return (self.pair(packed, *place) for place in self.places)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layout:
        return cls(data["rank"], tuple(Layer(*layer) for layer in data["layers"]))


def layers_of(linears: Mapping[str, Linear]) -> tuple[Layer, ...]:
    return tuple(Layer(name, linear.in_features, linear.out_features) for name, linear in linears.items())


def patterns(layers: tuple[Layer, ...]) -> str:
    """The names with their numbers as stars, for people."""
    return ", ".join(dict.fromkeys(re.sub(r"\d+", "*", layer.name) for layer in layers))


class Adapted(nn.Module):
    """A module of which some linear layers add, for each row, what the row's own pair makes of the layer's input. The module itself knows nothing of it.

    linears: on a rank of a mesh what stands for them there.
    """

    def __init__(self, module: nn.Module, linears: Mapping[str, nn.Module], layout: Layout) -> None:
        super().__init__()
        self.module = module
        self._linears = tuple(linears.values())  # in a tuple, so that they are not registered twice
        self._layout = layout

    def forward(self, *inputs: Tensor) -> Any:
        """The module's inputs, each [B, ...], and packed [B, N] behind them."""
        *own, packed = inputs
        # Each before the hooks that are there: what they do with a layer's output, such as to add up ranks' parts of it, they do with the adapter's too.
        pairs = (partial(self._layout.pair, packed, *place) for place in self._layout.places)
        hooks = [linear.register_forward_hook(partial(add_views, pair), prepend=True) for linear, pair in zip(self._linears, pairs, strict=True)]
        try:
            return self.module(*own)
        finally:
            for hook in hooks:
                hook.remove()


def add_views(views: Callable[[], tuple[Tensor, Tensor]], linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """As `add_pair`, of a pair whose views are made here, so that a graph has them where they are read."""
    return add_pair(*views(), linear, inputs, output)


def add_pair(down: Tensor, up: Tensor, linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A forward hook. inputs: one tensor [B, L, inputs of the layer]; down and up as of `Layout.pair`, or without B.

    A rank that has some outputs of the layer takes those columns of `up`; one that has some inputs takes those rows of `down` and gives its part of a sum.
    """
    (x,) = inputs
    if isinstance(linear, SplitLinear):
        down, up = (down, linear.cut.of(up, 2)) if linear.cut.dim == 0 else (linear.cut.of(down, 1), up)
    return output + (x @ down) @ up


def adapted_too(programs: Iterable[Program], layer_at: Callable[[str], nn.Module], layout: Layout | None) -> tuple[Program, ...]:
    """The programs, and behind them `denoise` with adapters, if it is among them and there is a layout. layer_at: a layer of its module, by name."""
    programs = tuple(programs)
    if layout is None:
        return programs
    found = (program for program in programs if program.name == PROGRAM)
    return (*programs, *(with_lora(program, {name: layer_at(name) for name, *_ in layout.layers}, layout) for program in found))


def with_lora(program: Program, linears: Mapping[str, nn.Module], layout: Layout) -> Program:
    """The program with adapters as an input, on the same weights. linears: those of its module, in the layout's order."""
    edge = TensorSpec(INPUT, "float32", ("B", layout.numbers))
    return replace(program, name=program.name + SUFFIX, module=Adapted(program.module, linears, layout), inputs=(*program.inputs, edge))
