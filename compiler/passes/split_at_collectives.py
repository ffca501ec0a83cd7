"""Cut a rank's graph at its collectives, for backends that have none: they compile the pieces, and torch.distributed runs between them.

Not one of the rewrites that run on every graph: it makes many graphs of one, after those.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from reelstep.compiler.backends import Backend, Executable
from reelstep.compiler.capture import quiet_torch, trace
from reelstep.compiler.graphs import dump_graph
from reelstep.compiler.plan import canonical_json
from reelstep.compiler.program import DType, Precision
from reelstep.compiler.signature import Edge, Signature, torch_dtype
from reelstep.compiler.sources import made_of
from reelstep.errors import CompileError
from reelstep.parallel.collectives import Communicator, c10d
from reelstep.parallel.context import ring_attention

aten = torch.ops.aten

RING: OpOverload = ring_attention._opoverload
COLLECTIVES = frozenset({c10d.all_reduce.default, c10d.all_gather_into_tensor.default, c10d.all_to_all_single.default, RING})
DTYPES: dict[torch.dtype, DType] = {torch_dtype(name): name for name in get_args(DType)}


@dataclass(frozen=True)
class Piece:
    """A graph without collectives. Edges in `raised` have a first dim of 1 put before their own, since a program's first dim is its rows."""

    signature: Signature
    exported: ExportedProgram
    raised: frozenset[str]

    @property
    def reads(self) -> list[str]:
        return [edge.name for edge in self.signature.inputs]

    @property
    def makes(self) -> list[str]:
        return [edge.name for edge in self.signature.outputs]


@dataclass(frozen=True)
class Value:
    """A tensor by the name it has between the steps."""

    name: str


@dataclass(frozen=True)
class Collective:
    """One collective: args as the operator takes them, with Values for tensors."""

    op: OpOverload
    args: tuple[Any, ...]
    output: str

    @property
    def reads(self) -> list[str]:
        return [arg.name for arg in self.args if isinstance(arg, Value)]

    @property
    def makes(self) -> list[str]:
        return [self.output]


@dataclass(frozen=True)
class Split:
    """A graph in steps. inputs, outputs: names of values in the order of the signature's edges."""

    signature: Signature
    inputs: tuple[str, ...]
    steps: tuple[Piece | Collective, ...]
    outputs: tuple[str, ...]

    @cached_property
    def over(self) -> list[set[str]]:
        """Of each step the values that no later one reads and that are no outputs."""
        wanted, over = {*self.outputs}, list[set[str]]()
        for step in reversed(self.steps):
            known = {*step.reads, *step.makes}
            over.insert(0, known - wanted)
            wanted |= known
        return over

    @property
    def pieces(self) -> list[Piece]:
        return [step for step in self.steps if isinstance(step, Piece)]


class Chain(Executable):
    """The whole program again: pieces as a backend built them, collectives over this rank's links between them."""

    def __init__(self, split: Split, executables: Sequence[Executable], comm: Communicator) -> None:
        self.signature, self.split, self.comm = split.signature, split, comm
        self.steps = list(zip(split.pieces, executables, strict=True))

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = dict(zip(self.split.inputs, self.signature.ordered(inputs), strict=True))
        pieces = iter(self.steps)
        for step, over in zip(self.split.steps, self.split.over, strict=True):
            if isinstance(step, Piece):
                _, run = next(pieces)
                found = run({edge.name: values[edge.name][None] if edge.name in step.raised else values[edge.name] for edge in step.signature.inputs})
                values |= {name: tensor[0] if name in step.raised else tensor for name, tensor in found.items()}
            else:
                args = _with_values(step.args, values)
                values[step.output] = self.comm.guarded("ring_attention", "ring", partial(step.op, *args)) if step.op is RING else self.comm.run(step.op, args)
            for name in over:  # a network of many layers would hold what crosses each of them
                del values[name]
        shared = {*self.split.inputs, *(name for name in self.split.outputs if self.split.outputs.count(name) > 1)}
        outputs = zip(self.signature.outputs, self.split.outputs, strict=True)
        return {edge.name: values[name].clone() if name in shared else values[name] for edge, name in outputs}


