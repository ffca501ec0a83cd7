"""bfloat16 where the work is, float32 where the sums are.

Products (matrix, convolution, attention) take and give bfloat16; operators between them follow their inputs, so that what
only products feed (a gated FFN's middle, the norms of queries and keys, whose sums are float32 inside) stays bfloat16;
everything that meets a float32 tensor (residual sums and their norms, modulation) runs in float32. An op of ours that a graph has
kept takes what comes: it computes in float32 and gives the dtype of its first tensor. In float32 run the first and the
last product too: they are small, and what they round reaches the output whole. A product of a quantised tensor (passes/quantise.py) reads float32, which
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
from reelstep.compiler.passes.drop_asserts import drop_asserts
from reelstep.compiler.passes.quantise_before_moves import FAKE_QUANTISE, is_rounded
from reelstep.compiler.signature import Signature
from reelstep.kernels import OPS
from reelstep.kernels.op import NAMESPACE

aten = torch.ops.aten

PRODUCTS = frozenset(
    {
        aten.linear.default, aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default, aten.matmul.default,
        aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default, aten.scaled_dot_product_attention.default,
        OPS["attention"].overload,
    }
)  # fmt: skip
ROW_NORMS = frozenset({aten.rms_norm.default, aten.layer_norm.default})
"""Norms over the last dims, which every backend sums in float32 inside. Group norms are not among them: OpenVINO has none in bfloat16."""
SUMS = frozenset(
    {
        aten.group_norm.default, aten.native_layer_norm.default, aten.native_group_norm.default, aten._fused_rms_norm.default,
        aten.softmax.int, aten._softmax.default, aten.sum.dim_IntList, aten.mean.dim, aten.var.correction, aten.amax.default,
        aten.exp.default, aten.pow.Tensor_Scalar, aten.cos.default, aten.sin.default, aten.log.default, aten.rsqrt.default,
    }
)  # fmt: skip


class Recast(Interpreter):
    """Runs a float32 graph with the casts in place; tracing that run gives the mixed graph."""

    def __init__(self, body: GraphModule) -> None:
        super().__init__(body)
        products = [node for node in body.graph.nodes if node.target in PRODUCTS]
        self.kept = {*products[:1], *products[-1:], *(node for node in products if is_rounded(node.args[0]))}
        self.keeps = False

    def run_node(self, n: Node) -> Any:
        self.keeps = n in self.kept
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is getitem:  # of an op of several dtypes: nothing is computed
            return super().call_function(target, args, kwargs)
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
