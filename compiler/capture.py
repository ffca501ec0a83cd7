"""A program becomes one `torch.export` graph per profile: the batch stays dynamic, every other size is a number."""

from __future__ import annotations

import inspect
import io
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim, ExportedProgram, export
from torch.fx import Node
from torch.overrides import TorchFunctionMode

from reelstep.compiler.nodes import arguments_of
from reelstep.compiler.program import BATCH, Profile, Program
from reelstep.compiler.signature import Edge, Signature, torch_dtype
from reelstep.errors import CompileError, ConfigError

SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""Names of programs, profiles and solvers become file names."""

TORCH = str(Path(torch.__file__).parent)
FRAME = re.compile(r'File "(.+)", line (\d+), in .+\n(.*)')
"""Of a traceback's text."""

EXAMPLE_ROWS = 3
"""Sizes 0 and 1 are always specialised by the tracer, and 2 is a common size of other things; 3 keeps the batch apart."""


def _shapes(x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int) -> tuple[Tensor, Tensor]:
    """Of the fake quantisation, whose own in torch does not know a dynamic batch. Here, where whatever captures or reads a graph finds it."""
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


torch.library.register_fake("aten::fake_quantize_per_tensor_affine_cachemask", _shapes)


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Inside, torch's warnings about its own use of what it has deprecated are not shown."""
    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.filterwarnings("ignore", category=category, module=r"torch(\..*)?|copyreg")
        yield


def capture(program: Program, profile: Profile) -> ExportedProgram:
    """The exported graph of `program` at `profile`, in evaluation mode, on the module's own device (meta too).

    Raises ConfigError for a name that cannot be a file name and for sizes that the module itself refuses, CompileError naming program, profile and cause
    if the module cannot be exported, fixes the batch, does something else for one row, draws random numbers, or does not give the outputs that were declared.
    """
    if not SAFE_NAME.fullmatch(program.name) or not SAFE_NAME.fullmatch(profile.name) or "." in program.name:
        raise ConfigError(f"program {program.name!r}, profile {profile.name!r}: names are letters, digits, '_' and '-'; a profile's may have '.' too")
    signature = Signature.of(program, profile)
    training = [module for module in program.module.modules() if module.training]
    program.module.eval()
    try:
        with quiet_torch(), _without_partial_graph():
            exported = trace(program.module, signature)
            if signature.max_batch > 1 and profile not in program.profiles[1:]:  # which differ from the first in sizes alone
                _check_one_row(program.module, signature)
    except ConfigError as error:  # sizes that the module itself refuses
        raise ConfigError(f"program {program.name!r} at profile {profile.name!r}: {error}") from error
    except Exception as error:  # export raises whatever the module's own code raises
        raise CompileError(f"program {program.name!r} at profile {profile.name!r} cannot be exported{_cause(error)}") from error
    finally:
        _restore(training)
    _check_outputs(exported, signature)
    if drawn := next(filter(_draws, exported.graph.nodes), None):
        why = "draws random numbers, and a graph gives the same for the same inputs; draw outside of the program and give them as an input, or leave it out"
        raise CompileError(f"program {program.name!r} at profile {profile.name!r} {why}: {drawn.target}{place_of(drawn)}")
    return exported


@contextmanager
def log_levels(levels: Mapping[str, int]) -> Iterator[None]:
    """Inside, these loggers say nothing below these levels."""
    logs = {logging.getLogger(name): level for name, level in levels.items()}
    before = {log: log.level for log in logs}
    for log, level in logs.items():
        log.setLevel(level)
    try:
        yield
    finally:
        for log, level in before.items():
            log.setLevel(level)


@contextmanager
def _without_partial_graph() -> Iterator[None]:
    """Inside, what goes to stderr waits for the end, without the graph up to an error, which export prints, and without its warning about names of its own."""
    said, graph = io.StringIO(), ""
    try:
        with redirect_stderr(said), log_levels({"torch.fx.experimental.symbolic_shapes": logging.ERROR}):
            yield
    except Exception as error:
        graph = f"{getattr(error, 'partial_fx_graph', '')}\n"
        raise
    finally:
        sys.stderr.write(said.getvalue().replace(graph, "") if graph else said.getvalue())


