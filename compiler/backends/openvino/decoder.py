"""A graph as OpenVINO's frontend reads it.

The frontend knows some operators in another form alone, and traces the whole graph again to bring them into it, which takes longer than all else of a
conversion. Here each is rewritten where it stands, into what the trace would make of it; a graph with others of these is still traced.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
from openvino.frontend.pytorch.torchdynamo.export_decompositions import ops_to_not_decompose
from torch import Tensor
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.export.decomp_utils import CustomDecompTable
from torch.fx import Graph, Node
from torch.fx.passes.shape_prop import _extract_tensor_metadata

from reelstep.compiler.nodes import arguments_of, call, replace

aten = torch.ops.aten


def decoder_of(exported: ExportedProgram) -> TorchFXPythonDecoder:
    """What `ov.convert_model` takes as it is. The graph that is given stays as it was."""
    if any(isinstance(node.target, OpOverload) and _taken_apart(node.target) and not _rewritable(node) for node in exported.graph.nodes):
        return TorchFXPythonDecoder.from_exported_program(exported)
    module = exported.module()
    assert isinstance(module, torch.fx.GraphModule)
    _ask_the_first(module.graph)
    for node in list(module.graph.nodes):
        if _rewritable(node):
            REWRITES[node.target](module.graph, node)
    module.recompile()
    for node in module.graph.nodes:
        if isinstance(value := node.meta.get("val"), Tensor):
            node.meta["tensor_meta"] = _extract_tensor_metadata(value)  # what the frontend reads; a trace leaves it, a graph from a file has none
    return TorchFXPythonDecoder(module, dynamic_shapes=True)


@cache
def _taken_apart(op: OpOverload) -> bool:
    """Whether the frontend has an operator taken apart before it reads a graph; a size, which is in the table too, comes out as it was."""
    if op in ops_to_not_decompose() or op is aten.sym_size.int:
        return False
    return op in _table() or torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")


@cache
def _table() -> frozenset[OpOverload]:
    return frozenset(CustomDecompTable().keys())


def _rewritable(node: Node) -> bool:
    """Not where the trace would make more of it: of other paddings, of a convolution without rows, of a norm over sizes that are not known."""
    if node.target not in REWRITES:
        return False
    given = arguments_of(node)
    if node.target is aten.pad.default:
        return bool(given["mode"] == "constant")
    if node.target in SPATIAL:
        return _value(given["input"]).ndim == 2 + SPATIAL[node.target]
    return node.target is not aten.group_norm.default or all(isinstance(size, int) for size in _value(given["input"]).shape[1:])


def _ask_the_first(graph: Graph) -> None:
    """Inputs have one batch, and whichever it was that a size was asked of, the first that has it is asked."""
    first: dict[str, tuple[Node, int]] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            for dim, size in enumerate(_value(node).shape):
                first.setdefault(str(size), (node, dim))
        elif node.target is aten.sym_size.int:
            node.args = first.get(str(node.meta["val"]), node.args)


def _value(node: Any) -> Tensor:
    found: Tensor = node.meta["val"]
    return found


def _rows(graph: Graph, x: Node) -> int | Node:
    """The first size of x: a number, or the node that gives it."""
    rows: int | torch.SymInt = _value(x).shape[0]
    if isinstance(rows, int):
        return rows
    known = (node for node in graph.nodes if isinstance(node.meta.get("val"), torch.SymInt) and str(node.meta["val"]) == str(rows))
    return next(known, None) or call(graph, aten.sym_size.int, x, 0)


def _transpose(graph: Graph, node: Node) -> None:
    given = arguments_of(node)
    dims = list(range(_value(given["self"]).ndim))
    first, second = given["dim0"], given["dim1"]
    dims[first], dims[second] = dims[second], dims[first]
    replace(graph, node, aten.permute.default, given["self"], dims)


def _to(graph: Graph, node: Node) -> None:
    given = arguments_of(node)
    if given["dtype"] == _value(given["self"]).dtype and not given["copy"]:
        node.replace_all_uses_with(given["self"])
        graph.erase_node(node)
    else:
        replace(graph, node, aten._to_copy.default, given["self"], dtype=given["dtype"])


def _view(graph: Graph, node: Node) -> None:
    replace(graph, node, aten.view.default, *node.args)


def _unbind(graph: Graph, node: Node) -> None:
    given = arguments_of(node)
    x, dim = given["self"], given["dim"] % _value(given["self"]).ndim
    for item in list(node.users):
        place: Any = item.args[1]
        with graph.inserting_before(item):
            part = call(graph, aten.slice.Tensor, x, dim, place, place + 1)
        replace(graph, item, aten.squeeze.dims, part, [dim])
    graph.erase_node(node)


def _pad(graph: Graph, node: Node) -> None:
    given = arguments_of(node)
    replace(graph, node, aten.constant_pad_nd.default, given["self"], given["pad"], given["value"] or 0.0)


def _repeated(value: Any, count: int) -> list[int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * count if len(values) == 1 else values


def _convolution(graph: Graph, node: Node) -> None:
    given, spatial = arguments_of(node), SPATIAL[node.target]
    stride, padding, dilation = (_repeated(given[name], spatial) for name in ("stride", "padding", "dilation"))
    operands = (given["input"], given["weight"], given["bias"])
    replace(graph, node, aten.convolution.default, *operands, stride, padding, dilation, False, [0] * spatial, given["groups"])


def _group_norm(graph: Graph, node: Node) -> None:
    given = arguments_of(node)
    x, shape = given["input"], _value(given["input"]).shape
    with graph.inserting_before(node):
        sizes = (_rows(graph, x), shape[1], shape[2:].numel(), given["num_groups"])
        norm = call(graph, aten.native_group_norm.default, x, given["weight"], given["bias"], *sizes, given["eps"])
    replace(graph, node, operator.getitem, norm, 0)


def _layer_norm(graph: Graph, node: Node) -> None:
    given = arguments_of(node)
    with graph.inserting_before(node):
        norm = call(graph, aten.native_layer_norm.default, *(given[name] for name in ("input", "normalized_shape", "weight", "bias", "eps")))
    replace(graph, node, operator.getitem, norm, 0)


SPATIAL: Mapping[Any, int] = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}
"""Dims that a convolution goes over."""
REWRITES: Mapping[Any, Callable[[Graph, Node], None]] = {
    aten.transpose.int: _transpose,
    aten.to.dtype: _to,
    aten._unsafe_view.default: _view,
    aten.unbind.int: _unbind,
    aten.pad.default: _pad,
    **dict.fromkeys(SPATIAL, _convolution),
    aten.group_norm.default: _group_norm,
    aten.layer_norm.default: _layer_norm,
}
