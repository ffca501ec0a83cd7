"""How long a video takes, what it costs and whether it fits, for every way to share the work over N devices of a SKU.

A roofline: an operator takes the longer of its FLOPs at the rate that the SKU reaches and its bytes at the bandwidth that it reaches, and a start. What a SKU
reaches of its datasheet are `Corrections`: measured, published or assumed, and each says which.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import inf
from pathlib import Path
from typing import Any

from reelstep.compiler.backends import BACKENDS
from reelstep.compiler.capture import capture
from reelstep.compiler.cost import Axis, Op, Transformer, graph_ops, graph_parameters, transformer_of
from reelstep.compiler.passes.drop_unused_weights import drop_unused_weights
from reelstep.compiler.program import FLOAT_BYTES, Precision, Profile, Program
from reelstep.compiler.skus import Link, Sku
from reelstep.errors import ConfigError, StorageError
from reelstep.parallel.mesh import Mesh, divisors

GUIDED = 2
"""Rows of a guidance pair."""


@dataclass(frozen=True)
class Figure:
    """A number and where it comes from: "measured: ...", "published: ..." or "assumed: ...". Raises ConfigError for what is no number, or below 0."""

    value: float
    source: str

    def __post_init__(self) -> None:
        check_number(self.value, "a figure", or_0=True)
        if not isinstance(self.source, str):
            raise ConfigError(f"a figure's source is {self.source!r:.50}; a text")


def check_number(value: object, what: str, or_0: bool = False) -> None:
    """Raises ConfigError unless it is a finite number above 0, or 0 where that may be."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < inf or (or_0 and value == 0)):
        raise ConfigError(f"{what} is {value!r:.50}; a finite number {'of at least' if or_0 else 'above'} 0")


@dataclass(frozen=True)
class Corrections:
    """What a device reaches. Shares are of the datasheet's peak FLOP/s, memory bandwidth and link rate. Raises ConfigError for a share of 0."""

    product: Figure
    convolution: Figure
    attention: Figure
    bandwidth: Figure
    link: Figure
    op_s: Figure  # to start one operator
    call_s: Figure  # to start one network call
    message_s: Figure  # until a message between ranks begins to arrive
    reserve_bytes: Figure  # of the runtime, libraries and their workspace

    def __post_init__(self) -> None:
        for name in ("product", "convolution", "attention", "bandwidth", "link"):
            check_number(getattr(self, name).value, f"the share of {name}")


ASSUMED = Corrections(
    product=Figure(0.7, "assumed: large matrix products, at the clocks that the power limit leaves"),
    convolution=Figure(0.4, "assumed"),
    attention=Figure(0.6, "assumed"),
    bandwidth=Figure(0.8, "assumed"),
    link=Figure(0.75, "assumed: collectives of tens of megabytes"),
    op_s=Figure(3e-6, "assumed: in a captured graph of kernels"),
    call_s=Figure(100e-6, "assumed"),
    message_s=Figure(15e-6, "assumed"),
    reserve_bytes=Figure(2e9, "assumed: context, libraries, workspace"),
)
ON_AN_H100 = "measured: gpu_check on an H100, a block of movie-gen-30b at 73,728 tokens (benchmarks/results/gpu_h100.json)"
ON_AN_A100 = "published: FlashAttention-2, up to 73 % of an A100's peak forward (Dao 2023, arXiv:2307.08691)"
BY_ARCH: Mapping[str, Corrections] = {
    "sm80": replace(ASSUMED, attention=Figure(0.73, ON_AN_A100)),
    "sm90": replace(ASSUMED, product=Figure(0.72, ON_AN_H100), attention=Figure(0.63, ON_AN_H100), bandwidth=Figure(0.9, ON_AN_H100)),
}
"""In 16 bits. FlashAttention-3 reaches 0.75 of an H100's peak by its authors (Shah et al. 2024, arXiv:2407.08608); cuDNN's, which `auto` takes without it,
what was measured.
"""


