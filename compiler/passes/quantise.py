"""Linear layers, and attention, in 8 bits or in 4, written so that what runs the graph can see it.

    y = x W^T + b  ->  y = fake_quantise(x) (q * step)^T + b

q [N, K] is the weight in few bits, step [N, 1] is float32, a row of W for each output. In "int8" x goes through a grid of 256 numbers whose step and
zero point were measured on real calls (Jacob et al. 2018, arXiv:1712.05877, equations 1 and 3); a runtime with 8-bit products (OpenVINO's
low-precision transformations, on VNNI or AMX) moves the steps behind the product and multiplies integers. In "int8-weights" x stays as it is. In
"fp8" both are E4M3 (Micikevicius et al. 2022, arXiv:2209.05433) and the product is torch's own for such operands, `_scaled_mm`: every row of x finds its
own step as it comes, once for all layers that read it, and in one pass with a norm of ours that stands right before them. In "nvfp4" both are NVFP4
(nvfp4.py), and the product of what they hold stands for Blackwell's own, which torch has on no CPU.
In "int8" attention may go the same way, as two products of integers around a softmax in float32:

    softmax(q k^T * scale) v  ->  fake_quantise(softmax(fake_quantise(q) fake_quantise(k)^T * scale)) fake_quantise(v)

Only operators of torch stand in the graph, and the op of ours where its norm was one that the backend keeps: every backend that knows them runs it.

B batch, L tokens, K width in, N width out, D a head's width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node

from reelstep.compiler.capture import quiet_torch, trace
from reelstep.compiler.passes.drop_asserts import drop_asserts
from reelstep.compiler.passes.drop_dead import drop_dead
from reelstep.compiler.passes.drop_unused_weights import drop_unused_weights
from reelstep.compiler.passes.nvfp4 import REACH, block_scales, codes_of, pack, through_nvfp4, unpack, values_of
from reelstep.compiler.passes.quantise_before_moves import MOVES, quantise_before_moves
from reelstep.compiler.signature import Signature
from reelstep.errors import CompileError
from reelstep.kernels import OPS
from reelstep.kernels.fp8_norm_quantise import SMALLEST, e4m3_rows

aten = torch.ops.aten

Scheme = Literal["int8", "int8-weights", "fp8", "nvfp4"]
Stored = tuple[Tensor, ...]
"""A weight [N, K] in few bits and what it is scaled by: 8-bit [N, K] and steps [N, 1]; in NVFP4 bytes [N, K / 2], the scales of blocks
[N, K / 16], and the whole's []. Of attention, which has no weight, nothing."""

PARTS = ("q", "step", "whole")
"""Of what is stored: what its buffers are called, before the number of the weight."""
LINEAR = aten.linear.default
ATTENTION = aten.scaled_dot_product_attention.default
NORM, NORM_TO_E4M3 = OPS["rms_modulate"].overload, OPS["fp8_norm_quantise"].overload
LEAST, MOST = -128, 127  # of int8; weights leave out the least, so that their grid is symmetric
BINS = 2048
"""Of a range whose numbers are counted: eight to a step of a grid that covers it all."""
SHARES = tuple(k / 50 for k in range(50, 4, -1))
"""Of a range that a grid may cover, the widest first: it stays where no narrower one is better."""


@dataclass(frozen=True)
class Grid:
    """Of a tensor in int8: value = step * (integer - zero)."""

    step: float
    zero: int

    @classmethod
    def of(cls, low: float, high: float) -> Grid:
        """That covers [low, high] and holds 0 exactly, in the middle for a range that is symmetric."""
        if low == -high:
            return cls(max(high / MOST, SMALLEST), 0)
        low, high = min(low, 0.0), max(high, 0.0)
        step = max((high - low) / (MOST - LEAST), SMALLEST)
        return cls(step, max(LEAST, min(MOST, round(LEAST - low / step))))

    @classmethod
    def of_least_error(cls, counts: Tensor, low: float, high: float) -> Grid:
        """Of the grids that cover a share of [low, high] the one with the least squared error, for numbers that lie so often in equal bins of that range.

        A wide grid rounds all numbers more, a narrow one cuts the few large ones off (Nagel et al. 2021, arXiv:2106.08295, section 3.1).
        """
        weights = counts.double()
        middles = low + (torch.arange(len(counts), dtype=torch.float64) + 0.5) * ((high - low) / len(counts))

        def error(grid: Grid) -> float:
            integers = ((middles / grid.step).round() + grid.zero).clamp(LEAST, MOST) - grid.zero
            return float((weights * (integers * grid.step - middles).square()).sum())

        return min((cls.of(share * low, share * high) for share in SHARES), key=error)

    def round(self, x: Tensor) -> Tensor:
        """To the grid's numbers."""
        return torch.fake_quantize_per_tensor_affine(x, self.step, self.zero, LEAST, MOST)

    @property
    def largest(self) -> float:
        """Of the magnitudes it covers."""
        return self.step * max(self.zero - LEAST, MOST - self.zero)


