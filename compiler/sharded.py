"""The plan of a mesh: what each rank runs, holds and sends, found by one process that holds no weights.

A rank's part of a module is cut on the meta device and captured over links that carry nothing. Ranks whose shares have the same sizes run the same
operators on the same shapes and differ in where their slices begin, so that one of them is captured for all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode

from reelstep.compiler.compile import capture_all
from reelstep.compiler.cost import shape_of
from reelstep.compiler.graphs import element_bytes, weights_of
from reelstep.compiler.load import Progress, silent
from reelstep.compiler.lora import Layout, adapted_too
from reelstep.compiler.part import Part
from reelstep.compiler.passes.split_at_collectives import COLLECTIVES, RING
from reelstep.compiler.plan import ProgramPlan, RankPlan, Sent
from reelstep.compiler.program import FLOAT_BYTES, Precision, Program
from reelstep.compiler.signature import Signature
from reelstep.compiler.write_bundle import Captured
from reelstep.errors import ConfigError
from reelstep.parallel.collectives import GROUP, Communicator, c10d
from reelstep.parallel.context import Attended
from reelstep.parallel.mesh import Axis, Mesh, divisors, shares
from reelstep.parallel.pretend import pretended_rank
from reelstep.parallel.rules import RULES, matching
from reelstep.parallel.shard import counts_of, layer_at, shard

Lengths = frozenset[tuple[int, ...]]
"""Of every sequence that lies on several ranks: how much of it each rank along `cp` has."""


def plan_ranks(
    parts: Sequence[Part], mesh: Mesh, precision: Precision, keep: Iterable[str] = (), progress: Progress = silent, lora: Layout | None = None
) -> tuple[RankPlan, ...]:  # fmt: skip
    """The ranks of a mesh in groups that run alike, the one of rank 0 first. keep: as for `capture_all`. lora: of a program beside `denoise`.

    Raises ConfigError for a mesh that is too large for a part or a process that is a rank already, CompileError for what cannot be captured.
    """
    plans: dict[Hashable, RankPlan] = {}
    lengths: Lengths | None = None
    for rank in range(mesh.world):
        with pretended_rank(mesh, rank) as comm:
            programs = rank_programs(parts, comm, lora)
            capture = partial(_capture, programs, comm, precision, tuple(keep), progress)
            first = None
            if lengths is None:
                first, lengths = capture()
            key = (*(_counts(part, comm) for part in parts), *_shapes(programs), *_places(lengths, comm))
            if key in plans:
                plans[key] = replace(plans[key], ranks=(*plans[key].ranks, rank))
            else:
                plans[key] = first or capture()[0]
    return tuple(plans.values())


def rank_programs(parts: Sequence[Part], comm: Communicator, lora: Layout | None = None) -> tuple[Program, ...]:
    """What is captured on a rank: its programs, with empty weights, at its profiles. Raises ConfigError for a mesh that is too large for a part."""
    modules = [shard(_empty(part), RULES[part.rules], comm, None) for part in parts]
    found = [adapted_too(part.programs_of(module), partial(layer_at, module), lora) for part, module in zip(parts, modules, strict=True)]
    return tuple(replace(each, profiles=tuple(profile.on_rank(comm.mesh) for profile in each.profiles)) for programs in found for each in programs)


class _Even(TorchDispatchMode):
    """Inside, an all-to-all of different sizes is a ConfigError that names the backend."""

    def __init__(self, backend: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has not typed it
        self.backend = backend

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is c10d.all_to_all_single.default and len(sizes := dict.fromkeys((*args[1], *args[2]))) > 1:
            raise ConfigError(
                f"ranks would exchange uneven shares, of {' and '.join(f'{size:,}' for size in sizes)} values, and backend {self.backend!r} exchanges even "
                "ones; take a cp that divides the tokens and each rank's heads, or tp in its place"
            )
        return func(*args, **(kwargs or {}))


def check_even(parts: Sequence[Part], mesh: Mesh, backend: str) -> None:
    """Raises ConfigError, naming the program, unless a rank of a mesh that `check_part` takes sends as much to every other.

    The first and the last rank call their programs without values, which takes seconds where a capture takes a minute: shares are largest on one and
    smallest on the other.
    """
    for rank in (0, mesh.world - 1):
        with pretended_rank(mesh, rank) as comm:
            for program in rank_programs(parts, comm):
                for profile in program.profiles:
                    inputs = [edge.zeros(1, "meta") for edge in Signature.of(program, profile).inputs]
                    try:
                        with torch.device("meta"), torch.no_grad(), _Even(backend):
                            program.module(*inputs)
                    except ConfigError as error:
                        raise ConfigError(f"program {program.name!r} at profile {profile.name!r} on mesh {mesh}: {error}") from error


def check_part(part: Part, mesh: Mesh, model: str) -> None:
    """Raises ConfigError where ranks along tp, or the Ulysses ranks of cp with the heads that tp leaves to one, outnumber what they would share."""
    rules, module = RULES[part.rules], part.empty()
    exchanged = [path for path, rule in rules.attention.items() if rule.exchange == "context" and "cp" in {rules.axes[a] for a in rule.keys}]
    attending = set(matching(dict.fromkeys(exchanged, True), [path for path, _ in module.named_modules()]))
    for counted, (logical, count) in counts_of(module, rules).items():
        axis = rules.axes[logical]
        own = min(shares(count, mesh.size(axis), f"{logical} of {model!r} on mesh {mesh}")) if axis else count
        if counted.rpartition(".")[0] in attending and own < mesh.ulysses:
            ring = next(r for r in divisors(mesh.cp) if mesh.cp // r <= own)
            text = f"mesh {mesh} leaves {own} of the {count} {logical} of {model!r} to {mesh.ulysses} ranks of cp, which need at least 1 each"
            raise ConfigError(f"{text}; use ring={ring}, by which fewer ranks share {logical}, or less of cp or tp")


def _empty(part: Part) -> nn.Module:
    """On the meta device with its buffers: an export wants all on one."""
    with torch.device("meta"):
        return part.empty()


def _capture(
    programs: Sequence[Program], comm: Communicator, precision: Precision, keep: tuple[str, ...], progress: Progress
) -> tuple[RankPlan, Lengths]:  # fmt: skip
    """What the rank of `comm` runs, and the lengths of sequences that its graphs were split by."""
    pairs = [(program, profile) for program in programs for profile in program.profiles]
    found: list[ProgramPlan] = []
    held: dict[tuple[Hashable, int], Tensor] = {}
    lengths: Lengths = frozenset()
    for done, (program, profile) in enumerate(pairs):
        progress(f"rank {comm.rank} of mesh {comm.mesh}: capture {program.name} {profile.name}", done, len(pairs))
        ((item,), (draft,)) = capture_all([replace(program, profiles=(profile,))], keep=keep)
        own = draft.own_precision(precision)
        found.append(replace(draft, precision=own, sent=_sent(item.exported, comm)))
        held |= _weights(item, own)
        lengths |= _lengths(program)
    return RankPlan((comm.rank,), sum(x.numel() * size for (_, size), x in held.items()), tuple(found)), lengths


def _weights(item: Captured, precision: Precision) -> dict[tuple[Hashable, int], Tensor]:
    """The tensors that a graph reads, by what makes one the same as another graph's, and the bytes of an element."""
    tensors = weights_of(item.exported).values()
    sizes = [(x, element_bytes(x, FLOAT_BYTES[precision])) for x in tensors]
    return {((x.untyped_storage()._cdata, x.storage_offset(), x.shape), size): x for x, size in sizes}