@dataclass(frozen=True)
class Device:
    """A SKU with all its rates, and what it reaches of them at some precisions."""

    sku: Sku
    corrections: Mapping[Precision, Corrections]

    def to_json(self) -> dict[str, Any]:
        """The file of `read_device`."""
        rates = {"peak_flops": dict(self.sku.peak_flops), "bandwidth_bytes_per_s": self.sku.bandwidth_bytes_per_s}
        return {"sku": self.sku.name, "machine": self.sku.model, **rates, "corrections": {p: asdict(c) for p, c in self.corrections.items()}}


def device_of(sku: Sku) -> Device:
    """From the datasheet and what is measured, published and assumed. Raises ConfigError for a SKU without a datasheet: a CPU has to be measured."""
    if not sku.peak_flops or sku.bandwidth_bytes_per_s is None:
        raise ConfigError(
            f"no peaks of SKU {sku.name!r} are known; `reelstep bench planner --corrections {sku.name}.json` measures them here, then plan with the same option"
        )
    known: dict[Precision, Corrections] = {"float32": ASSUMED, "bfloat16": BY_ARCH.get(sku.arch, ASSUMED)}
    return Device(sku, {precision: known[precision] for precision in FLOAT_BYTES if precision in sku.peak_flops})


def read_device(path: Path, sku: Sku) -> Device:
    """What `reelstep bench planner` measured. Raises ConfigError for another file or SKU, and for rates that are no numbers above 0."""
    again = "`reelstep bench planner --corrections NEWFILE` writes"
    try:
        data = json.loads(path.read_bytes(), parse_int=float)  # so that what is too long for one is infinite
        measured_on, peaks, bandwidth = data["sku"], data["peak_flops"], data["bandwidth_bytes_per_s"]
        for what, rate in (*((f"the peak in {dtype}", rate) for dtype, rate in peaks.items()), ("bandwidth_bytes_per_s", bandwidth)):
            check_number(rate, what)
        known = {p: Corrections(**{f.name: Figure(**data["corrections"][p][f.name]) for f in fields(Corrections)}) for p in data["corrections"]}
        if lacks := [precision for precision in known if precision not in peaks]:
            raise ConfigError(f"no peak in {', '.join(lacks)}, of which there are corrections")
        measured = replace(sku, peak_flops=peaks, bandwidth_bytes_per_s=bandwidth, source=f"measured: {path}, {data['machine']}")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; `reelstep bench planner --corrections {path}` writes it") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:  # the first would print the whole file
        raise ConfigError(f"{path} is not a JSON file of corrections; {again} one") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # JSON of another shape than ours
        raise ConfigError(f"{path} does not hold corrections ({type(error).__name__}: {str(error)[:200]}); {again} them") from error
    if measured_on != sku.name:
        raise ConfigError(f"{path} was measured on {measured_on!r} and the plan is for {sku.name!r}; measure there, or leave --corrections out")
    return Device(measured, {precision: known[precision] for precision in FLOAT_BYTES if precision in known})


@dataclass(frozen=True)
class Stage:
    """A program beside the denoiser. It runs on rank 0 alone."""

    name: str
    calls: int  # of one video
    ops: tuple[Op, ...]  # of one call
    parameters: int
    keep_f32: bool

    @property
    def working_elements(self) -> float:
        """Of its largest operator: the least that it needs at once."""
        return max((op.elements for op in self.ops), default=0.0)


@dataclass(frozen=True)
class Workload:
    """What one video asks of a model. video: its sizes, in words."""

    model: str
    video: str
    denoiser: Transformer
    parameters: int  # of the denoiser
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Sampling:
    """A solver and its evaluations. A velocity under guidance is two forwards; `forwards` - `nfe` of them are such pairs."""

    solver: str
    nfe: int
    forwards: float
    quality: str  # what is known of it

    def __post_init__(self) -> None:
        if not (self.nfe >= 1 and self.nfe <= self.forwards <= GUIDED * self.nfe):
            raise ConfigError(f"{self.solver!r}: NFE {self.nfe} and {self.forwards:g} forwards; at least 1, and a velocity takes one or two forwards")

    @property
    def pairs(self) -> float:
        return self.forwards - self.nfe