@dataclass(frozen=True)
class Wanted:
    """How a rank's programs are built: in this precision, and kept in `cache`, if there is one. key: what it gives stands there for the rank's weights."""

    precision: Precision = "float32"
    cache: Path | None = None
    key: Callable[[], str] = str


IN_FLOAT32 = Wanted()


def build_rank(exported: ExportedProgram, signature: Signature, backend: Backend, comm: Communicator, wanted: Wanted = IN_FLOAT32) -> Executable:
    """A rank's program: one engine where the backend runs what collectives the graph has, else pieces between them. Raises CompileError."""
    found = {node.target for node in exported.graph.nodes} & COLLECTIVES
    if not found <= backend.collectives:
        return in_pieces(exported, signature, backend, comm, wanted)
    return _build(exported, signature, backend, wanted if backend.keeps_collectives or not found else replace(wanted, cache=None))


def in_pieces(exported: ExportedProgram, signature: Signature, backend: Backend, comm: Communicator, wanted: Wanted = IN_FLOAT32) -> Chain:
    """A rank's program, cut at its collectives. Raises CompileError."""
    split = split_at_collectives(exported, signature)
    return Chain(split, [_build(piece.exported, piece.signature, backend, wanted) for piece in split.pieces], comm)


def _build(exported: ExportedProgram, signature: Signature, backend: Backend, wanted: Wanted) -> Executable:
    if wanted.cache is None:
        return backend.build(lambda: exported, signature, wanted.precision, None, "")
    graph, edges = hashlib.sha256(dump_graph(exported)).hexdigest(), canonical_json(signature.to_json()).decode()
    key = made_of(wanted.key(), graph, signature.program, edges, wanted.precision)
    return backend.build(lambda: exported, signature, wanted.precision, wanted.cache, key)


def split_at_collectives(exported: ExportedProgram, signature: Signature) -> Split:
    """The graph in pieces, each an exported program of its own, and the collectives between them.

    Raises CompileError for a batch that is dynamic where the exchange mixes it with other sizes (Ulysses), and for a value of another dtype than
    programs pass.
    """
    with quiet_torch():
        body = exported.module(check_guards=False)
    assert isinstance(body, GraphModule)
    runs, collectives, aliases, results = _cut(body.graph)
    if weights := [n.name for n in results if n.op == "get_attr"]:
        where = f"program {signature.program!r} at profile {signature.profile!r}"
        raise CompileError(f"{where} gives back its weight {weights[0]!r} as it is; leave that output out")
    crossing = {n for op in collectives for n in op.all_input_nodes} | set(results)
    crossing = {aliases.get(n, n) for n in crossing}
    varying = _varying(body.graph)
    needs = [_needed(run, aliases, varying) for run in runs]
    for _, needed in needs:
        crossing |= needed
    steps: list[Piece | Collective] = []
    for i, (nodes, needed) in enumerate(needs):
        made = [n for n in runs[i] if n in crossing and isinstance(n.meta["val"], Tensor)]
        if made:
            steps.append(_piece(body, nodes, sorted(needed, key=_order(body)), made, aliases, signature, i))
        if i < len(collectives):
            steps.append(_collective(collectives[i], aliases, signature))
    names = tuple(n.name for n in body.graph.nodes if n.op == "placeholder")
    return Split(signature, names, tuple(steps), tuple(aliases.get(n, n).name for n in results))


def _cut(graph: Graph) -> tuple[list[list[Node]], list[Node], dict[Node, Node], list[Node]]:
    """Runs of nodes between collectives; the collectives; a wait's collective by the wait; the graph's results."""
    runs: list[list[Node]] = [[]]
    collectives: list[Node] = []
    aliases: dict[Node, Node] = {}
    results: list[Node] = []
    for node in graph.nodes:
        if node.target in COLLECTIVES:
            collectives.append(node)
            runs.append([])
        elif node.target is c10d.wait_tensor.default:
            aliases[node] = node.all_input_nodes[0]
        elif node.op == "output":
            results = list(torch.utils._pytree.tree_leaves(node.args))
        elif node.op == "call_function":
            runs[-1].append(node)
    return runs, collectives, aliases, results


