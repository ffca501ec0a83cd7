"""Quantise the programs of a model: which layers, by measured error, and with what quality in the end.

Ranges come from real calls. If all layers together make too large an error, some stay: a layer's sensitivity is the error of its whole program with that
layer alone in few bits, and the most sensitive ones keep the plan's precision until the error with all the others is within the limit. Then whole requests,
which nothing was measured on, run through the engines that will be written and through float32 ones, and a bundle that falls short is not written.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from reelstep.compiler.backends import BACKENDS, Executable
from reelstep.compiler.graphs import dump_graph, ops_of
from reelstep.compiler.load import Progress
from reelstep.compiler.passes.decompose_ops import decompose_ops
from reelstep.compiler.passes.quantise import Counting, Grid, Quantising, Scheme, Stored, Watching, quantisable, quantise, quantise_weight
from reelstep.compiler.plan import RUN_BY, Kept, ProgramPlan, Quality, Quantised
from reelstep.compiler.program import Precision
from reelstep.compiler.skus import SKUS, Sku, is_gpu
from reelstep.compiler.write_bundle import Captured
from reelstep.errors import CompileError, ConfigError

log = logging.getLogger(__name__)

Key = tuple[str, str]
Engines = Mapping[Key, Executable]
Calls = Mapping[Key, Sequence[Mapping[str, Tensor]]]


class Rate(NamedTuple):
    """That a SKU must have for a scheme: its name among the peaks, and the numbers that it is of."""

    peak: str
    numbers: str


RATES: Mapping[Scheme, Rate] = {"fp8": Rate("float8", "E4M3"), "nvfp4": Rate("float4", "E2M1")}

COMPARED = 6
"""Calls of a program at a profile that errors are measured on, evenly out of all: each layer costs so many more. Ranges are of all."""

RANGED: tuple[Scheme, ...] = ("int8", "nvfp4")
"""Schemes that need the range of what goes into a layer, for a grid or for how far the scales of blocks reach. For the others no call is looked into."""

MULTIPLES: Mapping[Scheme, tuple[int, int]] = {"fp8": (16, 16), "nvfp4": (16, 32)}
"""Of a layer's widths, out and in, where a GPU's product takes it: both divide by 16, and in bytes of two numbers each."""


class Requests(Protocol):
    """Real requests of the model, as whoever knows its pipelines runs them. Engines are by program and profile."""

    @property
    def identity(self) -> Any:
        """JSON values that tell these requests from others."""
        ...

    def calls(self, engines: Engines) -> Calls:
        """What requests call the programs that shall be quantised with, at several steps."""

    def compare(self, reference: Engines, quantised: Engines) -> tuple[float, float, int]:
        """PSNR in dB and SSIM of other requests' results, mean over as many as the last number says."""


MOST_PSNR_DB = 100.0
"""What equal results have."""


@dataclass(frozen=True)
class Quantisation:
    """What was asked for. max_error: relative L2 of a program's outputs; min_psnr_db: of whole results, to those in float32."""

    scheme: Scheme
    max_error: float
    min_psnr_db: float
    requests: Requests

    def __post_init__(self) -> None:
        if self.scheme not in get_args(Scheme):
            raise ConfigError(f"quantisation {self.scheme!r}; one of: {', '.join(get_args(Scheme))}")
        if not 0 < self.max_error < 1:
            raise ConfigError(f"an error of {self.max_error:g} per program; above 0 and below 1")
        if not 0 < self.min_psnr_db <= MOST_PSNR_DB:
            raise ConfigError(f"a PSNR of at least {self.min_psnr_db:g} dB; above 0, and at most {MOST_PSNR_DB:g}, which is what equal results count as")

    @property
    def identity(self) -> Any:
        """JSON values that tell it from another one."""
        return [self.scheme, self.max_error, self.min_psnr_db, self.requests.identity]

    def check(self, backend: str, sku: Sku) -> None:
        """Raises ConfigError where the backend or the SKU cannot do it, and warns where it gains nothing but size."""
        if not multiplies(self.scheme, sku):
            rate = RATES[self.scheme]
            known = ", ".join(name for name, other in SKUS.items() if rate.peak in other.peak_flops)
            raise ConfigError(f"{self.scheme} on {sku.name} ({sku.arch}), which multiplies no {rate.numbers}; use {runs_there(sku)} there, or one of: {known}")
        if backend not in RUN_BY[self.scheme]:
            instead = engines_for(self.scheme, sku)
            advice = " or ".join(instead) if instead else f"null, which only plans it, or {runs_there(sku)}"
            raise ConfigError(f"{self.scheme} with backend {backend!r} on {sku.name}, which makes nothing of it; use {advice}")
        if self.scheme == "int8" and not is_gpu(sku.arch) and not sku.int8:
            log.warning("%s has no VNNI and no AMX: what is quantised to int8 runs there in float32, as right as elsewhere and no faster", sku.model)


def multiplies(scheme: Scheme, sku: Sku) -> bool:
    """Whether a SKU has products of a scheme's numbers."""
    return scheme not in RATES or RATES[scheme].peak in sku.peak_flops


