"""A bundle is written: weights that are the same bytes once, every file hashed, the whole directory or nothing."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.export import ExportedProgram

from reelstep import __version__
from reelstep.compiler.bundle import CARD, FITTED, FORMAT, MANIFEST, PLAN, PROGRAMS, SOLVERS, WEIGHTS, digest, is_bundle
from reelstep.compiler.capture import SAFE_NAME
from reelstep.compiler.graphs import weights_of
from reelstep.compiler.plan import Plan, canonical_json
from reelstep.compiler.signature import Signature
from reelstep.compiler.storage import sha256_file, sync, whole_directory, write_file
from reelstep.errors import ConfigError, StorageError


@dataclass(frozen=True)
class Captured:
    """One program at one profile after the passes, and what was chosen for it."""

    signature: Signature
    exported: ExportedProgram
    graph: bytes  # dump_graph(exported)

    @property
    def file(self) -> str:
        return f"{PROGRAMS}/{self.signature.program}.{self.signature.profile}.json"


def write_bundle(
    out: Path,
    *,
    plan: Plan,
    captured: tuple[Captured, ...],
    settings: Mapping[str, Any],
    solvers: Mapping[str, Any],
    fitted: Mapping[str, Any],
    card: str,
) -> None:
    """Write the directory `out`, replacing a bundle that is there.

    Raises ConfigError for a solver name that cannot be a file name, StorageError if the disk fails or is full (the old
    bundle is then untouched) or if `out` is something else than a bundle.
    """
    for name in (*solvers, *fitted):
        if not SAFE_NAME.fullmatch(name):
            raise ConfigError(f"{name!r} cannot name a solver; use letters, digits, '_', '-' and '.'")
    names, tensors = _share_weights(captured)
    contents = {PLAN: canonical_json(plan.to_json()), CARD: card.encode()}
    contents |= {f"{SOLVERS}/{name}.json": canonical_json(table) for name, table in solvers.items()}
    contents |= {f"{FITTED}/{name}.json": canonical_json(artifact) for name, artifact in fitted.items()}
    contents |= {item.file: item.graph for item in captured}
    with whole_directory(out, replaceable=is_bundle) as folder:
        for file, data in contents.items():
            (folder / file).parent.mkdir(exist_ok=True)
            write_file(folder / file, data)
        has_weights = not any(tensor.is_meta for tensor in tensors.values())
        if has_weights:
            _write_weights(folder / WEIGHTS, tensors)
        files = sorted([*contents, WEIGHTS] if has_weights else contents)
        manifest = _manifest(plan, captured, settings, names, {} if has_weights else tensors)
        manifest["files"] = {file: {"sha256": sha256_file(folder / file), "bytes": (folder / file).stat().st_size} for file in files}
        manifest["sha256"] = digest(manifest)
        write_file(folder / MANIFEST, canonical_json(manifest))


def _share_weights(captured: tuple[Captured, ...]) -> tuple[list[dict[str, str]], dict[str, Tensor]]:
    """For each captured program the stored name of every weight, and the distinct tensors by stored name.

    Weights are one if their bytes are: programs that wrap the same module name its parameters differently.
    """
    stored_by_content: dict[str, str] = {}
    digests: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    names = []
    for item in captured:
        own = {}
        for qualified, tensor in sorted(weights_of(item.exported).items()):
            place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
            if place not in digests:
                digests[place] = _content(tensor, place)
            content = digests[place]
            if content not in stored_by_content:
                stored = qualified if qualified not in tensors else f"{item.signature.program}.{item.signature.profile}/{qualified}"
                stored_by_content[content] = stored
                tensors[stored] = tensor.detach()
            own[qualified] = stored_by_content[content]
        names.append(own)
    return names, tensors


def _content(tensor: Tensor, place: tuple[Any, ...]) -> str:
    """sha256 of a tensor's dtype, shape and bytes. Meta tensors have no bytes and are one if their storage is."""
    if tensor.is_meta:
        return f"meta {place}"
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    storages = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    twice = {name for name, tensor in tensors.items() if storages[tensor.untyped_storage().data_ptr()] > 1}
    try:
        save_file({name: tensor.contiguous().clone() if name in twice or _shares(tensor) else tensor for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise StorageError(f"cannot write {path}: {error}. What was there before is kept; free some space or choose another path") from error
    path.chmod(0o644)
    sync(path)


def _shares(tensor: Tensor) -> bool:
    """Whether the tensor is a view of a larger storage, which the file format refuses, as two of one storage."""
    return not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()


def _manifest(
    plan: Plan, captured: tuple[Captured, ...], settings: Mapping[str, Any], names: list[dict[str, str]], meta: Mapping[str, Tensor]
) -> dict[str, Any]:
    programs: dict[str, dict[str, Any]] = {}
    for item, own in zip(captured, names, strict=True):
        entry = {"file": item.file, "signature": item.signature.to_json(), "weights": own}
        programs.setdefault(item.signature.program, {})[item.signature.profile] = entry
    return {
        "format": FORMAT,
        "reelstep": __version__,
        "torch": str(torch.__version__),
        "model": plan.model,
        "version": plan.version,
        "plan_hash": plan.hash,
        "settings": dict(settings),
        "programs": programs,
        "meta_weights": {name: {"shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")} for name, t in meta.items()},
    }
