"""Attention written so that OpenVINO runs it as one node, and with keys read where they lie.

Its own decomposition turns keys over first: [B, L, N, K] become [B, N, K, L] in memory, number by number. A product that takes its second operand
transposed reads rows of K numbers instead, and costs nothing more.
"""

from __future__ import annotations

from typing import Any

import openvino as ov
import openvino.opset13 as op
from openvino._offline_transformations import apply_moc_transformations


def read_keys_in_place(model: ov.Model) -> None:
    """Rewrite, in place, attention without a mask as products around a softmax, and products of what was turned over as products that turn it over."""
    apply_moc_transformations(model, cf=True)  # the frontend takes a batched product apart, with moves of its own; where shapes are static they cancel out
    for node in model.get_ordered_ops():
        if node.get_type_name() == "ScaledDotProductAttention" and node.get_input_size() == 3 and not node.get_attributes()["causal"]:
            node.output(0).replace(_attend(*(node.input_value(i) for i in range(3))))
        elif node.get_type_name() == "MatMul" and (source := _turned(node.input_value(1))) is not None:
            turned = node.get_attributes()
            node.output(0).replace(op.matmul(node.input_value(0), source, turned["transpose_a"], not turned["transpose_b"]).output(0))
    model.validate_nodes_and_infer_types()


def _attend(q: Any, k: Any, v: Any) -> Any:
    """softmax(q k^T / sqrt(K)) v in the type of q: what one node computes, with sums in float32."""
    width = q.get_partial_shape()[-1].get_length()
    scores = op.matmul(q, k, False, True)
    scaled = op.multiply(scores, op.convert_like(op.constant(width**-0.5, ov.Type.f32), scores))
    return op.matmul(op.softmax(scaled, -1), v, False, False).output(0)


def _turned(value: Any) -> Any | None:
    """What a product can read with its last two dims exchanged, where `value` is moved in memory only for that; else None."""
    node = value.get_node()
    if node.get_type_name() != "Transpose" or node.input_value(1).get_node().get_type_name() != "Constant":
        return None
    *outer, before, last = node.input_value(1).get_node().data.tolist()
    if before != len(outer) + 1:  # the last dim stays last: rows are moved whole
        return None
    order = [*outer, last, before]
    source = node.input_value(0)
    return source if order == sorted(order) else op.transpose(source, op.constant(order, ov.Type.i64)).output(0)