def engines_for(scheme: Scheme, sku: Sku) -> list[str]:
    """Backends whose engines run a scheme on a SKU."""
    return [name for name in RUN_BY[scheme] if multiplies(scheme, sku) and BACKENDS[name].runs and BACKENDS[name].runs_on(sku.arch)]


def runs_there(sku: Sku) -> str:
    """Every scheme that some backend's engines run on a SKU, and which do."""
    found: dict[Scheme, list[str]] = {scheme: engines_for(scheme, sku) for scheme in get_args(Scheme)}
    return " or ".join(f"{scheme} ({', '.join(names)})" for scheme, names in found.items() if names)


def fits(weight: Tensor, scheme: Scheme) -> bool:
    return all(width % multiple == 0 for width, multiple in zip(weight.shape, MULTIPLES.get(scheme, (1, 1)), strict=True))


class Bench:
    """One program at one profile with the calls that it is measured on."""

    def __init__(self, item: Captured, scheme: Scheme, calls: Sequence[Mapping[str, Tensor]]) -> None:
        self.item, self.scheme = item, scheme
        self.layers = quantisable(item.exported, scheme)
        self.body: Any = item.exported.module()
        self.calls = [[call[edge.name] for edge in item.signature.inputs] for call in calls]
        count = min(len(calls), COMPARED)
        self.compared = [self.calls[round(k * (len(calls) - 1) / max(count - 1, 1))] for k in range(count)]
        with torch.no_grad():
            self.truth = [tensors_of(self.body(*call)) for call in self.compared]

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Of what goes into each layer, by what its grid is called."""
        watching = Watching(self.body, self.layers)
        with torch.no_grad():
            for call in self.calls:
                watching.run(*call)
        return watching.ranges

    def counts(self, ranges: Mapping[str, tuple[float, float]]) -> dict[str, Tensor]:
        """Of the numbers that go into each layer, in equal bins of its range."""
        counting = Counting(self.body, self.layers, ranges)
        with torch.no_grad():
            for call in self.calls:
                counting.run(*call)
        return counting.counts

    @cached_property
    def size(self) -> float:
        """Sum of squares of the outputs."""
        return sum(float(exact.double().square().sum()) for truth in self.truth for exact in truth)

    def squares(self, weights: Mapping[str, Stored], grids: Mapping[str, Grid]) -> float:
        """Sum of squares of the outputs' error with these layers in few bits."""
        runs = Quantising(self.body, self.scheme, self.layers, weights, grids)
        error = 0.0
        with torch.no_grad():
            for call, truth in zip(self.compared, self.truth, strict=True):
                for y, exact in zip(tensors_of(runs.run(*call)), truth, strict=True):
                    error += float((y.double() - exact).square().sum())
        return error


