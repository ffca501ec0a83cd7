"""A plan: every choice that turns a model into engines, as values that print, compare and save."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from reelstep.compiler.program import Precision
from reelstep.errors import BundleError
from reelstep.parallel.mesh import in_words


def canonical_json(data: Any, indent: int | None = 1) -> bytes:
    """The one spelling of `data`: sorted keys, a final newline. Raises ValueError for NaN and infinities."""
    separators = (",", ": ") if indent else (",", ":")
    return (json.dumps(data, sort_keys=True, indent=indent, separators=separators, ensure_ascii=False, allow_nan=False) + "\n").encode()


RUN_BY: Mapping[str, tuple[str, ...]] = {
    "int8": ("openvino", "eager", "null"),
    "int8-weights": ("openvino", "inductor", "eager", "null"),
    "fp8": ("inductor", "null"),
    "nvfp4": ("null",),
}
"""Backends that make something of a scheme; eager is to look closer at it, and null to plan it. TensorRT has no product with a step for each row."""


@dataclass(frozen=True)
class Kept:
    """A layer that was not quantised, by its weight. error: relative L2 of the program's outputs, had it been the only one that was."""

    layer: str
    error: float


@dataclass(frozen=True)
class Quantised:
    """Of one program over its profiles. error: relative L2 of the outputs on the calls that it was measured on."""

    scheme: str
    layers: int  # in few bits
    calls: int
    error: float
    max_error: float  # what was allowed
    kept: tuple[Kept, ...]  # the most sensitive first

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | None) -> Quantised | None:
        return None if data is None else cls(**{**data, "kept": tuple(Kept(**each) for each in data["kept"])})

    def explain(self) -> list[str]:
        text = f"error {self.error:.2g} of {self.max_error:g} allowed, on {self.calls} calls of real requests"
        lines = [f"  quantised {self.scheme}: {self.layers} of {self.layers + len(self.kept)} layers; {text}"]
        return lines + [f"    kept {each.layer}: alone an error of {each.error:.2g}" for each in self.kept]


@dataclass(frozen=True)
class Quality:
    """Of whole results of the quantised model, beside float32 ones from the same noise, for requests that nothing was measured on."""

    psnr_db: float
    ssim: float
    results: int
    min_psnr_db: float  # below which nothing would have been written
    backend: str  # that ran them

    def __str__(self) -> str:
        measured = f"{self.psnr_db:.2f} dB, SSIM {self.ssim:.4f} to float32"
        return f"{measured}, mean of {self.results} results by {self.backend}; at least {self.min_psnr_db:g} dB asked"


@dataclass(frozen=True)
class Sent:
    """What one rank sends by equal collectives in a call of one row, in the graph's float32: half of it where a backend makes them bfloat16."""

    op: str
    axis: str
    calls: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.bytes:,} bytes by {self.calls} {self.op} over {self.axis}"


@dataclass(frozen=True)
class KernelPlan:
    """What a kernel of a kept op uses on the plan's arch, at the types and constants that it is compiled ahead for."""

    op: str
    kernel: str
    warps: int
    stages: int
    registers: int  # a thread
    spilled_bytes: int  # a thread
    shared_bytes: int  # a program

    def __str__(self) -> str:
        return (
            f"{self.kernel}{'' if self.kernel == self.op else f' of {self.op}'}: {self.warps} warps, {self.stages} stages, {self.registers} registers and "
            f"{self.spilled_bytes} bytes spilled a thread, {self.shared_bytes:,} bytes of shared memory"
        )


@dataclass(frozen=True)
class ProgramPlan:
    """What was chosen for one program at one profile."""

    program: str
    profile: str
    graph_hash: str  # sha256 of the saved graph
    ops: Mapping[str, int]  # calls by operator
    parameters: int
    flops: int  # per row, 2 per multiply-add
    max_batch: int  # rows stay dynamic from 1 to this
    keep_f32: bool
    precision: Precision
    passes: tuple[str, ...]  # those that changed the graph
    quantised: Quantised | None = None
    sent: tuple[Sent, ...] = ()  # by a rank of a mesh

    def to_json(self) -> dict[str, Any]:
        """What this program does not have is absent."""
        return {key: value for key, value in asdict(self).items() if value or key not in ("quantised", "sent")}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ProgramPlan:
        sent = tuple(Sent(**each) for each in data.get("sent", ()))
        return cls(**{**data, "passes": tuple(data["passes"]), "quantised": Quantised.from_json(data.get("quantised")), "sent": sent})

    def own_precision(self, plans: Precision) -> Precision:
        """That this program runs in where the plan's is `plans`."""
        return "float32" if self.keep_f32 else plans

    def explain_costs(self) -> list[str]:
        sends = f"; sends {'; '.join(map(str, self.sent))}" if self.sent else ""
        return [f"program {self.program} profile {self.profile}", f"  parameters {self.parameters:,}; FLOPs per row {self.flops:,}{sends}"]

    def explain(self, default: Precision) -> list[str]:
        why = "kept: its inputs lose too much in bfloat16" if self.keep_f32 and default != "float32" else "the plan's"
        top = sorted(self.ops.items(), key=lambda item: (-item[1], item[0]))[:6]
        return [
            f"program {self.program} profile {self.profile}",
            f"  batch 1..{self.max_batch}: dynamic, one engine serves every number of rows" if self.max_batch > 1 else "  batch 1",
            f"  precision {self.precision}: {why}",
            *(self.quantised.explain() if self.quantised else ()),
            f"  parameters {self.parameters:,}; FLOPs per row {self.flops:,}",
            f"  passes {', '.join(self.passes) or 'none'}: those that changed the graph",
            f"  operators {sum(self.ops.values())}: {', '.join(f'{name} {count}' for name, count in top)}{', ...' if len(self.ops) > len(top) else ''}",
            *([f"  sends {'; '.join(map(str, self.sent))}; a call of one row, in float32"] if self.sent else ()),
            f"  graph sha256 {self.graph_hash}",
        ]


