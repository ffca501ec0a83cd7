"""A graph becomes a TensorRT network: Torch-TensorRT lowers it and converts operator by operator, strongly typed, so that precision is the graph's.

Its one-call `convert_exported_program_to_serialized_trt_engine` does the same steps, and hides what a plan without weights needs (which weight of the
network is which tensor), more than one optimisation profile, the build's progress, and the operator that failed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import tensorrt as trt
import torch_tensorrt
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch_tensorrt.dynamo import CompilationSettings
from torch_tensorrt.dynamo.conversion import DYNAMO_CONVERTERS, TRTInterpreter
from torch_tensorrt.dynamo.conversion._conversion import infer_module_output_dtypes
from torch_tensorrt.dynamo.lowering import get_decompositions, post_lowering, pre_export_lowering
from torch_tensorrt.dynamo.partitioning import fast_partition, get_graph_converter_support

from reelstep.compiler.backends.tensorrt.collectives import groups_of
from reelstep.compiler.backends.tensorrt.records import Records
from reelstep.compiler.capture import quiet_torch
from reelstep.compiler.passes.mixed_precision import mixed_precision
from reelstep.compiler.program import Precision
from reelstep.compiler.signature import Signature, torch_dtype
from reelstep.errors import CompileError

PART = "_run_on_acc"
"""In the name of each part of a graph that would be an engine."""


@dataclass(frozen=True)
class Coverage:
    """What Torch-TensorRT's converters make of a graph: operators after lowering, those it has no converter for, and engines it would be cut into."""

    operators: int
    supported: int
    unsupported: dict[str, int]
    engines: int


@dataclass(frozen=True)
class Network:
    """A network before it is built. inputs, outputs: its names, in the order of the signature. weights: by its names, in its layouts and dtypes.

    groups: ranks that exchange data, by the group's name.
    """

    builder: trt.Builder
    definition: trt.INetworkDefinition
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: dict[str, Tensor]
    groups: dict[str, tuple[int, ...]]
    interpreter: TRTInterpreter  # owns the memory that the definition points to

    @property
    def weight_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights.values())


def settings() -> CompilationSettings:
    """What conversion is asked for. How the network is built is build.py's."""
    return CompilationSettings(
        require_full_compilation=True,
        min_block_size=1,
        attn_bias_is_causal=False,  # the default takes every attention with a mask for a causal one
        immutable_weights=False,
        use_distributed_mode_trace=False,  # takes linear apart for DTensor; our graphs hold sliced weights already
    )


def lower(exported: ExportedProgram, signature: Signature, precision: Precision) -> GraphModule:
    """The graph in the operators that converters take, with constants folded (transposed and cast weights among them)."""
    wanted = settings()
    typed = mixed_precision(exported, signature) if precision == "bfloat16" else exported
    with quiet_torch():
        decomposed = pre_export_lowering(typed, wanted).run_decompositions(get_decompositions(False, False, wanted.use_distributed_mode_trace))
        lowered: GraphModule = post_lowering(decomposed.module(check_guards=False), wanted)
        return lowered


def _unsupported(lowered: GraphModule) -> dict[str, int]:
    """Calls by operator that no converter takes."""
    DYNAMO_CONVERTERS.set_compilation_settings(settings())
    return dict(Counter(str(node.target) for node in lowered.graph.nodes if node.op == "call_function" and node not in DYNAMO_CONVERTERS))


def coverage(lowered: GraphModule) -> Coverage:
    """A dry run of the converters: nothing is built, no library of TensorRT is called."""
    unsupported = _unsupported(lowered)
    supported, operators = get_graph_converter_support(lowered, set())
    with quiet_torch():
        parts, _ = fast_partition(lowered, min_block_size=1, torch_executed_ops=set(), require_full_compilation=False, skip_fusion=supported == operators)
    return Coverage(operators, supported, unsupported, sum(name.startswith(PART) for name, _ in parts.named_children()))


def convert(lowered: GraphModule, signature: Signature, records: Records) -> Network:
    """Raises CompileError naming the operators without converter, or the operator whose conversion failed and why."""
    where = f"program {signature.program!r} at profile {signature.profile!r}"
    lacking = _unsupported(lowered)
    if lacking:
        named = ", ".join(f"{op} ({count})" for op, count in lacking.items())
        raise CompileError(
            f"{where} cannot become one TensorRT engine: no converter for {named}; write it in other operators, share evenly where ranks exchange data, "
            "or use backend 'inductor'"
        )
    interpreter = TRTInterpreter(
        lowered, [_spec(signature, i) for i in range(len(signature.inputs))], infer_module_output_dtypes(lowered), compilation_settings=settings()
    )
    records.watch(interpreter.builder, interpreter.ctx.net)
    try:
        with quiet_torch():
            interpreter._construct_trt_network_def()
    except Exception as error:  # every converter fails in its own way
        node: Any = interpreter._cur_node
        at = f" at operator {node.target} (node {node.name!r}, from {list(node.all_input_nodes)})" if node is not None else ""
        raise CompileError(f"{where} cannot be converted to TensorRT{at}: {error}. {records.explain()}") from error
    outputs = tuple(interpreter._output_names)
    if interpreter.ctx.requires_output_allocator or len(outputs) != len(signature.outputs):
        raise CompileError(
            f"{where} has outputs {', '.join(outputs)} in TensorRT, where {len(signature.outputs)} of fixed sizes are declared; give each output a tensor "
            "of its own, with sizes that do not depend on values"
        )
    return Network(
        interpreter.builder,
        interpreter.ctx.net,
        tuple(interpreter._input_names),
        outputs,
        interpreter.ctx.weight_refit_map,
        groups_of(lowered),
        interpreter,
    )


def _spec(signature: Signature, position: int) -> torch_tensorrt.Input:
    """An input with a dynamic batch, or of one row."""
    edge, rows = signature.inputs[position], signature.max_batch
    if rows == 1:
        return torch_tensorrt.Input(shape=(1, *edge.sizes), dtype=torch_dtype(edge.dtype))
    shapes = {"min_shape": (1, *edge.sizes), "opt_shape": (rows, *edge.sizes), "max_shape": (rows, *edge.sizes)}
    return torch_tensorrt.Input(**shapes, dtype=torch_dtype(edge.dtype))
