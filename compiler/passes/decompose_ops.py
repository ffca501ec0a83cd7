"""Put the formula in the place of each op of ours that the backend does not run whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Graph

from reelstep.errors import unknown
from reelstep.kernels import OPS
from reelstep.kernels.op import NAMESPACE


def decompose_ops(exported: ExportedProgram, keep: Iterable[str] = ()) -> ExportedProgram:
    """keep: names of OPS that stay one node. Raises NotFound for one that is no op of ours.

    An op that the table has not is left to the check after all passes, which no backend's graph may fail.
    """
    kept = set(keep)
    for name in sorted(kept - set(OPS)):
        raise unknown("op", name, OPS)
    formulas: dict[Any, Callable[..., Any]] = {OPS[name].overload: OPS[name].decomposition for name in ops_in(exported.graph) - kept if name in OPS}
    if not formulas:
        return exported
    decomposed: ExportedProgram = exported.run_decompositions(formulas)
    return decomposed


def ops_in(graph: Graph) -> set[str]:
    """Names of the ops of ours that a graph calls."""
    targets = {node.target for node in graph.nodes if isinstance(node.target, OpOverload)}
    return {target._schema.name.removeprefix(f"{NAMESPACE}::") for target in targets if target.namespace == NAMESPACE}
