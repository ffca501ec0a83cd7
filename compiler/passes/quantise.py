"""Linear layers in 8 bits or in 4, written so that what runs the graph can see it.

    y = x W^T + b  ->  y = fake_quantise(x) (q * step)^T + b

q [N, K] is the weight in few bits, step [N, 1] is float32, a row of W for each output. In "int8" x goes through a grid of 256 numbers whose step and
zero point were measured on real calls (Jacob et al. 2018, arXiv:1712.05877, equations 1 and 3); a runtime with 8-bit products (OpenVINO's
low-precision transformations, on VNNI or AMX) moves the steps behind the product and multiplies integers. In "int8-weights" x stays as it is. In
"fp8" both are E4M3 (Micikevicius et al. 2022, arXiv:2209.05433), every row of x finds its own step as it comes, and the product is torch's own for
such operands, `_scaled_mm`. In "nvfp4" both are NVFP4 (nvfp4.py), and the product of what they hold stands for Blackwell's own, which torch has on no CPU.
Only operators of torch stand in the graph: every backend that knows them runs it.

B batch, L tokens, K width in, N width out.
"""

from __future__ import annotations

import math
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
from reelstep.compiler.passes.drop_unused_weights import drop_unused_weights
from reelstep.compiler.passes.nvfp4 import REACH, block_scales, codes_of, pack, through_nvfp4, unpack, values_of
from reelstep.compiler.passes.quantise_before_moves import quantise_before_moves
from reelstep.compiler.signature import Signature
from reelstep.kernels.fp8_norm_quantise import LARGEST, SMALLEST

aten = torch.ops.aten

Scheme = Literal["int8", "int8-weights", "fp8", "nvfp4"]
Stored = tuple[Tensor, ...]
"""A weight [N, K] in few bits and what it is scaled by: 8-bit [N, K] and steps [N, 1]; in NVFP4 bytes [N, K / 2], the scales of blocks
[N, K / 16], and the whole's []."""

PARTS = ("q", "step", "whole")
"""Of what is stored: what its buffers are called, before the number of the weight."""
LINEAR = aten.linear.default
LEAST, MOST = -128, 127  # of int8; weights leave out the least, so that their grid is symmetric


@dataclass(frozen=True)
class Grid:
    """Of a tensor in int8: value = step * (integer - zero)."""

    step: float
    zero: int

    @classmethod
    def of(cls, low: float, high: float) -> Grid:
        """That covers [low, high] and holds 0 exactly."""
        low, high = min(low, 0.0), max(high, 0.0)
        step = max((high - low) / (MOST - LEAST), SMALLEST)
        return cls(step, max(LEAST, min(MOST, round(LEAST - low / step))))

    @property
    def largest(self) -> float:
        """Of the magnitudes it covers."""
        return self.step * max(self.zero - LEAST, MOST - self.zero)


def _shapes(x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int) -> tuple[Tensor, Tensor]:
    """Of the fake quantisation, whose own in torch does not know a dynamic batch."""
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


torch.library.register_fake("aten::fake_quantize_per_tensor_affine_cachemask", _shapes)


def linears(exported: ExportedProgram) -> dict[str, str]:
    """Linear layers by parameters: from the node's name to the weight's qualified name, in the order they run."""
    weights = exported.graph_signature.inputs_to_parameters
    found = {node.name: node.args[1] for node in exported.graph.nodes if node.target is LINEAR}
    return {name: weights[weight.name] for name, weight in found.items() if isinstance(weight, Node) and weight.name in weights}


def quantise_weight(weight: Tensor, scheme: Scheme) -> Stored:
    """[N, K] as the scheme stores it, so that the largest magnitude of each row is the type's; in NVFP4 that of each block and of the whole."""
    exact = weight.detach().float()
    largest = exact.abs().amax(1, keepdim=True).clamp_min(SMALLEST)
    if scheme == "nvfp4":
        scale = largest.amax() / REACH
        scales = block_scales(exact, scale)
        return pack(codes_of(exact, scales, scale)), scales, scale
    if scheme == "fp8":
        step = largest / LARGEST
        return (exact / step).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), step
    step = largest / MOST
    return (exact / step).round().clamp(-MOST, MOST).to(torch.int8), step