def linears(exported: ExportedProgram) -> dict[str, str]:
    """Linear layers by parameters: from the node's name to the weight's qualified name, in the order they run."""
    weights = exported.graph_signature.inputs_to_parameters
    found = {node.name: node.args[1] for node in exported.graph.nodes if node.target is LINEAR}
    return {name: weights[weight.name] for name, weight in found.items() if isinstance(weight, Node) and weight.name in weights}


def attentions(exported: ExportedProgram) -> dict[str, str]:
    """Attention without a mask whose result goes into one linear layer alone: from the node's name to what it is called, in the order they run."""
    layers, found = linears(exported), {}
    for node in exported.graph.nodes:
        if node.target is not ATTENTION or len(node.args) > 3 or {*node.kwargs} - {"scale"} or node.meta["val"].ndim != 4:
            continue
        reader = node
        while len(reader.users) == 1 and (reader is node or reader.target in MOVES):
            (reader,) = reader.users
        if reader.name in layers:
            found[node.name] = f"attention into {layers[reader.name]}"
    return found


def quantisable(exported: ExportedProgram, scheme: Scheme) -> dict[str, str]:
    """What a scheme may put into few bits: from the node's name to the layer's, which is that of its weight."""
    return linears(exported) | (attentions(exported) if scheme == "int8" else {})


def quantise_weight(weight: Tensor, scheme: Scheme) -> Stored:
    """[N, K] as the scheme stores it, so that the largest magnitude of each row is the type's; in NVFP4 that of each block and of the whole."""
    exact = weight.detach().float()
    if scheme == "fp8":
        values, steps = e4m3_rows(exact)
        return values, steps[:, None]
    largest = exact.abs().amax(1, keepdim=True).clamp_min(SMALLEST)
    if scheme == "nvfp4":
        scale = largest.amax() / REACH
        scales = block_scales(exact, scale)
        return pack(codes_of(exact, scales, scale)), scales, scale
    step = largest / MOST
    return (exact / step).round().clamp(-MOST, MOST).to(torch.int8), step