def _sent(exported: ExportedProgram, comm: Communicator) -> tuple[Sent, ...]:
    """The collectives of a call with one row, run on tensors without values, so that the communicator counts what it would send."""
    calls: Counter[tuple[str, Axis]] = Counter()
    comm.sent.clear()
    for node in exported.graph.nodes:
        if node.target in COLLECTIVES:
            args: list[Any] = [torch.empty(shape_of(x, 1), dtype=x.meta["val"].dtype, device="meta") if isinstance(x, Node) else x for x in node.args]
            key = node.target._schema.name.split("::")[1], args[-1].removeprefix(GROUP)
            calls[key] += 1
            if node.target is RING:  # its shifts are inside of it
                comm.sent[key] += _ring_bytes(args[1], args[2], args[4], comm)
            else:
                comm.run(node.target, tuple(args))
    return tuple(Sent(op, axis, count, comm.sent[op, axis]) for (op, axis), count in sorted(calls.items()))


def _ring_bytes(k: Tensor, v: Tensor, lengths: Sequence[int], comm: Communicator) -> int:
    """Of keys and values of every stage but the next, which is where they end. k, v: of this rank's stage."""
    token_bytes = sum(x.numel() // x.shape[2] * x.element_size() for x in (k, v))
    return token_bytes * (sum(lengths) - lengths[(comm.at["ring"] + 1) % len(lengths)])


def _counts(part: Part, comm: Communicator) -> Hashable:
    """This rank's heads and other units of a part, and whether it has one more of them than others of its Ulysses group."""
    own, rules = [], RULES[part.rules]
    for logical, count in counts_of(_empty(part), rules).values():
        axis = rules.axes[logical]
        own.append(shares(count, comm.size(axis), logical)[comm.at[axis]] if axis else count)
    return tuple((n, n % comm.mesh.ulysses > comm.at["ulysses"]) for n in own)


def _shapes(programs: Sequence[Program]) -> list[Hashable]:
    return [(name, tuple(tensor.shape)) for program in programs for name, tensor in program.module.state_dict().items()]


def _lengths(program: Program) -> Lengths:
    attended = [layer for layer in program.module.modules() if isinstance(layer, Attended)]
    return frozenset(sizes for layer in attended for axes in (layer.rule.queries, layer.rule.keys) if (sizes := layer.lengths(axes)))


def _places(lengths: Lengths, comm: Communicator) -> Iterator[Hashable]:
    """This rank's part of each sequence, its ring stage's, and how long the next stage's is."""
    for sizes in sorted(lengths):
        stages = [sizes[i : i + comm.mesh.ulysses] for i in range(0, comm.mesh.cp, comm.mesh.ulysses)]
        place = comm.at["ring"]
        yield sizes[comm.at["cp"]], stages[place], sum(stages[(place + 1) % len(stages)])
