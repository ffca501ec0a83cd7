"""What a bundle holds, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from reelstep.compiler.backends.tensorrt import NOT_RUN
from reelstep.compiler.bundle import Bundle
from reelstep.compiler.plan import Plan
from reelstep.compiler.program import FLOAT_BYTES
from reelstep.compiler.skus import is_gpu

GPU_NOT_RUN = (
    "Of backend 'inductor' on a GPU the bundle of reel-tiny has run, on an H200, in bfloat16: compiled, served over gRPC, and right; in E4M3 its denoiser "
    "alone. Nobody has seen it on other GPUs than Hopper's, with other models of the zoo, with LoRAs of requests or with a step cache."
)


def not_run(plan: Plan) -> str | None:
    """What of a plan's backend nobody has seen on hardware."""
    if plan.backend == "inductor" and is_gpu(plan.arch):
        return GPU_NOT_RUN
    return NOT_RUN if plan.backend == "tensorrt" else None


def describe_json(bundle: Bundle) -> dict[str, Any]:
    """Versions, programs with signatures, operators, sizes, costs and hashes. Plain JSON values. weights_bytes: no engine of the program is smaller."""
    manifest, plan = bundle.manifest, bundle.plan
    programs = [
        {
            "program": p.program,
            "profile": p.profile,
            "precision": p.precision,
            "quantised": p.quantised.scheme if p.quantised else None,
            "parameters": p.parameters,
            "weights_bytes": bundle.weights_bytes(p.program, p.profile, FLOAT_BYTES[p.precision]),
            "flops_per_row": p.flops,
            "ops": dict(p.ops),
            "graph_sha256": p.graph_hash,
            **bundle.signatures[p.program, p.profile].to_json(),
        }
        for p in plan.programs
    ]
    return {
        **{key: manifest[key] for key in ("format", "reelstep", "torch", "model", "version", "plan_hash", "settings", "files")},
        "backend": plan.backend,
        "sku": plan.sku,
        "arch": plan.arch,
        "mesh": dict(plan.mesh),
        "ranks": [group.to_json() for group in plan.ranks],
        "kernels": [asdict(kernel) for kernel in plan.kernels],
        "kernels_by": plan.kernels_by,
        "not_run": not_run(plan),
        "precision": plan.precision,
        "quality": asdict(plan.quality) if plan.quality else None,
        "signed_by": str(bundle.signed_by) if bundle.signed_by else None,
        "solvers": sorted(bundle.solvers),
        "fitted": sorted(bundle.fitted),
        "total_bytes": bundle.total_bytes,
        "programs": programs,
    }


def describe(bundle: Bundle) -> str:
    """The same as text."""
    manifest, plan = bundle.manifest, bundle.plan
    lines = [
        f"{plan.model} version {plan.version}, {bundle.total_bytes / 1e6:.2f} MB in {len(manifest['files']) + 1} files",
        f"written by reelstep {manifest['reelstep']}, torch {manifest['torch']}, bundle format {manifest['format']}",
        f"planned for {plan.backend} on {plan.sku} ({plan.arch}), {plan.precision} ({plan.precision_reason}), {'mesh ' if plan.mesh else ''}{plan.mesh_name}",
        *filter(None, [not_run(plan)]),
        *([f"quantised: {plan.quality}"] if plan.quality else ()),
        f"signed by {bundle.signed_by}; whose key that is, is yours to know" if bundle.signed_by else "not signed",
        f"solvers: {', '.join(sorted(bundle.solvers)) or 'none'}; fitted: {', '.join(sorted(bundle.fitted)) or 'none'}",
        f"weights: {len(bundle.tensors)} distinct tensors" if bundle.has_weights else "weights: none; compiled on the meta device",
    ]
    for p in plan.programs:
        megabytes = bundle.weights_bytes(p.program, p.profile, FLOAT_BYTES[p.precision]) / 1e6
        signature, scheme = bundle.signatures[p.program, p.profile], f"{p.quantised.scheme} and " if p.quantised else ""
        lines += [
            f"program {p.program} profile {p.profile}: B 1..{p.max_batch}, {scheme}{p.precision}, "
            f"{p.parameters:,} parameters in {megabytes:.1f} MB, {p.flops / 1e9:.3f} GFLOP per row",
            *(f"  in  {edge}" for edge in signature.inputs),
            *(f"  out {edge}" for edge in signature.outputs),
        ]
    lines += [*plan.explain_ranks(), *plan.explain_kernels()]
    width = max(map(len, manifest["files"]))
    lines += [f"  {name:<{width}}  {entry['bytes']:>12,}  {entry['sha256'][:16]}" for name, entry in manifest["files"].items()]
    return "\n".join([*lines, f"plan sha256 {plan.hash}"]) + "\n"
