"""bfloat16 where the work is, float32 where the sums are.

Products (matrix, convolution, attention) take and give bfloat16; operators between them follow their inputs, so that what
only products feed (a gated FFN's middle, the norms of queries and keys, whose sums are float32 inside) stays bfloat16;
everything that meets a float32 tensor (residual sums and their norms, modulation) runs in float32. An op of ours that a graph has
kept takes what comes: it computes in float32 and gives the dtype of its first tensor. In float32 run the first and the
last layer too: they are small, and what they round reaches the output whole; so do products whose result is an angle, since a sine of
some hundreds of radians that are rounded to 8 bits is any number. A product of a quantised tensor (passes/quantise.py) reads float32, which
are integers times a step that no bfloat16 holds, and gives float32: it sums integers anyway, and behind a cast the runtime would not take an activation
into the product. A runtime's own bfloat16 hint casts everything and rounds the residual stream at every layer: several times the error
(`reelstep bench engine`).
"""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from reelstep.compiler.capture import quiet_torch, trace
from reelstep.compiler.cost import FORMULAS, KINDS
from reelstep.compiler.passes.drop_asserts import drop_asserts
from reelstep.compiler.passes.quantise_before_moves import FAKE_QUANTISE, is_rounded
from reelstep.compiler.passes.split_at_collectives import RING
from reelstep.compiler.signature import Signature
from reelstep.kernels.op import NAMESPACE

aten = torch.ops.aten

PRODUCTS = frozenset(FORMULAS) - {RING}  # which takes what comes, as ops of ours do
ATTENTION = aten.scaled_dot_product_attention.default
IN_E4M3 = aten._scaled_mm.default
"""A layer in 8 bits, which gives bfloat16 (passes/quantise.py)."""
SINES = frozenset({aten.sin.default, aten.cos.default, aten.polar.default})
CASTS = frozenset({aten._to_copy.default, aten.to.dtype})
ROW_NORMS = frozenset({aten.rms_norm.default, aten.layer_norm.default})
"""Norms over the last dims, which every backend sums in float32 inside. Group norms are not among them: OpenVINO has none in bfloat16."""
SUMS = frozenset(
    {
        aten.group_norm.default, aten.native_layer_norm.default, aten.native_group_norm.default, aten._fused_rms_norm.default,
        aten.softmax.int, aten._softmax.default, aten.sum.dim_IntList, aten.mean.dim, aten.var.correction, aten.amax.default,
        aten.exp.default, aten.pow.Tensor_Scalar, aten.cos.default, aten.sin.default, aten.log.default, aten.rsqrt.default,
        aten.cumsum.default,
    }
)  # fmt: skip


def widens(node: Node | None) -> bool:
    """Whether it makes float32 of what a layer in E4M3 gave, its bias added or not: where others are float32 that is done for them, as for any layer."""
    if node is None or node.target not in CASTS:
        return False
    source: Any = node.args[0]
    return (source.args[0] if source.target is aten.add.Tensor else source).target is IN_E4M3


def angles(body: GraphModule) -> set[Node]:
    """Products that are no layer and end in a sine, as positions by frequencies do."""
    weights = {name for name, _ in body.named_parameters()}

    def is_layer(product: Node) -> bool:
        return any(node.op == "get_attr" and node.target in weights for read in product.all_input_nodes for node in (read, *read.all_input_nodes))

    found: set[Node] = set()
    seen: set[Node] = set()
    left = [read for node in body.graph.nodes if node.target in SINES for read in node.all_input_nodes]
    while left:
        node = left.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target not in (*PRODUCTS, *ROW_NORMS, *SUMS):
            left += node.all_input_nodes
        elif node.target in PRODUCTS and not is_layer(node):
            found.add(node)
    return found


def in_reach(mask: Tensor) -> Tensor:
    """A mask of attention that bfloat16 can hold: float32's least number, which often stands for a key that does not count, would become -inf, and a row
    of these has no softmax."""
    least = torch.finfo(torch.bfloat16).min
    return torch.where(mask == -torch.inf, mask, mask.clamp(min=least)) if mask.dtype is torch.float32 else mask


class Recast(Interpreter):
    """Runs a float32 graph with the casts in place; tracing that run gives the mixed graph."""

    def __init__(self, body: GraphModule) -> None:
        super().__init__(body)
        layers = [node for node in body.graph.nodes if KINDS.get(node.target) in ("product", "convolution") or node.target is IN_E4M3]
        ends = {*layers[:1], *layers[-1:]}
        self.kept = angles(body) | {node for node in body.graph.nodes if node.target in PRODUCTS and (node in ends or is_rounded(node.args[0]))}
        self.node: Node | None = None

    def run_node(self, n: Node) -> Any:
        self.node = n
        return super().run_node(n)

    @property
    def keeps(self) -> bool:
        return self.node in self.kept

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is getitem:  # of an op of several dtypes: nothing is computed
            return super().call_function(target, args, kwargs)
        if widens(self.node):
            return args[0]
        if target is ATTENTION and (mask := kwargs.get("attn_mask", args[3] if len(args) > 3 else None)) is not None:
            args, kwargs = (*args[:3], in_reach(mask), *args[4:]), {name: value for name, value in kwargs.items() if name != "attn_mask"}
        tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dtype in (torch.float32, torch.bfloat16)]
        mixed = len({x.dtype for x in tensors}) > 1 and getattr(target, "namespace", "") != NAMESPACE
        if (target in PRODUCTS and not self.keeps) or (target in ROW_NORMS and tensors[0].dtype is torch.bfloat16):
            args, kwargs = cast((args, kwargs), torch.bfloat16)
        elif target in SUMS or target is FAKE_QUANTISE or self.keeps or mixed:
            args, kwargs = cast((args, kwargs), torch.float32)
        return super().call_function(target, args, kwargs)


def cast(values: Any, dtype: torch.dtype) -> Any:
    """The same structure with every floating tensor in `dtype`."""
    return pytree.tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != dtype else x, values)


class Mixed(nn.Module):
    """A graph module run through Recast; float32 at its edges."""

    def __init__(self, body: GraphModule) -> None:
        super().__init__()
        self.body = body

    def forward(self, *inputs: Tensor) -> Any:
        return cast(Recast(self.body).run(*inputs), torch.float32)


def mixed_precision(exported: ExportedProgram, signature: Signature) -> ExportedProgram:
    """The same program with explicit casts, float32 at its edges. For a backend to apply to a float32 graph as it builds."""
    with quiet_torch():
        body: Any = exported.module()
        return drop_asserts(trace(Mixed(body), signature))