def e4m3_linear(x: Tensor, weight: Tensor, step: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] in float32, weight [N, K] in E4M3 with its steps [N, 1] -> [..., N]. The product comes in bfloat16, the one type that GPUs give it in."""
    rows = x.flatten(0, -2)
    own = rows.abs().amax(-1, keepdim=True).clamp_min(SMALLEST) / LARGEST
    q = (rows / own).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    y: Tensor = torch._scaled_mm(q, weight.t(), scale_a=own, scale_b=step.t(), out_dtype=torch.bfloat16).to(x.dtype).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


class Quantising(Interpreter):
    """Runs a float32 graph with some linear layers in few bits; tracing that run gives the quantised graph.

    layers: from a node's name to its weight's; weights: as the scheme stores them; grids: of what goes into a layer, where the scheme fixes one.
    """

    def __init__(self, body: GraphModule, scheme: Scheme, layers: Mapping[str, str], weights: Mapping[str, Stored], grids: Mapping[str, Grid]) -> None:
        super().__init__(body)
        self.scheme, self.layers, self.weights, self.grids = scheme, layers, weights, grids
        self.layer: str | None = None

    def run_node(self, n: Node) -> Any:
        self.layer = self.layers.get(n.name)
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.layer is None or self.layer not in self.weights:
            return super().call_function(target, args, kwargs)
        x, _, *bias = args
        q, step, *whole = self.weights[self.layer]
        if self.scheme == "nvfp4":
            return F.linear(through_nvfp4(x, self.grids[self.layer].largest / REACH), values_of(unpack(q), step, *whole), *bias)
        if self.scheme == "fp8":
            return e4m3_linear(x, q, step, *bias)
        if self.scheme == "int8":
            grid = self.grids[self.layer]
            x = torch.fake_quantize_per_tensor_affine(x, grid.step, grid.zero, LEAST, MOST)
        return F.linear(x, q.to(torch.float32) * step, *bias)


class Quantised(nn.Module):
    """A graph module run through Quantising; the weights in few bits are its buffers."""

    def __init__(self, body: GraphModule, scheme: Scheme, layers: Mapping[str, str], weights: Mapping[str, Stored], grids: Mapping[str, Grid]) -> None:
        super().__init__()
        self.body, self.scheme, self.layers, self.grids, self.names = body, scheme, layers, grids, tuple(weights)
        self.parts = PARTS[: max(map(len, weights.values()), default=0)]
        for k, stored in enumerate(weights.values()):
            for part, tensor in zip(self.parts, stored, strict=True):
                self.register_buffer(f"{part}{k}", tensor)

    def forward(self, *inputs: Tensor) -> Any:
        weights = {name: tuple(getattr(self, f"{part}{k}") for part in self.parts) for k, name in enumerate(self.names)}
        return Quantising(self.body, self.scheme, self.layers, weights, self.grids).run(*inputs)


def quantise(exported: ExportedProgram, signature: Signature, scheme: Scheme, chosen: Collection[str], grids: Mapping[str, Grid]) -> ExportedProgram:
    """The same program with the linear layers of the weights `chosen` in few bits; their float weights are gone. grids: by weight, of what goes in."""
    layers = linears(exported)
    weights = {name: quantise_weight(exported.state_dict[name], scheme) for name in dict.fromkeys(layers.values()) if name in chosen}
    with quiet_torch():
        body: Any = exported.module()
        return quantise_before_moves(drop_unused_weights(drop_asserts(trace(Quantised(body, scheme, layers, weights, grids), signature))))


class Watching(Interpreter):
    """Runs a graph and keeps the least and the greatest number that went into each layer, by its weight."""

    def __init__(self, body: GraphModule, layers: Mapping[str, str]) -> None:
        super().__init__(body)
        self.layers = layers
        self.ranges: dict[str, tuple[float, float]] = {}

    def run_node(self, n: Node) -> Any:
        if n.name in self.layers:
            x: Tensor = self.env[n.all_input_nodes[0]]
            low, high = self.ranges.get(self.layers[n.name], (math.inf, -math.inf))
            self.ranges[self.layers[n.name]] = min(low, float(x.min())), max(high, float(x.max()))
        return super().run_node(n)
