"""An exported graph as JSON without weights, and back. Nothing is pickled, nothing names a path of the machine that wrote it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from inspect import signature as signature_of
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from reelstep.compiler.capture import place_of, quiet_torch
from reelstep.compiler.plan import canonical_json
from reelstep.compiler.signature import Signature
from reelstep.errors import BundleError, CompileError
from reelstep.kernels import OPS

NUMBERS = frozenset({torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default})
WEIGHT_KINDS = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}

SAFE_FUNCTION = re.compile(
    r"torch\.sym_\w+|math\.(?:ceil|floor|trunc|sqrt)|_operator\.(?:add|sub|mul|floordiv|truediv|mod|neg|pow|pos|getitem|eq|ne|lt|le|gt|ge|and_|or_)"
)
OPERATOR = re.compile(r"torch\.ops\.(aten|prims|reelstep)\.(?!(?:new_)?empty)(\w+)\.(\w+)")
SAFE_ARGUMENT = re.compile(r"(?:Optional|List|\[|\])*(?:Tensor|number|int|SymInt|float|bool|SymBool|Device)\]*")
SAFE_WORDS = {"approximate", "driver", "implementation", "mode", "ord", "padding", "reduce", "rounding_mode", "side"}
"""What a stored graph may call: the deserialiser would resolve any attribute of torch. Of operators those that give new values for tensors, numbers and
choices: no other word, which might name a file, nothing that writes into what it is given, and no memory that nobody wrote. Dtypes and layouts are ints there.
"""

SAFE_NAME = re.compile(r"(?:[A-Za-z_][\w.]*)?", re.ASCII)
"""Of tensors and arguments: torch writes them into Python source, which it runs."""

SAFE_SPEC = re.compile(r'(?:[\[\]{}:, 1]|null|"(?:type|context|children_spec|null|\[\]|builtins\.(?:tuple|list|dict))")*')
"""Of arguments: nested tuples of tensors. Names of keyword arguments would become source too, and other types are imported by name."""

SAFE_EXPRESSION = re.compile(
    r"(?:Symbol\('[su]\d+'(?:, (?:positive|nonnegative|integer)=True)*\)|\d+|[-+*/(), ]"
    r"|Add|Mul|Pow|Integer|Rational|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|Max|Min)*"
)
"""Sizes as formulas of the batch: the deserialiser evaluates them, so only arithmetic may pass."""


def element_bytes(weight: Tensor, float_bytes: int) -> int:
    """In an engine: a floating number takes what the precision has, one in 8 bits what it takes already."""
    return float_bytes if weight.is_floating_point() and weight.element_size() > 1 else weight.element_size()


def weights_of(exported: ExportedProgram) -> dict[str, Tensor]:
    """Parameters, buffers and constants by qualified name. Raises CompileError for a constant that is no tensor."""
    weights = {**exported.state_dict, **exported.constants}
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            raise CompileError(f"the graph holds a constant {name!r} of type {type(tensor).__name__}; only tensors can be saved")
        if tensor.is_complex():
            raise CompileError(f"the graph holds {name!r} in {tensor.dtype}, which no backend takes; keep real and imaginary parts apart (torch.view_as_real)")
    return weights


def ops_of(exported: ExportedProgram) -> dict[str, int]:
    """Calls by operator, sorted by name."""
    counts = Counter(str(node.target) for node in exported.graph.nodes if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload))
    return dict(sorted(counts.items()))


def dump_graph(exported: ExportedProgram) -> bytes:
    """The graph as canonical JSON. Equal inputs give equal bytes, in any process."""
    from torch._export.serde.serialize import ExportedProgramSerializer, _dataclass_to_dict  # as in `load_graph`

    serializer = ExportedProgramSerializer()
    choices = signature_of(serializer.serialize).parameters  # torch 2.11 has none, and copies the weights too
    left_out = {name: False for name in ("serialize_state_dict", "serialize_constants", "serialize_example_inputs") if name in choices}
    data: dict[str, Any] = _dataclass_to_dict(serializer.serialize(exported, **left_out).exported_program)
    data["guards_code"] = []  # code would be run by whoever loads it; the edge is checked by the signature
    data["graph_module"]["module_call_graph"] = [entry for entry in data["graph_module"]["module_call_graph"] if entry["fqn"] == ""]
    _strip_metadata(data)
    return canonical_json(data, indent=None)


def load_graph(data: bytes, weights: Mapping[str, Tensor], signature: Signature, where: str) -> ExportedProgram:
    """The graph with `weights` attached, shared and not copied. `where` names the file in errors.

    Raises BundleError if it calls or computes what no graph of ours does, or is of a torch that this one cannot read.
    """
    # Not at the top: torch takes longer to import this than a server takes to start when its engines are in the cache, which reads no graph.
    from torch._export.serde.serialize import SerializedArtifact, SerializeError, deserialize
    from torch._export.verifier import SpecViolationError

    try:
        graph = json.loads(data)
        tuple(OPS.values())  # an op that is imported is known to torch
        if (why := refused(graph)) is not None:
            raise BundleError(f"{where} {why}")
        specs = graph["graph_module"]["signature"]["input_specs"]
        named = {kind: [spec[kind][field] for spec in specs if kind in spec] for kind, field in WEIGHT_KINDS.items()}
        state = {name: nn.Parameter(weights[name], requires_grad=False) for name in named["parameter"]}
        buffers = {name: weights[name] for name in named["buffer"]}
        constants = {name: weights[name] for name in weights if name not in state and name not in buffers}
        persistent = {spec["buffer"]["buffer_name"] for spec in specs if "buffer" in spec and spec["buffer"]["persistent"]}
        constants |= {name: tensor for name, tensor in buffers.items() if name not in persistent}
        device = next((tensor.device for tensor in weights.values()), torch.device("cpu"))
        examples = tuple(edge.zeros(min(2, signature.max_batch), device) for edge in signature.inputs)
        with quiet_torch():
            artifact = SerializedArtifact(data, {**state, **{n: t for n, t in buffers.items() if n in persistent}}, constants, (examples, {}))  # type: ignore[arg-type]  # deserialize takes what is already loaded as it is
            return deserialize(artifact)
    except (SerializeError, SpecViolationError, LookupError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise BundleError(f"{where} is not a graph that torch {torch.__version__} reads ({error}); run `reelstep compile` again") from error


def _strip_metadata(data: Any) -> None:
    """Empty every node's metadata, and the module's: stack traces, source files and object addresses. In tables of values any word may be a tensor's name."""
    data["graph_module"]["metadata"] = {}
    for item in _dicts(data):
        if isinstance(item.get("target"), str):
            item["metadata"] = {}