BOUNDS = ("compute", "bandwidth", "link", "start")


@dataclass(frozen=True)
class Spent:
    """Seconds by what bounds them: FLOPs, bytes of memory, bytes between ranks, and starting operators, calls and messages."""

    compute: float = 0.0
    bandwidth: float = 0.0
    link: float = 0.0
    start: float = 0.0

    @property
    def total(self) -> float:
        return self.compute + self.bandwidth + self.link + self.start

    @property
    def bound(self) -> str:
        """What takes the most."""
        return max(BOUNDS, key=lambda name: float(getattr(self, name)))

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(getattr(self, name) + getattr(other, name) for name in BOUNDS))

    def __mul__(self, factor: float) -> Spent:
        return Spent(*(getattr(self, name) * factor for name in BOUNDS))


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that holds the most."""

    weights: float
    activations: float
    checkpoints: float  # a sampler's state: x[0], x and, at worst, all velocities, float32
    reserve: float

    @property
    def total(self) -> float:
        return self.weights + self.activations + self.checkpoints + self.reserve


@dataclass(frozen=True)
class Choice:
    """One way to make a video."""

    mesh: Mesh
    precision: Precision
    sampling: Sampling
    rows: int  # of a guidance pair in one call of one rank
    spent: Spent
    memory: Memory

    @property
    def latency_s(self) -> float:
        return self.spent.total

    @property
    def device_s(self) -> float:
        """Devices times seconds: what is paid for."""
        return self.mesh.world * self.latency_s


@dataclass(frozen=True)
class Dropped:
    """What was not ranked, and why."""

    what: str
    reason: str


@dataclass(frozen=True)
class Ranking:
    """Choices, the best first."""

    workload: Workload
    device: Device
    devices: int
    deadline_s: float | None
    choices: tuple[Choice, ...]
    dropped: tuple[Dropped, ...]


def spent_on(ops: Sequence[Op], device: Device, precision: Precision) -> Spent:
    """Seconds of operators, one after another."""
    reached = device.corrections[precision]
    shares = {"product": reached.product, "convolution": reached.convolution, "attention": reached.attention}
    bandwidth = (device.sku.bandwidth_bytes_per_s or inf) * reached.bandwidth.value
    found = Spent()
    for op in ops:
        moved = op.elements * _moved_bytes(op, precision) / bandwidth
        computed = op.flops / (device.sku.peak_flops[precision] * shares[op.kind].value) if op.flops else 0.0
        found += Spent(compute=computed if computed >= moved else 0.0, bandwidth=moved if moved > computed else 0.0, start=reached.op_s.value) * op.count
    return found


def _moved_bytes(op: Op, precision: Precision) -> float:
    """Of an element. Between products about half of what is read and written is the residual stream, which stays in float32."""
    return (4 + FLOAT_BYTES[precision]) / 2 if op.kind == "pointwise" else FLOAT_BYTES[precision]


def spent_on_call(transformer: Transformer, rows: int, mesh: Mesh, device: Device, precision: Precision) -> Spent:
    """Seconds of one network call, in which each rank has `rows` rows. Raises ConfigError where the mesh needs a link that the SKU has not.

    A ring sends its next block while it computes on this one, so only what takes longer than that attention is counted; nothing else overlaps (assumed).
    """
    reached = device.corrections[precision]
    ops = transformer.ops(rows, mesh)
    found = spent_on(ops, device, precision) + Spent(start=reached.call_s.value)
    block = next(op for op in ops if op.kind == "attention")  # to itself: of one layer, of one block of keys on the ring
    hidden = spent_on([replace(block, count=transformer.layers * (mesh.ring - 1))], device, precision).total
    for transfer in transformer.transfers(rows, mesh, FLOAT_BYTES[precision]):
        seconds = transfer.bytes / (link_of(transfer.axis, mesh, device.sku).bytes_per_s * reached.link.value)
        found += Spent(link=max(0.0, seconds - hidden) if transfer.axis == "ring" else seconds, start=transfer.rounds * reached.message_s.value)
    return found


def link_of(axis: Axis, mesh: Mesh, sku: Sku) -> Link:
    """What an axis goes over. Ranks are numbered with tp innermost, then ulysses, ring and cfg, so that what talks most sits closest.

    Where a mesh is larger than a machine, groups of a number that does not divide a machine's lie across its end: of 12 ranks at 8, the second 6 do.
    """
    spans = {"tp": mesh.tp, "ulysses": mesh.tp * mesh.ulysses, "ring": mesh.tp * mesh.cp, "state": mesh.world}
    if sku.devices is None or mesh.world <= sku.devices or sku.devices % spans[axis] == 0:
        link, where = sku.link, "within a machine"
    else:
        link, where = sku.network, f"between machines of {sku.devices}"
    if link is None:
        raise ConfigError(f"{axis} of {spans[axis]} ranks needs a link {where}, and none is known of {sku.name}")
    return link


def run_by(mesh: Mesh, arch: str) -> list[str]:
    """The backends that run a mesh's ranks on an arch."""
    able = [(name, backend) for name, backend in BACKENDS.items() if backend.runs and backend.runs_on(arch)]
    return [name for name, backend in able if mesh.world == 1 or backend.refuses(mesh, arch) is None]


