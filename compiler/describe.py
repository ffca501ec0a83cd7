"""What a bundle holds, for people and for programs."""

from __future__ import annotations

from typing import Any

from reelstep.compiler.bundle import Bundle


def describe_json(bundle: Bundle) -> dict[str, Any]:
    """Versions, programs with signatures, sizes, costs and hashes. Plain JSON values."""
    manifest, plan = bundle.manifest, bundle.plan
    programs = [
        {
            "program": p.program,
            "profile": p.profile,
            "precision": p.precision,
            "parameters": p.parameters,
            "flops_per_row": p.flops,
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
        "precision": plan.precision,
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
        f"planned for {plan.backend} on {plan.sku} ({plan.arch}), {plan.precision}",
        f"signed by {bundle.signed_by}; whose key that is, is yours to know" if bundle.signed_by else "not signed",
        f"solvers: {', '.join(sorted(bundle.solvers)) or 'none'}; fitted: {', '.join(sorted(bundle.fitted)) or 'none'}",
        f"weights: {len(bundle.tensors)} distinct tensors" if bundle.has_weights else "weights: none; compiled on the meta device",
    ]
    for p in plan.programs:
        signature = bundle.signatures[p.program, p.profile]
        lines += [
            f"program {p.program} profile {p.profile}: B 1..{p.max_batch}, {p.precision}, {p.parameters:,} parameters, {p.flops / 1e9:.3f} GFLOP per row",
            *(f"  in  {edge}" for edge in signature.inputs),
            *(f"  out {edge}" for edge in signature.outputs),
        ]
    width = max(map(len, manifest["files"]))
    lines += [f"  {name:<{width}}  {entry['bytes']:>12,}  {entry['sha256'][:16]}" for name, entry in manifest["files"].items()]
    return "\n".join([*lines, f"plan sha256 {plan.hash}"]) + "\n"