def spans(numbers: Sequence[int]) -> str:
    """Increasing numbers with their runs as first-last: "0-3, 6"."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


@dataclass(frozen=True)
class RankPlan:
    """What ranks do whose shares have the same sizes: the graphs are the first one's, and the others' differ in where their slices begin."""

    ranks: tuple[int, ...]
    weight_bytes: int  # of these programs, each tensor once
    programs: tuple[ProgramPlan, ...]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RankPlan:
        return cls(tuple(data["ranks"]), data["weight_bytes"], tuple(map(ProgramPlan.from_json, data["programs"])))

    def to_json(self) -> dict[str, Any]:
        return {"ranks": self.ranks, "weight_bytes": self.weight_bytes, "programs": [program.to_json() for program in self.programs]}

    def explain(self, default: Precision, whole: bool) -> list[str]:
        alike = f", alike but for where their slices begin; the graphs are those of rank {self.ranks[0]}" if len(self.ranks) > 1 else ""
        lines = [f"ranks {spans(self.ranks)}{alike}", f"  weights of what is split {self.weight_bytes:,} bytes, each once"]
        for program in self.programs:
            lines += [f"  {line}" for line in (program.explain(default) if whole else program.explain_costs())]
        return lines


@dataclass(frozen=True)
class Plan:
    """All choices for a model on a SKU and a mesh."""

    model: str
    version: str
    backend: str
    sku: str
    arch: str
    mesh: Mapping[str, int]  # axis to size; empty for one device
    precision: Precision
    precision_reason: str
    programs: tuple[ProgramPlan, ...]
    quality: Quality | None = None  # of a quantised model
    ranks: tuple[RankPlan, ...] = ()  # of a mesh: the programs that are split, as its ranks run them
    kernels: tuple[KernelPlan, ...] = ()  # of the ops that its programs keep
    kernels_by: str = ""  # what compiled them, or why nothing did; empty where no op is kept

    @property
    def mesh_name(self) -> str:
        return in_words(self.mesh)

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON."""
        return hashlib.sha256(canonical_json(self.to_json())).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """What this plan does not have is absent, so that plans from before there was such a thing keep their hashes."""
        data = {key: value for key, value in asdict(self).items() if value or key not in ("quality", "ranks", "kernels", "kernels_by")}
        data["programs"] = [program.to_json() for program in self.programs]
        return data | ({"ranks": [group.to_json() for group in self.ranks]} if self.ranks else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Raises BundleError if a field is missing or unknown."""
        try:
            quality = Quality(**data["quality"]) if "quality" in data else None
            ranks = tuple(map(RankPlan.from_json, data.get("ranks", ())))
            kernels = tuple(KernelPlan(**each) for each in data.get("kernels", ()))
            programs = tuple(map(ProgramPlan.from_json, data["programs"]))
            return cls(**{**data, "programs": programs, "quality": quality, "ranks": ranks, "kernels": kernels})
        except (KeyError, TypeError) as error:
            raise BundleError(f"plan.json is not a plan this version reads ({error}); run `reelstep compile` again") from error

    def program(self, name: str, profile: str) -> ProgramPlan:
        return next(p for p in self.programs if (p.program, p.profile) == (name, profile))

    def explain(self) -> str:
        """Every choice and why, for people."""
        lines = [
            f"model {self.model} version {self.version}",
            f"backend {self.backend}",
            f"SKU {self.sku} ({self.arch})",
            f"mesh {self.mesh_name}",
            f"precision {self.precision}: {self.precision_reason}",
            *([f"quality of the quantised model {self.quality}"] if self.quality else ()),
        ]
        for program in self.programs:
            lines += program.explain(self.precision)
        return "\n".join([*lines, *self.explain_ranks(), *self.explain_kernels(), f"plan sha256 {self.hash}"]) + "\n"

    def explain_ranks(self) -> list[str]:
        """The first group whole; of the others, which have the same choices, what differs."""
        return [line for group in self.ranks for line in group.explain(self.precision, whole=group is self.ranks[0])]

    def explain_kernels(self) -> list[str]:
        at = ", at width 6144 and head dim 128" if self.kernels else ""  # whatever the model's are (kernels/)
        return [f"kernels of the ops that are kept: {self.kernels_by}{at}", *(f"  {kernel}" for kernel in self.kernels)] if self.kernels_by else []

    def diff(self, other: Plan) -> str:
        """What differs in the explanations, as a unified diff; empty if nothing."""
        names = (f"{self.model} {self.hash[:12]}", f"{other.model} {other.hash[:12]}")
        return "".join(difflib.unified_diff(self.explain().splitlines(True), other.explain().splitlines(True), *names, n=0))