def e4m3_linear(rows: tuple[Tensor, Tensor], weight: Tensor, step: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """rows: of `e4m3_rows`, K wide; weight: [N, K] in E4M3, its steps [N, 1]. Gives [..., N]; GPUs give the product in bfloat16 alone.

    They sum in fewer bits than float32 has, which is what their product with steps for rows is fast with; a CPU sums in float32 as ever.
    """
    values, own = rows
    product = torch._scaled_mm(
        values.flatten(0, -2), weight.t(), scale_a=own.flatten()[:, None], scale_b=step.t(), out_dtype=torch.bfloat16, use_fast_accum=True
    )  # fmt: skip
    y: Tensor = product if bias is None else product + bias.to(product.dtype)
    given: Tensor = y.to(dtype).unflatten(0, values.shape[:-1])
    return given


class Quantising(Interpreter):
    """Runs a float32 graph with some layers in few bits; tracing that run gives the quantised graph.

    layers: from a node's name to the layer's; weights: of those in few bits, as the scheme stores them; grids: of what goes into them, where the scheme
    fixes one: by the layer, and of attention by the layer and a part.
    """

    def __init__(self, body: GraphModule, scheme: Scheme, layers: Mapping[str, str], weights: Mapping[str, Stored], grids: Mapping[str, Grid]) -> None:
        super().__init__(body)
        self.scheme, self.layers, self.weights, self.grids = scheme, layers, weights, grids
        self.rows: dict[Node, tuple[Tensor, Tensor]] = {}

    def run(self, *inputs: Any, **choices: Any) -> Any:
        self.rows.clear()
        return super().run(*inputs, **choices)

    def run_node(self, n: Node) -> Any:
        self.node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer = self._layer(self.node)
        if layer is None:
            if self.scheme == "fp8" and target is NORM and any(self._layer(user) for user in self.node.users):
                self.rows[self.node] = NORM_TO_E4M3(*args)
            return super().call_function(target, args, kwargs)
        if target is ATTENTION:
            return self._attention(layer, *args, **kwargs)
        x, _, *bias = args
        q, step, *whole = self.weights[layer]
        if self.scheme == "nvfp4":
            return F.linear(through_nvfp4(x, self.grids[layer].largest / REACH), values_of(unpack(q), step, *whole), *bias)
        if self.scheme == "fp8":
            source = self.node.args[0]
            assert isinstance(source, Node), "a layer's input is computed by the graph"
            if source not in self.rows:
                self.rows[source] = e4m3_rows(x)
            return e4m3_linear(self.rows[source], q, step, x.dtype, *bias)
        if self.scheme == "int8":
            x = self.grids[layer].round(x)
        return F.linear(x, q.to(torch.float32) * step, *bias)

    def _layer(self, node: Node) -> str | None:
        """What a node is called that is to be in few bits."""
        layer = self.layers.get(node.name)
        return layer if layer in self.weights else None

    def _attention(self, layer: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """[B, heads, L, D]. Scores are scaled behind their product, so that it is one of integers."""
        q, k, v = (self.grids[part_of(layer, part)].round(x) for part, x in (("q", q), ("k", k), ("v", v)))
        heads = torch.matmul(self.grids[part_of(layer, "shares")].round(shares_of(q, k, scale)), v)
        return heads.transpose(1, 2).contiguous().transpose(1, 2)  # as torch's own lies in memory: what follows is a view of it


def shares_of(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """What softmax gives each query of the keys, [B, heads, L, keys]. scale: of the scores; None: 1 / sqrt(D)."""
    return torch.softmax(torch.matmul(q, k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale), -1)


def part_of(layer: str, part: str) -> str:
    """What a grid of attention is called. Parts: q, k, v, and shares, which softmax gives."""
    return f"{layer}: {part}"


class Quantised(nn.Module):
    """A graph module run through Quantising; the weights in few bits are its buffers."""

    def __init__(self, body: GraphModule, scheme: Scheme, layers: Mapping[str, str], weights: Mapping[str, Stored], grids: Mapping[str, Grid]) -> None:
        super().__init__()
        self.body, self.scheme, self.layers, self.grids = body, scheme, layers, grids
        self.names = {name: [f"{part}{k}" for part in PARTS[: len(stored)]] for k, (name, stored) in enumerate(weights.items())}
        for name, stored in weights.items():
            for own, tensor in zip(self.names[name], stored, strict=True):
                self.register_buffer(own, tensor)

    def forward(self, *inputs: Tensor) -> Any:
        weights = {name: tuple(getattr(self, own) for own in names) for name, names in self.names.items()}
        return Quantising(self.body, self.scheme, self.layers, weights, self.grids).run(*inputs)


def quantise(exported: ExportedProgram, signature: Signature, scheme: Scheme, chosen: Collection[str], grids: Mapping[str, Grid]) -> ExportedProgram:
    """The same program with the layers `chosen` in few bits; their float weights are gone. grids: as of Quantising."""
    layers, state = quantisable(exported, scheme), exported.state_dict
    named = [name for name in dict.fromkeys(layers.values()) if name in chosen]
    weights: dict[str, Stored] = {name: quantise_weight(state[name], scheme) if name in state else () for name in named}
    with quiet_torch():
        body: Any = exported.module()
        traced = drop_asserts(trace(Quantised(body, scheme, layers, weights, grids), signature))
        return quantise_before_moves(drop_unused_weights(drop_dead(traced)))  # dead are norms that only layers in fp8 read


class Reading(Interpreter, ABC):
    """Runs a graph and is told what goes into each layer, by what its grid is called. layers: from a node's name to the layer's."""

    def __init__(self, body: GraphModule, layers: Mapping[str, str]) -> None:
        super().__init__(body)
        self.layers = layers

    def run_node(self, n: Node) -> Any:
        if n.name in self.layers:
            layer = self.layers[n.name]
            scale: Any = n.kwargs.get("scale")
            x, *others = (self.env[node] for node in n.args if isinstance(node, Node))  # of which two may be one: keys that are values too
            if n.target is ATTENTION:
                for part, read in zip("qkv", (x, *others), strict=True):
                    self.hear(part_of(layer, part), read, symmetric=True)  # zero points of both sides of a product would be sums of their own
                self.hear(part_of(layer, "shares"), shares_of(x, others[0], scale))
            else:
                self.hear(layer, x)
        return super().run_node(n)

    @abstractmethod
    def hear(self, name: str, x: Tensor, symmetric: bool = False) -> None:
        """symmetric: whether its grid shall have no zero point."""


class Watching(Reading):
    """Keeps the least and the greatest number; of what wants a symmetric grid a symmetric range."""

    def __init__(self, body: GraphModule, layers: Mapping[str, str]) -> None:
        super().__init__(body, layers)
        self.ranges: dict[str, tuple[float, float]] = {}

    def hear(self, name: str, x: Tensor, symmetric: bool = False) -> None:
        low, high = float(x.min()), float(x.max())
        if not math.isfinite(low) or not math.isfinite(high):
            raise CompileError(f"{name}: a call of the requests that are measured holds numbers from {low:g} to {high:g}; nothing can be calibrated on that")
        if symmetric:
            low, high = -max(-low, high), max(-low, high)
        least, most = self.ranges.get(name, (math.inf, -math.inf))
        self.ranges[name] = min(low, least), max(high, most)


class Counting(Reading):
    """Counts numbers in BINS equal bins of known ranges."""

    def __init__(self, body: GraphModule, layers: Mapping[str, str], ranges: Mapping[str, tuple[float, float]]) -> None:
        super().__init__(body, layers)
        self.ranges = ranges
        self.counts = {name: torch.zeros(BINS, dtype=torch.float64) for name in ranges}

    def hear(self, name: str, x: Tensor, symmetric: bool = False) -> None:
        low, high = self.ranges[name]
        if low < high:  # else all numbers are one, and any grid holds it
            self.counts[name] += torch.histc(x.float(), BINS, low, high)