def check_shares(transformer: Transformer, mesh: Mesh) -> None:
    """Raises ConfigError where heads, tokens or matrices do not divide."""
    parts = mesh.ulysses * mesh.tp
    if parts > transformer.heads:
        raise ConfigError(f"ulysses x tp = {parts} is more than the {transformer.heads} heads; use ring for the rest")
    if transformer.heads % parts:
        raise ConfigError(f"{transformer.heads} heads do not divide by ulysses x tp = {parts}; some ranks would wait for others")
    if transformer.tokens % mesh.cp:
        raise ConfigError(f"{transformer.tokens} tokens do not divide by cp={mesh.cp}; choose a size that does, or another cp")
    if transformer.ffn % mesh.tp:
        raise ConfigError(f"feed-forward of {transformer.ffn} does not divide by tp={mesh.tp}")


def memory_of(workload: Workload, sampling: Sampling, rows: int, mesh: Mesh, device: Device, precision: Precision) -> Memory:
    """Of rank 0, which holds the other programs and the sampler's state too."""
    size, denoiser = FLOAT_BYTES[precision], workload.denoiser
    kept = {stage.name: 4 if stage.keep_f32 else size for stage in workload.stages}
    denoising = denoiser.activation_bytes(rows, mesh, size)
    latent = 4 * denoiser.tokens * denoiser.values_out
    return Memory(
        weights=(denoiser.block_parameters / mesh.tp + workload.parameters - denoiser.block_parameters) * size
        + sum(stage.parameters * kept[stage.name] for stage in workload.stages),
        activations=max(denoising, *(stage.working_elements * kept[stage.name] for stage in workload.stages), 0.0),
        checkpoints=(2 + sampling.nfe) * latent,
        reserve=device.corrections[precision].reserve_bytes.value,
    )


