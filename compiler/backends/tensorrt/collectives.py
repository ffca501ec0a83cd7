"""Converters of collectives to TensorRT's own layers, over the ranks of the group that the graph names.

Torch-TensorRT's own take every rank of the world whatever the group, and equal sizes whatever the graph says: on a mesh with two axes, and where ranks
hold uneven shares, that is another result. So theirs are taken out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorrt as trt
import torch.distributed as dist
from torch._C._distributed_c10d import _resolve_process_group
from torch._ops import OpOverload
from torch.distributed.distributed_c10d import GroupName
from torch.fx import GraphModule, Node
from torch_tensorrt.dynamo.conversion import DYNAMO_ATEN_CONVERTERS, ConversionContext, dynamo_tensorrt_converter
from torch_tensorrt.dynamo.conversion.converter_utils import set_layer_name
from torch_tensorrt.dynamo.lowering.passes.fuse_distributed_ops import (
    tensorrt_fused_nccl_all_gather_op,
    tensorrt_fused_nccl_all_reduce_op,
    tensorrt_fused_nccl_all_to_all_op,
    tensorrt_fused_nccl_reduce_scatter_op,
)

from reelstep.errors import CompileError

REDUCTIONS = {
    "sum": trt.ReduceOperation.SUM, "avg": trt.ReduceOperation.AVG, "max": trt.ReduceOperation.MAX,
    "min": trt.ReduceOperation.MIN, "product": trt.ReduceOperation.PROD,
}  # fmt: skip

COLLECTIVES = frozenset({tensorrt_fused_nccl_all_gather_op, tensorrt_fused_nccl_all_reduce_op, tensorrt_fused_nccl_all_to_all_op})

DYNAMO_ATEN_CONVERTERS.pop(tensorrt_fused_nccl_reduce_scatter_op, None)  # no rank of ours scatters a sum, and theirs would over the wrong ranks

ROOTLESS = -1


def ranks_of(group: str) -> tuple[int, ...]:
    """Ranks of the world in the group of that name. Raises CompileError if this process is in none."""
    try:
        return tuple(dist.get_process_group_ranks(_resolve_process_group(GroupName(group))))
    except RuntimeError as error:
        raise CompileError(f"the graph has a collective over {group!r}, a group that this process is not in ({error}); build a rank's engine there") from error


def groups_of(lowered: GraphModule) -> dict[str, tuple[int, ...]]:
    """The groups that a lowered graph names, and their ranks, which its network will hold."""
    return {group: ranks_of(group) for group in sorted(str(node.args[-1]) for node in lowered.graph.nodes if node.target in COLLECTIVES)}


def even(node: Node, settings: Any) -> bool:
    """Whether an all-to-all sends as much to each rank as it receives: TensorRT's has no sizes."""
    received, sent = node.args[1], node.args[2]
    sizes: list[Any] = [*(received or ()), *(sent or ())]  # type: ignore[misc]  # lists of numbers, or None
    return all(isinstance(size, int) for size in sizes) and len(set(sizes)) <= 1


def add(ctx: ConversionContext, x: trt.ITensor, op: trt.CollectiveOperation, reduction: trt.ReduceOperation, group: str, name: str) -> trt.ITensor:
    """A layer that does `op` over the ranks of `group`; nothing where that is one rank, which TensorRT takes badly."""
    ranks = ranks_of(group)
    if len(ranks) == 1:
        return x
    layer = ctx.net.add_dist_collective(x, op, reduction, ROOTLESS, np.array(ranks, dtype=np.int64))
    layer.num_ranks = len(ranks)
    set_layer_name(layer, op.name, name)
    return layer.get_output(0)


Converter = Callable[[ConversionContext, Any, Sequence[Any], Any, str], trt.ITensor]


def converts(op: OpOverload, able: Callable[[Node, Any], bool] | None = None) -> Callable[[Converter], Converter]:
    """Registers the one converter of `op`, for the nodes that it is `able` to convert."""
    DYNAMO_ATEN_CONVERTERS.pop(op, None)
    registered: Callable[[Converter], Converter] = dynamo_tensorrt_converter(
        op, capability_validator=able, supports_dynamic_shapes=True, requires_native_multidevice=True
    )
    return registered


@converts(tensorrt_fused_nccl_all_reduce_op)
def all_reduce(ctx: ConversionContext, target: Any, args: Sequence[Any], kwargs: Any, name: str) -> trt.ITensor:
    """args: tensor, reduction, group."""
    return add(ctx, args[0], trt.CollectiveOperation.ALL_REDUCE, REDUCTIONS[args[1]], args[2], name)


@converts(tensorrt_fused_nccl_all_gather_op)
def all_gather(ctx: ConversionContext, target: Any, args: Sequence[Any], kwargs: Any, name: str) -> trt.ITensor:
    """args: tensor, size of the group, group. Along the first dim."""
    return add(ctx, args[0], trt.CollectiveOperation.ALL_GATHER, trt.ReduceOperation.NONE, args[2], name)


@converts(tensorrt_fused_nccl_all_to_all_op, even)
def all_to_all(ctx: ConversionContext, target: Any, args: Sequence[Any], kwargs: Any, name: str) -> trt.ITensor:
    """args: tensor, sizes received, sizes sent, group. Along the first dim."""
    return add(ctx, args[0], trt.CollectiveOperation.ALL_TO_ALL, trt.ReduceOperation.NONE, args[3], name)