def tensors_of(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


@dataclass(frozen=True)
class Choice:
    """Which layers of a program are in few bits, and what that does to its outputs."""

    layers: tuple[str, ...]
    grids: Mapping[str, Grid]
    kept: tuple[Kept, ...]
    error: float


def choose_layers(program: str, benches: Sequence[Bench], asked: Quantisation, told: Callable[[int, int], None]) -> Choice:
    """For one program over its profiles, which share weights. Raises CompileError if no layer may be quantised within the limit, or nothing can be measured."""
    size = sum(bench.size for bench in benches)
    if not 0 < size < math.inf:  # which NaN is not either
        gives = "nothing but zeros" if size == 0 else "NaN or infinity"
        raise CompileError(f"program {program!r} cannot be quantised: in float32 it gives {gives} for the requests' own calls, so there is no error to measure")
    ranges = merged(bench.ranges() for bench in benches) if asked.scheme in RANGED else {}
    if asked.scheme == "int8":
        counts = [bench.counts(ranges) for bench in benches]
        grids = {name: Grid.of_least_error(torch.stack([each[name] for each in counts]).sum(0), *covering) for name, covering in ranges.items()}
    else:  # of NVFP4 the blocks' own scales reach down from the whole range
        grids = {name: Grid.of(*covering) for name, covering in ranges.items()}
    state = {name: bench.item.exported.state_dict.get(name) for bench in benches for name in bench.layers.values()}
    weights: dict[str, Stored] = {
        name: () if weight is None else quantise_weight(weight, asked.scheme) for name, weight in state.items() if weight is None or fits(weight, asked.scheme)
    }

    def error_of(chosen: Collection[str]) -> float:
        return math.sqrt(sum(bench.squares({name: weights[name] for name in chosen}, grids) for bench in benches) / size)

    if weights and (error := error_of(weights)) <= asked.max_error:
        return Choice(tuple(weights), grids, (), error)  # none must be kept, so none need be measured alone
    alone = {}
    for done, name in enumerate(weights):
        told(done, len(weights))
        alone[name] = error_of([name])
    ranked = sorted(weights, key=lambda name: (-alone[name], name))  # the most sensitive first
    fewest, most = 0, len(ranked)  # to keep: the error falls as more are
    while fewest < most:
        middle = (fewest + most) // 2
        if error_of(ranked[middle:]) <= asked.max_error:
            most = middle
        else:
            fewest = middle + 1
    chosen = ranked[fewest:]
    if not chosen:
        least = f"{alone[ranked[-1]]:.2g} with {ranked[-1]} alone; allow a larger --max-error" if ranked else "it has no linear layer that could be"
        raise CompileError(f"program {program!r} has no layer that {asked.scheme} leaves within an error of {asked.max_error:g}: {least}")
    kept = tuple(Kept(name, alone[name]) for name in ranked[:fewest])
    return Choice(tuple(name for name in weights if name in set(chosen)), grids, kept, error_of(chosen))


def merged(ranges: Any) -> dict[str, tuple[float, float]]:
    """The smallest ranges that cover those of every profile."""
    found: dict[str, tuple[float, float]] = {}
    for name, (low, high) in chain.from_iterable(each.items() for each in ranges):
        least, most = found.get(name, (low, high))
        found[name] = min(least, low), max(most, high)
    return found


def quantise_programs(
    captured: Sequence[Captured], drafts: Sequence[ProgramPlan], asked: Quantisation, backend: str, precision: Precision, progress: Progress
) -> tuple[tuple[Captured, ...], tuple[ProgramPlan, ...], Quality]:
    """What `capture_all` gave, with the programs that the requests call in few bits, and the quality of that.

    backend: that runs the requests, with the engines that the bundle will have if it is the plan's. Raises ConfigError for a model without weights, and
    CompileError where no layer may be quantised or the results are worse than asked.
    """
    if any(tensor.is_meta for item in captured for tensor in item.exported.state_dict.values()):
        raise ConfigError("a model on the meta device cannot be quantised: there are no weights to measure; give it weights, or compile it without --quantise")
    progress("quantise: float32 engines, for reference", 0, 1)
    reference = engines_of(captured, drafts, backend, "float32")
    progress("quantise: calls of real requests", 0, 1)
    calls = asked.requests.calls(reference)
    items = {(item.signature.program, item.signature.profile): item for item in captured}
    choices = {}
    for program in dict.fromkeys(program for program, _ in calls):
        benches = [Bench(items[key], asked.scheme, calls[key]) for key in calls if key[0] == program]
        choices[program] = choose_layers(program, benches, asked, lambda done, total, program=program: progress(f"quantise: layers of {program}", done, total))  # type: ignore[misc]
    made, plans = [], []
    for item, draft in zip(captured, drafts, strict=True):
        choice = choices.get(draft.program)
        if choice is None:
            made.append(item)
            plans.append(draft)
            continue
        exported = quantise(item.exported, item.signature, asked.scheme, choice.layers, choice.grids)
        done = Captured(item.signature, exported, dump_graph(exported))
        counted = sum(len(each) for key, each in calls.items() if key[0] == draft.program)
        record = Quantised(asked.scheme, len(choice.layers), counted, choice.error, asked.max_error, choice.kept)
        graph_hash = hashlib.sha256(done.graph).hexdigest()
        made.append(done)
        plans.append(replace(draft, graph_hash=graph_hash, ops=ops_of(exported), passes=(*draft.passes, "quantise"), quantised=record))
    progress("quantise: other requests, to compare", 0, 1)
    psnr, ssim, results = asked.requests.compare(reference, engines_of(made, plans, backend, precision))
    quality = Quality(round(psnr, 3), round(ssim, 5), results, asked.min_psnr_db, backend)
    if not psnr >= asked.min_psnr_db:  # also where it is no number
        raise CompileError(complaint(quality, plans))
    return tuple(made), tuple(plans), quality


def engines_of(captured: Sequence[Captured], drafts: Sequence[ProgramPlan], backend: str, precision: Precision) -> Engines:
    """Engines of what is not in a bundle yet, on this machine."""
    chosen, engines = BACKENDS[backend], dict[Key, Executable]()
    for item, draft in zip(captured, drafts, strict=True):
        own, key = draft.own_precision(precision), (draft.program, draft.profile)
        engines[key] = chosen.build(lambda item=item: decompose_ops(item.exported), item.signature, own, None, "")  # type: ignore[misc]
    return engines


def complaint(quality: Quality, plans: Sequence[ProgramPlan]) -> str:
    records = {plan.program: plan.quantised for plan in plans if plan.quantised}
    kept = "; ".join(
        f"{program}: {record.layers} layers in {record.scheme}, kept {', '.join(each.layer for each in record.kept) or 'none'}, error {record.error:.2g}"
        for program, record in records.items()
    )
    less = min(record.error for record in records.values()) / 2
    return (
        f"quantised, the model reaches {quality.psnr_db:.2f} dB and SSIM {quality.ssim:.4f} to float32 (mean of {quality.results} results); at least "
        f"{quality.min_psnr_db:g} dB were asked for ({kept}). Nothing was written. Keep more layers with --max-error {less:.1g}, quantise weights alone "
        "(int8-weights), or ask for less with --min-psnr"
    )
