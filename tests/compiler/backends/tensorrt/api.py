"""Whether what a source uses of TensorRT, Torch-TensorRT and torch.cuda is there, and takes the arguments that it is given.

The bindings are compiled: their signatures are in their docstrings, `name(self: X, a: T, b: T = default) -> R`, one line for each overload.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import tensorrt as trt
import torch

RECEIVERS = {
    "builder": trt.Builder,
    "config": trt.IBuilderConfig,
    "definition": trt.INetworkDefinition,
    "net": trt.INetworkDefinition,
    "profile": trt.IOptimizationProfile,
    "cache": trt.ITimingCache,
    "runtime": trt.Runtime,
    "engine": trt.ICudaEngine,
    "context": trt.IExecutionContext,
    "refitter": trt.Refitter,
    "layer": trt.IDistCollectiveLayer,
}
"""What the last word of an expression stands for, in the files that drive TensorRT."""


class Problem(Exception):
    """Something that is not there, or is called otherwise."""


def dotted(node: ast.expr) -> str | None:
    """`a.b.c` of names and attributes."""
    if isinstance(node, ast.Attribute):
        rest = dotted(node.value)
        return None if rest is None else f"{rest}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def overloads(method: Any, name: str) -> Iterator[tuple[list[str], int]]:
    """For each overload its parameters without `self`, and how many of them have no default."""
    for line in re.findall(rf"^\s*(?:\d+\. )?{re.escape(name)}\((.*)\) ->", inspect.getdoc(method) or "", re.MULTILINE):
        plain = re.sub(r"<[^>]*>|\[[^\]]*\]", "", line)
        if plain == "*args, **kwargs":
            continue
        parameters = [part.strip() for part in plain.split(",") if not part.strip().startswith("self:")]
        yield [part.partition(":")[0] for part in parameters], sum("=" not in part for part in parameters)


def check_call(method: Any, name: str, call: ast.Call, where: str) -> None:
    """Raises Problem if no overload takes the call's arguments."""
    given, named = len(call.args), {keyword.arg for keyword in call.keywords}
    known = list(overloads(method, name))
    fits = [p for p, needed in known if named <= set(p[given:]) and needed <= given + len(named) <= len(p)]
    if not fits:
        raise Problem(f"{where}: {name} takes {[p for p, _ in known]}, given are {given} arguments and {sorted(map(str, named))}")


def check_source(tree: ast.Module, where: str) -> Counter[str]:
    """How often each thing of TensorRT and torch.cuda is used. Raises Problem for the first that is not there or does not take its arguments."""
    used: Counter[str] = Counter()
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        name, place = dotted(node), f"{where}:{node.lineno}"
        call = calls.get(id(node))
        if name is not None and name.startswith(("trt.", "torch.cuda.")):
            found: Any = {"trt": trt, "torch": torch}[name.split(".")[0]]
            for part in name.split(".")[1:]:
                if not hasattr(found, part):
                    raise Problem(f"{place}: {name} is not there")
                found = getattr(found, part)
            if call and name.startswith("trt."):
                check_call(found.__init__, "__init__", call, place)
            elif call:
                check_python_call(found, call, place)
            used[name] += 1
        owner = (dotted(node.value) or "").split(".")[-1]
        if owner in RECEIVERS:
            kind = RECEIVERS[owner]
            if not hasattr(kind, node.attr):
                raise Problem(f"{place}: {kind.__name__} has no {node.attr!r}")
            if call:
                check_call(getattr(kind, node.attr), node.attr, call, place)
            used[f"{kind.__name__}.{node.attr}"] += 1
    return used


def check_python_call(function: Any, call: ast.Call, where: str) -> None:
    """As check_call, for what Python can describe. Calls that unpack are left out: their arguments are not in the source."""
    if any(isinstance(argument, ast.Starred) for argument in call.args) or any(keyword.arg is None for keyword in call.keywords):
        return
    try:
        inspect.signature(function).bind(*call.args, **{str(keyword.arg): keyword.value for keyword in call.keywords})
    except TypeError as error:
        raise Problem(f"{where}: {error}") from error


def check_imports(module: ModuleType, tree: ast.Module) -> Counter[str]:
    """Calls of what a module imports from torch_tensorrt. Raises Problem for one that does not take its arguments."""
    used: Counter[str] = Counter()
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch_tensorrt")
        for alias in node.names
    }
    for node in ast.walk(tree):
        name = dotted(node.func) if isinstance(node, ast.Call) else None
        if isinstance(node, ast.Call) and name and (name in imported or name.startswith("torch_tensorrt.")):
            found: Any = module
            for part in name.split("."):
                found = getattr(found, part)
            check_python_call(found, node, f"{module.__name__}:{node.lineno}")
            used[name] += 1
    return used


def check_overrides(module: ModuleType) -> Counter[str]:
    """Methods by which our classes answer TensorRT. Raises Problem for one that is missing or takes another number of arguments."""
    used: Counter[str] = Counter()
    for ours in vars(module).values():
        for kind in (trt.IErrorRecorder, trt.IProgressMonitor):
            if not (isinstance(ours, type) and issubclass(ours, kind) and ours is not kind):
                continue
            for name, method in vars(kind).items():
                wanted = list(overloads(method, name))
                if name.startswith("_") or not wanted:
                    continue
                if name not in vars(ours) or len(inspect.signature(getattr(ours, name)).parameters) - 1 != len(wanted[0][0]):
                    raise Problem(f"{ours.__name__}.{name} answers {kind.__name__}.{name}({', '.join(wanted[0][0])})")
                used[f"{kind.__name__}.{name}"] += 1
    return used
