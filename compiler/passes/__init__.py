"""The rewrites between a captured graph and a backend: a straight list, each checked before the next runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from torch._ops import OpOverload
from torch.export import ExportedProgram

from reelstep.compiler.capture import output_values, quiet_torch
from reelstep.compiler.passes.compose_attention import compose_attention
from reelstep.compiler.passes.decompose_ops import decompose_ops
from reelstep.compiler.passes.define_empty import EMPTY_OPS, define_empty
from reelstep.compiler.passes.drop_asserts import drop_asserts
from reelstep.compiler.passes.drop_dead import drop_dead
from reelstep.compiler.passes.drop_unused_weights import drop_unused_weights
from reelstep.compiler.passes.functionalise import functionalise
from reelstep.compiler.passes.norm_before_transpose import norm_before_transpose
from reelstep.errors import CompileError

Pass = Callable[[ExportedProgram], ExportedProgram]

PASSES: dict[str, Pass] = {
    "compose_attention": compose_attention,
    "decompose_ops": decompose_ops,
    "functionalise": functionalise,
    "drop_asserts": drop_asserts,
    "define_empty": define_empty,
    "drop_dead": drop_dead,
    "drop_unused_weights": drop_unused_weights,
    "norm_before_transpose": norm_before_transpose,
}
"""In the order they run."""


def apply_passes(exported: ExportedProgram, keep: Iterable[str] = ()) -> tuple[ExportedProgram, tuple[str, ...]]:
    """The rewritten graph, and the names of the passes that changed it. The graph that is given is used up. Raises CompileError naming a pass that broke it.

    keep: ops of ours that the backend runs whole, `Backend.keeps`.
    """
    applied = []
    kept = frozenset(keep)
    told: dict[str, Pass] = {"compose_attention": partial(compose_attention, keep=kept), "decompose_ops": partial(decompose_ops, keep=kept)}
    passes = PASSES | told if kept else PASSES
    for name, rewrite in passes.items():
        before, edges = _text(exported), _edges(exported)
        with quiet_torch():
            exported = rewrite(exported)
        _verify(exported, name, edges)
        if _text(exported) != before:
            applied.append(name)
    _verify_final(exported)
    return exported, tuple(applied)


def _text(exported: ExportedProgram) -> str:
    return str(exported.graph)


def _edges(exported: ExportedProgram) -> list[str]:
    """User inputs and outputs by shape and dtype: what no pass may change."""
    inputs = set(exported.graph_signature.user_inputs)
    values = [node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder" and node.name in inputs]
    return [f"{value.dtype} {tuple(value.shape)}" for value in values + output_values(exported)]


def _verify(exported: ExportedProgram, name: str, edges: list[str]) -> None:
    try:
        exported.graph.lint()
        exported.validate()
    except Exception as error:  # lint raises bare RuntimeErrors, the verifier its own class
        raise CompileError(f"pass {name!r} left a graph that is not legal: {error}") from error
    if _edges(exported) != edges:
        raise CompileError(f"pass {name!r} changed the inputs or outputs from {edges} to {_edges(exported)}")


def _verify_final(exported: ExportedProgram) -> None:
    """What backends are promised: operators without side effects, and no memory that nobody wrote."""
    for node in exported.graph.nodes:
        if isinstance(node.target, OpOverload) and (node.target._schema.is_mutable or node.target in EMPTY_OPS):
            raise CompileError(f"after all passes the graph still holds {node.target} as {node.name!r}; backends take functional operators only")
