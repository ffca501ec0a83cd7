"""FLOPs and parameters of a graph or a module. Two FLOPs per multiply-add; matrix products, convolutions and attention count, the rest is noise."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils.flop_counter import FlopCounterMode

from reelstep.compiler.graphs import weights_of

aten = torch.ops.aten
Shape = tuple[int, ...]


def module_parameters(module: nn.Module) -> int:
    """Elements of all parameters; a shared one counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


def module_flops(module: nn.Module, *inputs: Tensor) -> int:
    """FLOPs of one forward. On the meta device nothing is computed or allocated, so a 30B model takes seconds."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        module(*inputs)
    return int(counter.get_total_flops())


def graph_parameters(exported: ExportedProgram) -> int:
    """Elements of all parameters that the graph reads; a shared one counts once."""
    weights = weights_of(exported)
    tensors = {weights[name].data_ptr() or name: weights[name] for name in exported.graph_signature.parameters}
    return sum(tensor.numel() for tensor in tensors.values())


def graph_flops(exported: ExportedProgram, rows: int = 1) -> int:
    """FLOPs of one call with `rows` rows, from the shapes in the graph; nothing is run."""
    return sum(FORMULAS[node.target](node, rows) for node in exported.graph.nodes if node.target in FORMULAS)


def _shape(node: Any, rows: int) -> Shape:
    """The sizes of a node's tensor with the batch set to `rows`: the batch is the only symbol that a graph has."""
    return tuple(_number(size, rows) for size in node.meta["val"].shape)


def _number(size: int | torch.SymInt, rows: int) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, rows)))


def _product(left: int) -> Callable[[Node, int], int]:
    """A matrix product whose left operand is argument `left`: every output element sums over its last size."""
    return lambda node, rows: 2 * prod(_shape(node, rows)) * _shape(node.args[left], rows)[-1]


def _convolution(node: Node, rows: int) -> int:
    """Every output element (input element, if transposed) meets one kernel of weight[0]."""
    transposed = node.target in TRANSPOSED or (node.target is aten.convolution.default and bool(node.args[6]))
    positions = _shape(node.args[0] if transposed else node, rows)
    return 2 * prod(positions) * prod(_shape(node.args[1], rows)[1:])


def _attention(node: Node, rows: int) -> int:
    """Scores and weighted sum. query [..., L, K], key [..., S, K], value [..., S, V]."""
    query, key, value = (_shape(argument, rows) for argument in node.args[:3])
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)

FORMULAS: dict[Any, Callable[[Node, int], int]] = {
    **dict.fromkeys((aten.linear.default, aten.mm.default, aten.bmm.default, aten.matmul.default), _product(0)),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default), _product(1)),
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default, *TRANSPOSED), _convolution),
    **dict.fromkeys((aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding), _convolution),
    aten.scaled_dot_product_attention.default: _attention,
}