def _cause(error: Exception) -> str:
    """Where in the module's code, with that line, and the first paragraph of what torch says without its hints for people who debug torch."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode  # here: it brings sympy, a third of a second

    theirs = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith((TORCH, __file__))]
    place = _at(theirs[-1].filename, theirs[-1].lineno, theirs[-1].line) if theirs else ""
    text = re.split(r"\n\s*\n", str(error), maxsplit=1)[0]
    if fixed := re.search(r"You marked B as dynamic but your code specialized it to be a constant \((\d+)\)", text):
        return f": its code takes {fixed[1]}, the rows that it was traced with, for the only number of rows; take sizes from x.shape, and not by len or int"
    if isinstance(error, GuardOnDataDependentSymNode):
        text += ". A graph cannot depend on the values of its tensors: choose by torch.where, or outside of the program"
    return f"{place}: {text}"


def place_of(node: Node) -> str:
    """Where in the module's code a node comes from, to follow a statement; empty where that is not known."""
    theirs = [frame for frame in FRAME.findall(node.meta.get("stack_trace") or "") if not frame[0].startswith(TORCH)]
    return _at(*theirs[-1]) if theirs else ""


def _at(file: str, number: int | str | None, line: str | None) -> str:
    return f" at {file}:{number}, `{(line or '').strip()}`"


def trace(module: nn.Module, signature: Signature) -> ExportedProgram:
    """Export `module`, whose forward takes the inputs one by one or as `*inputs`, with a dynamic batch."""
    rows = EXAMPLE_ROWS if signature.max_batch > 1 else 1
    device = next(module.parameters(), torch.empty(0)).device
    examples = tuple(edge.zeros(rows, device) for edge in signature.inputs)
    batch = {0: Dim(BATCH, min=1, max=max(rows, signature.max_batch))} if signature.max_batch > 1 else {}
    shapes = tuple(batch for _ in examples)
    with torch.no_grad():
        return export(module, examples, dynamic_shapes=(shapes,) if _is_variadic(module) else shapes, strict=False)


class Called(TorchFunctionMode):
    """Inside, what a module's code asks of torch is written down: the function's name and where it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.places: list[str] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(TORCH):
            frame = frame.f_back
        self.names.append(getattr(func, "__name__", str(func)))
        self.places.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return func(*args, **(kwargs or {}))


def _check_one_row(module: nn.Module, signature: Signature) -> None:
    """Raises CompileError for code that goes another way for one row than for more. The tracer takes it for certain that there are more."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # here: as in `_cause`

    device = next(module.parameters(), torch.empty(0)).device

    def called(rows: int) -> Called:
        calls = Called()
        empty = nullcontext() if device.type == "meta" else FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())  # of values: the first is quicker
        with torch.no_grad(), empty, calls:
            module(*(edge.zeros(rows, device) for edge in signature.inputs))
        return calls

    many, one = called(EXAMPLE_ROWS), called(1)
    if one.names == many.names:
        return
    apart = next(i for i, (a, b) in enumerate(zip_longest(one.names, many.names)) if a != b)
    ways = [f"{calls.names[apart]} at {calls.places[apart]}" if apart < len(calls.names) else "nothing more" for calls in (one, many)]
    raise CompileError(f"its code goes another way for one row ({ways[0]}) than for more ({ways[1]}); a graph has one way for any number of rows")


def output_values(exported: ExportedProgram) -> list[Tensor]:
    """The fake tensors that the graph returns; their batch is symbolic."""
    return [node.meta["val"] for node in exported.graph.output_node().args[0]]


def _is_variadic(module: nn.Module) -> bool:
    return any(parameter.kind is parameter.VAR_POSITIONAL for parameter in inspect.signature(module.forward).parameters.values())


def _restore(training: list[nn.Module]) -> None:
    for module in training:
        module.training = True


def _check_outputs(exported: ExportedProgram, signature: Signature) -> None:
    values = output_values(exported)
    where = f"program {signature.program!r} at profile {signature.profile!r}"
    rows = next(node.meta["val"].shape[0] for node in exported.graph.nodes if node.name in exported.graph_signature.user_inputs)
    if len(values) != len(signature.outputs):
        raise CompileError(f"{where} returns {len(values)} tensors; {len(signature.outputs)} are declared: {'; '.join(map(str, signature.outputs))}")
    for value, edge in zip(values, signature.outputs, strict=True):
        if not _fits(value, edge, rows):
            found = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
            raise CompileError(f"{where} returns {found}; declared is {edge}, with as many rows as the inputs have ({rows}), a number that must stay dynamic")


SWITCHES = {"dropout_p", "train", "training"}
"""Arguments without which an operator that can draw random numbers draws none."""


def _draws(node: Node) -> bool:
    """Whether a call of the graph depends on the state of a generator."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    switches = [value for name, value in arguments_of(node).items() if name in SWITCHES]
    return not switches or any(switches)


def _fits(value: Tensor, edge: Edge, rows: int | torch.SymInt) -> bool:
    """rows: the inputs' own number, which every output must have, whatever that is: not twice as many, and none that depend on values."""
    return value.dtype is torch_dtype(edge.dtype) and [*map(str, value.shape)] == [*map(str, (rows, *edge.sizes))]
