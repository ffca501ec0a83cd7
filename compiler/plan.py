"""A plan: every choice that turns a model into engines, as values that print, compare and save."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from reelstep.compiler.program import Precision
from reelstep.errors import BundleError


def canonical_json(data: Any, indent: int | None = 1) -> bytes:
    """The one spelling of `data`: sorted keys, a final newline. Raises ValueError for NaN and infinities."""
    separators = (",", ": ") if indent else (",", ":")
    return (json.dumps(data, sort_keys=True, indent=indent, separators=separators, ensure_ascii=False, allow_nan=False) + "\n").encode()


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

    def explain(self, default: Precision) -> list[str]:
        why = "kept: its inputs lose too much in bfloat16" if self.keep_f32 and default != "float32" else "the plan's"
        top = sorted(self.ops.items(), key=lambda item: (-item[1], item[0]))[:6]
        return [
            f"program {self.program} profile {self.profile}",
            f"  batch 1..{self.max_batch}: dynamic, one engine serves every number of rows",
            f"  precision {self.precision}: {why}",
            f"  parameters {self.parameters:,}; FLOPs per row {self.flops:,}",
            f"  passes {', '.join(self.passes) or 'none'}: those that changed the graph",
            f"  operators {sum(self.ops.values())}: {', '.join(f'{name} {count}' for name, count in top)}{', ...' if len(self.ops) > len(top) else ''}",
            f"  graph sha256 {self.graph_hash}",
        ]


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

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON."""
        return hashlib.sha256(canonical_json(self.to_json())).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Raises BundleError if a field is missing or unknown."""
        try:
            programs = tuple(ProgramPlan(**{**p, "passes": tuple(p["passes"])}) for p in data["programs"])
            return cls(**{**data, "programs": programs})
        except (KeyError, TypeError) as error:
            raise BundleError(f"plan.json is not a plan this version reads ({error}); run `reelstep compile` again") from error

    def program(self, name: str, profile: str) -> ProgramPlan:
        return next(p for p in self.programs if (p.program, p.profile) == (name, profile))

    def explain(self) -> str:
        """Every choice and why, for people."""
        mesh = " x ".join(f"{axis}={size}" for axis, size in self.mesh.items()) or "one device"
        lines = [
            f"model {self.model} version {self.version}",
            f"backend {self.backend}",
            f"SKU {self.sku} ({self.arch})",
            f"mesh {mesh}",
            f"precision {self.precision}: {self.precision_reason}",
        ]
        for program in self.programs:
            lines += program.explain(self.precision)
        return "\n".join([*lines, f"plan sha256 {self.hash}"]) + "\n"

    def diff(self, other: Plan) -> str:
        """What differs in the explanations, as a unified diff; empty if nothing."""
        names = (f"{self.model} {self.hash[:12]}", f"{other.model} {other.hash[:12]}")
        return "".join(difflib.unified_diff(self.explain().splitlines(True), other.explain().splitlines(True), *names, n=0))