def _varying(graph: Graph) -> set[Node]:
    """What depends on an input. The rest is made of weights alone."""
    varying: set[Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or varying.intersection(node.all_input_nodes):
            varying.add(node)
    return varying


def _needed(run: list[Node], aliases: Mapping[Node, Node], varying: set[Node]) -> tuple[list[Node], set[Node]]:
    """The nodes of a piece and the tensors that it reads from outside.

    Sizes, and what is made of weights alone (a grid of positions), are computed again and not handed over: neither need have a batch.
    """
    nodes, outside = list(run), set[Node]()
    inside, waiting = set(run), [n for node in run for n in node.all_input_nodes]
    while waiting:
        node = aliases.get(waiting[-1], waiting.pop())
        if node in inside or node.op == "get_attr":
            continue
        if isinstance(node.meta["val"], Tensor) and node in varying:
            outside.add(node)
        else:
            inside.add(node)
            nodes.insert(0, node)
            waiting += node.all_input_nodes
    return nodes, outside


def _order(body: GraphModule) -> Any:
    place = {node: i for i, node in enumerate(body.graph.nodes)}
    return place.__getitem__


def _piece(body: GraphModule, nodes: list[Node], needed: list[Node], made: list[Node], aliases: Mapping[Node, Node], signature: Signature, index: int) -> Piece:
    raised = frozenset(n.name for n in (*needed, *made) if not _has_rows(n, signature))
    graph, copies = Graph(), dict[Node, Node]()
    for node in needed:
        given = graph.placeholder(node.name)
        copies[node] = graph.call_function(aten.squeeze.dim, (given, 0)) if node.name in raised else given
    for node in sorted(nodes, key=_order(body)):
        for read in node.all_input_nodes:
            if read.op == "get_attr" and read not in copies:
                copies[read] = graph.node_copy(read)
        copies[node] = graph.node_copy(node, lambda read: copies[aliases.get(read, read)])
    outputs = tuple(graph.call_function(aten.unsqueeze.default, (copies[n], 0)) if n.name in raised else copies[n] for n in made)
    graph.output(outputs)
    edges = tuple(_edge(n, n.name in raised, signature) for n in needed), tuple(_edge(n, n.name in raised, signature) for n in made)
    own = Signature(f"{signature.program}_{index}", signature.profile, *edges, signature.max_batch)
    with quiet_torch():
        return Piece(own, trace(GraphModule(body, graph), own), raised)


def _has_rows(node: Node, signature: Signature) -> bool:
    """Whether the first dim is the batch. With a batch of one row, anything else gets such a dim; a dynamic batch must be there already."""
    sizes: tuple[Any, ...] = tuple(node.meta["val"].shape)
    if signature.max_batch == 1:
        return sizes[:1] == (1,)
    if [isinstance(size, torch.SymInt) for size in sizes] == [True] + [False] * (len(sizes) - 1):
        return True
    raise CompileError(
        f"program {signature.program!r} at profile {signature.profile!r}: value {node.name!r} of sizes {list(sizes)} crosses a collective, and its "
        f"first dim is not the batch of up to {signature.max_batch} rows; give the profile max_batch=1"
    )


def _edge(node: Node, raised: bool, signature: Signature) -> Edge:
    value: Tensor = node.meta["val"]
    if value.dtype not in DTYPES:
        raise CompileError(
            f"program {signature.program!r} at profile {signature.profile!r}: value {node.name!r} crosses a collective as {value.dtype}; "
            f"pieces pass {', '.join(DTYPES.values())}"
        )
    return Edge(node.name, DTYPES[value.dtype], tuple(value.shape if raised else value.shape[1:]))


def _collective(node: Node, aliases: Mapping[Node, Node], signature: Signature) -> Collective:
    for read in node.all_input_nodes:
        if not isinstance(read.meta["val"], Tensor):
            raise CompileError(
                f"program {signature.program!r} at profile {signature.profile!r}: {node.target} sends sizes that depend on the batch; "
                "give the profile max_batch=1"
            )
    named: Any = lambda read: Value(aliases.get(read, read).name)  # noqa: E731  # map_arg is typed for what a graph may hold
    args: Any = map_arg(node.args, named)
    assert isinstance(node.target, OpOverload)
    return Collective(node.target, tuple(args), node.name)


def _with_values(args: tuple[Any, ...], values: Mapping[str, Tensor]) -> tuple[Any, ...]:
    return tuple(values[a.name] if isinstance(a, Value) else list(a) if isinstance(a, list | tuple) else a for a in args)