def meshes(devices: int) -> list[Mesh]:
    """All of so many ranks, or of a number that divides it: the rest serve other videos."""
    found = []
    for ranks in divisors(devices):
        for cfg in (n for n in (1, GUIDED) if ranks % n == 0):
            for tp in divisors(ranks // cfg):
                cp = ranks // cfg // tp
                found += [Mesh(cfg, cp, tp, cp // ulysses) for ulysses in divisors(cp)]
    return found


def rank(
    workload: Workload, device: Device, *, devices: int, samplings: Sequence[Sampling], precisions: Sequence[Precision], deadline_s: float | None = None
) -> Ranking:
    """Every mesh, precision and sampling that fits, the best first: most forwards, then least latency; with a deadline, of what meets it, then least
    device seconds. Raises ConfigError if nothing fits, or nothing meets the deadline: the error says the best that there is.
    """
    if devices < 1:
        raise ConfigError(f"{devices} devices; at least 1")
    choices: list[Choice] = []
    dropped: list[Dropped] = []
    for precision in precisions:
        if precision not in device.corrections:
            dropped.append(Dropped(f"precision {precision}", f"no rates of {device.sku.name} at it are known"))
            continue
        for mesh in meshes(devices):
            for sampling in samplings:
                try:
                    choices.append(_choose(workload, sampling, mesh, device, precision))
                except ConfigError as error:
                    dropped.append(Dropped(f"{sampling.nfe} NFE in {precision} on {mesh}", str(error)))
    dropped = list(dict.fromkeys(dropped))
    if not choices:
        last = dropped[-1]  # on most ranks
        raise ConfigError(
            f"{workload.model} fits {devices} x {device.sku.name} in no way ({len(dropped)} tried, such as {last.what}: {last.reason}); use more devices, or "
            "ones with more memory"
        )
    if deadline_s is None:
        return Ranking(workload, device, devices, None, tuple(sorted(choices, key=lambda c: (-c.sampling.forwards, c.latency_s))), tuple(dropped))
    late = [c for c in choices if c.latency_s > deadline_s]
    timely = sorted((c for c in choices if c.latency_s <= deadline_s), key=lambda c: (-c.sampling.forwards, c.device_s))
    if not timely:
        best = min(late, key=lambda c: c.latency_s)
        raise ConfigError(
            f"{workload.model} cannot be made in {deadline_s:g} s on {devices} x {device.sku.name}; the best possible is {best.latency_s:.3g} s, with "
            f"{best.sampling.solver} of {best.sampling.nfe} NFE in {best.precision} on {best.mesh}; allow that, fewer NFE, a smaller size or more "
            "devices"
        )
    past = f"past the deadline of {deadline_s:g} s"
    dropped += [Dropped(f"{c.latency_s:.3g} s for {c.sampling.nfe} NFE of {c.sampling.solver} in {c.precision} on {c.mesh}", past) for c in late]
    return Ranking(workload, device, devices, deadline_s, tuple(timely), tuple(dropped))


def _choose(workload: Workload, sampling: Sampling, mesh: Mesh, device: Device, precision: Precision) -> Choice:
    """Raises ConfigError with the reason to drop it."""
    check_shares(workload.denoiser, mesh)
    if mesh.cfg > 1 and not sampling.pairs:
        raise ConfigError(f"{sampling.solver} has no guidance pair to share over cfg={mesh.cfg}")
    together = 1 if mesh.cfg > 1 or not sampling.pairs else GUIDED
    available = device.sku.memory_bytes
    for rows in range(together, 0, -1):  # a pair that does not fit in one call runs in two
        memory = memory_of(workload, sampling, rows, mesh, device, precision)
        if memory.total <= available:
            break
    else:
        raise ConfigError(
            f"{memory.total / 1e9:.1f} GB do not fit {available / 1e9:.0f} GB: weights {memory.weights / 1e9:.1f}, activations {memory.activations / 1e9:.1f}, "
            f"checkpoints {memory.checkpoints / 1e9:.1f}, reserve {memory.reserve / 1e9:.1f}"
        )
    single = spent_on_call(workload.denoiser, 1, mesh, device, precision)
    pair = spent_on_call(workload.denoiser, rows, mesh, device, precision) * (together / rows)
    spent = pair * sampling.pairs + single * (sampling.nfe - sampling.pairs)
    for stage in workload.stages:
        at: Precision = "float32" if stage.keep_f32 and "float32" in device.corrections else precision
        spent += (spent_on(stage.ops, device, at) + Spent(start=device.corrections[at].call_s.value)) * stage.calls
    return Choice(mesh, precision, sampling, rows, spent, memory)


def workload_of(
    model: str, video: str, programs: Sequence[Program], sizes: Mapping[str, Mapping[str, int]], calls: Mapping[str, int]
) -> Workload:  # fmt: skip
    """From a model's programs at the sizes of one row, by program. calls: of one video; what is not named there does not run. Nothing is computed.

    Raises ConfigError for a model without `denoise` and sizes it does not take, CompileError for what cannot be exported and a denoiser that is no transformer.
    """
    named = {program.name: program for program in programs}
    if "denoise" not in named:
        raise ConfigError(f"{model} has the programs {', '.join(named)}; a plan is made for one with `denoise`")
    wanted = ("denoise", *(name for name in named if name in calls))
    graphs = {name: drop_unused_weights(capture(named[name], Profile("asked", sizes[name], 2 * GUIDED))) for name in wanted}
    stages = tuple(Stage(name, calls[name], graph_ops(graph), graph_parameters(graph), named[name].keep_f32) for name, graph in graphs.items() if name in calls)
    return Workload(model, video, transformer_of(graphs["denoise"]), graph_parameters(graphs["denoise"]), stages)


EXPECTED = ("encode_text", "decode")
"""Programs that a video needs; a model that lacks them is planned without, and the plan says so."""


def explain(ranking: Ranking, top: int, price: float | None = None) -> str:
    """The plan for people. price: of one device for an hour, in any currency."""
    workload, sku = ranking.workload, ranking.device.sku
    transformer = workload.denoiser
    absent = [name for name in EXPECTED if name not in {stage.name for stage in workload.stages}]
    beside = ", ".join(f"{stage.name} x {stage.calls}" for stage in workload.stages) or "none"
    lines = [
        f"{workload.model} on {ranking.devices} x {sku.name} ({sku.model}, {sku.arch})"
        + (f", in at most {ranking.deadline_s:g} s" if ranking.deadline_s is not None else ""),
        f"a video of {workload.video}",
        f"denoiser: {transformer.tokens:,} tokens, {transformer.text_tokens:,} of text, {transformer.flops():.4g} FLOPs a forward, "
        f"{workload.parameters:,} parameters",
        f"beside it, on rank 0: {beside}" + (f"; not in this model, so not counted: {', '.join(absent)}" if absent else ""),
        "",
    ]
    paid = ["price"] if price is not None else []
    head = ["", "latency", "GPU-s", *paid, "NFE", "forwards", "solver", "precision", "mesh", "run by", "GB of each", "bound by", "quality"]
    rows = [_cells(i, choice, sku.arch, price) for i, choice in enumerate(ranking.choices[:top], 1)]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
    if any(not run_by(choice.mesh, sku.arch) for choice in ranking.choices[:top]):
        lines.append("none yet: no backend runs such ranks; `reelstep compile --mesh ... --backend null` says what they would run")
    if len(ranking.choices) > top:
        lines.append(f"and {len(ranking.choices) - top} more that fit")
    return "\n".join([*lines, "", *_why_dropped(ranking.dropped, top), "", *_grounds(ranking.device, {c.precision for c in ranking.choices})]) + "\n"


def _cells(place: int, choice: Choice, arch: str, price: float | None) -> list[str]:
    sampling, spent = choice.sampling, choice.spent
    split = " + ".join(f"{getattr(spent, name) / spent.total:.0%} {name}" for name in BOUNDS if getattr(spent, name) >= 0.01 * spent.total)
    paid = [f"{choice.device_s / 3600 * price:.4g}"] if price is not None else []
    pair = " (a pair in two calls)" if sampling.pairs and choice.mesh.cfg == 1 and choice.rows == 1 else ""
    return [
        str(place), f"{choice.latency_s:.4g} s", f"{choice.device_s:.4g}", *paid, str(sampling.nfe), f"{sampling.forwards:g}", sampling.solver,
        choice.precision, f"{choice.mesh}{pair}", ", ".join(run_by(choice.mesh, arch)) or "none yet", f"{choice.memory.total / 1e9:.1f}",
        f"{spent.bound}: {split}", sampling.quality,
    ]  # fmt: skip


def _why_dropped(dropped: Sequence[Dropped], top: int) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for one in dropped:
        reasons.setdefault(one.reason, []).append(one.what)
    lines = [f"  {reason}: {whats[0]}" + (f" and {len(whats) - 1} more" if len(whats) > 1 else "") for reason, whats in reasons.items()]
    more = [f"  and {len(lines) - top} reasons more; --json has all"] if len(lines) > top else []
    return [f"dropped {len(dropped)}:", *lines[:top], *more] if lines else ["dropped none"]


def _grounds(device: Device, precisions: set[Precision]) -> list[str]:
    """Every number that the prediction stands on."""
    lines = [f"rates of {device.sku.name}: {device.sku.source}"]
    for chosen in dict.fromkeys(device.corrections[p] for p in FLOAT_BYTES if p in precisions):
        names = ", ".join(p for p in FLOAT_BYTES if p in precisions and device.corrections[p] == chosen)
        lines.append(f"of which it reaches in {names}:")
        lines += [f"  {f.name} {getattr(chosen, f.name).value:.4g}  {getattr(chosen, f.name).source}" for f in fields(Corrections)]
    return [*lines, *(f"assumed: {text}" for text in MODEL_ASSUMPTIONS)]


MODEL_ASSUMPTIONS = (
    "a ring's transfers hide behind its attention; all-to-all and all-reduce hide behind nothing",
    "a rank's programs run one after another, and what lies between products is one pass over memory",
    "without a stated number of devices in a machine, all are in one",
)


def to_json(ranking: Ranking, price: float | None = None) -> dict[str, Any]:
    """All choices and all that was dropped, as plain values."""
    choices = [
        {
            **asdict(choice),
            "latency_s": choice.latency_s,
            "device_s": choice.device_s,
            "bound": choice.spent.bound,
            "run_by": run_by(choice.mesh, ranking.device.sku.arch),
            "memory_bytes": choice.memory.total,
            "price": None if price is None else choice.device_s / 3600 * price,
        }
        for choice in ranking.choices
    ]
    return {
        "model": ranking.workload.model,
        "video": ranking.workload.video,
        "denoiser": asdict(ranking.workload.denoiser),
        "flops": ranking.workload.denoiser.flops(),
        "parameters": ranking.workload.parameters,
        "stages": [{"name": stage.name, "calls": stage.calls, "parameters": stage.parameters} for stage in ranking.workload.stages],
        "devices": ranking.devices,
        "deadline_s": ranking.deadline_s,
        "rates": {**ranking.device.to_json(), "source": ranking.device.sku.source},
        "assumed": list(MODEL_ASSUMPTIONS),
        "choices": choices,
        "dropped": [asdict(one) for one in ranking.dropped],
    }


PLOTS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raises ConfigError for what `plot` could not write: another suffix, a folder that is not there."""
    if path.suffix not in PLOTS:
        raise ConfigError(f"a plot {str(path)!r}; its name ends in one of {', '.join(PLOTS)}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"a plot {str(path)!r}, and there is no folder {path.parent}; make it, or choose another")


def plot(ranking: Ranking, top: int, path: Path) -> None:
    """Where the time goes in the best choices, as bars. Raises ConfigError where matplotlib is missing, StorageError where the file cannot be written."""
    try:
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise ConfigError("a plot needs matplotlib; pip install 'reelstep[bench]', or leave --plot out") from error
    chosen = ranking.choices[:top]
    canvas = Canvas(figsize=(10, 1.6 + 0.35 * len(chosen)), layout="constrained")
    axes = canvas.add_subplot()
    names = [f"{c.mesh}, {c.precision}, {c.sampling.solver} {c.sampling.nfe} NFE" for c in chosen]
    left = [0.0] * len(chosen)
    for bound in BOUNDS:
        widths = [float(getattr(c.spent, bound)) for c in chosen]
        axes.barh(range(len(chosen)), widths, left=left, label=bound)
        left = [at + width for at, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(chosen)), names)
    axes.invert_yaxis()
    axes.set_xlabel("predicted seconds of one video")
    axes.set_title(f"{ranking.workload.model} on {ranking.devices} x {ranking.device.sku.name}")
    canvas.legend(loc="outside lower center", ncols=len(BOUNDS))
    try:
        canvas.savefig(path)
    except (OSError, ValueError) as error:  # ValueError: a suffix it does not know
        raise StorageError(f"cannot write {path}: {error}") from error