def _dicts(data: Any) -> Iterator[dict[str, Any]]:
    if isinstance(data, dict):
        yield data
    for child in data.values() if isinstance(data, dict) else data if isinstance(data, list | tuple) else ():
        yield from _dicts(child)


def _names(item: dict[str, Any]) -> list[str]:
    """Strings that become identifiers: what is called a name, and the keys of tables of values."""
    tables = [table for key, table in item.items() if key.endswith("_values") and isinstance(table, dict)]
    named = [value for key, value in item.items() if key in ("name", "as_name") or key.endswith("_name")]
    return [str(name) for name in (*named, *item.get("forward_arg_names", ()), *(key for table in tables for key in table)) if name is not None]


def _is_safe(target: str) -> bool:
    if (named := OPERATOR.fullmatch(target)) is None:
        return SAFE_FUNCTION.fullmatch(target) is not None
    namespace, name, overload = named.groups()
    op = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
    if not isinstance(op, torch._ops.OpOverload) or op._schema.is_mutable:
        return False
    return all(SAFE_ARGUMENT.fullmatch(str(each.type)) or (each.name in SAFE_WORDS and "str" in str(each.type)) for each in op._schema.arguments)


def refused(graph: Any) -> str | None:
    """Of a stored graph as JSON values: what of it no graph of ours has, to follow the graph's name; None where all may pass."""
    if graph["guards_code"]:
        return "carries code to run; Reelstep writes none and runs none"
    for item in _dicts(graph):
        target, expression = item.get("target"), item.get("expr_str")
        if unsafe := [name for name in _names(item) if not SAFE_NAME.fullmatch(name)]:
            return f"holds the name {unsafe[0]!r}, which is not a plain identifier"
        if unsafe := [spec for key in ("in_spec", "out_spec") if not SAFE_SPEC.fullmatch(spec := str(item.get(key, "")))]:
            return f"has arguments of the structure {unsafe[0]!r}, which is more than tuples of tensors"
        if isinstance(target, str) and "inputs" in item and not _is_safe(target):
            return f"calls {target!r}, and a bundle takes only operators that give new values for tensors and numbers"
        if isinstance(expression, str) and not SAFE_EXPRESSION.fullmatch(expression):
            return f"holds the size {expression!r}, which is not plain arithmetic"
    return None


def asked_at(exported: ExportedProgram, why: str) -> str:
    """The place in the module's code of what was refused, to follow that: of the operator it names, or where a number was taken out of a tensor."""
    named = (node for node in exported.graph.nodes if f"'torch.ops.{node.target}'" in why or ("size" in why and node.target in NUMBERS))
    return next((place for node in named if (place := place_of(node))), "")
