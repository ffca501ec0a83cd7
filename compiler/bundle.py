"""A bundle: plan, graphs, weights, solver tables and model card in one directory, hashed, the same bytes for the same input.

NAME.reel/
  manifest.json           versions, settings, signatures, sha256 and size of every other file, and its own sha256
  plan.json               every choice (plan.py)
  programs/P.Q.json       the graph of program P at profile Q (graphs.py)
  weights.safetensors     each distinct tensor once; absent if the model was on the meta device
  solvers/NAME.json       solver tables
  fitted/NAME.json        artifacts of fits to this model
  MODEL_CARD.md
  signature.json          who signed the manifest, if anybody did (signing.py)
Engines are not in it: they are built where they run and lie in that machine's cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from reelstep import __version__
from reelstep.compiler.plan import Plan, canonical_json
from reelstep.compiler.signature import Signature
from reelstep.compiler.storage import FileState, file_state, replace_file, sha256_file, sync
from reelstep.errors import BundleError, ReelstepError, unknown

if TYPE_CHECKING:  # a bundle is opened without torch, and without cryptography one that nobody signed, and nobody must have signed
    from torch import Tensor
    from torch.export import ExportedProgram

    from reelstep.compiler.signing import PrivateKey, PublicKey

FORMAT = 2
"""Of the directory. A reader takes exactly its own; a change of layout adds one."""

MANIFEST, PLAN, WEIGHTS, CARD, SIGNATURE = "manifest.json", "plan.json", "weights.safetensors", "MODEL_CARD.md", "signature.json"
PROGRAMS, SOLVERS, FITTED = "programs", "solvers", "fitted"
"""Folders."""
FIELDS = ("reelstep", "torch", "model", "version", "plan_hash", "settings", "programs", "meta_weights", "files")
"""Of a manifest, besides its format and sha256."""
AGAIN = "run `reelstep compile` again"


def is_bundle(path: Path) -> bool:
    """Whether it is one, or was before it was damaged, and nothing else lies in it: other programs have manifests as well, and people keep notes."""
    try:
        there = {entry.name for entry in path.iterdir()}
    except OSError:
        return False
    return {MANIFEST} < there <= {MANIFEST, PLAN, WEIGHTS, CARD, SIGNATURE, PROGRAMS, SOLVERS, FITTED}


def sign_bundle(path: Path, key: PrivateKey, meant: Bundle | None = None) -> Bundle:
    """Verify the bundle and sign its manifest, in place of a good signature before. meant: what must lie there still. Raises BundleError, StorageError."""
    from reelstep.compiler.signing import sign

    there = Bundle.open(path)
    if meant is not None and there.manifest["sha256"] != meant.manifest["sha256"]:
        raise BundleError(f"{path} was exchanged since it was made, and what lies there now was not signed; look who writes there, and {AGAIN}")
    replace_file(path / SIGNATURE, sign(canonical_json(there.manifest), key))
    sync(path)
    return Bundle.open(path, (key.public,))


class Bundle:
    """A verified bundle. Made by `Bundle.open`."""

    def __init__(self, path: Path, manifest: dict[str, Any], plan: Plan, signed_by: PublicKey | None, weights: FileState | None) -> None:
        """weights: their file as it was verified, which is too large to be hashed each time it is read."""
        self.path = path
        self._weights = weights
        self.manifest = manifest
        self.plan = plan
        self.signed_by = signed_by

    @classmethod
    def open(cls, path: Path, trusted: Sequence[PublicKey] = ()) -> Bundle:
        """Read and verify. trusted: if any, one of them must have signed.

        Raises BundleError naming the file that is missing, damaged, misplaced or of another version, or what is wrong with the signature, which is
        looked at before anything else.
        """
        try:
            return cls._open(path, trusted)
        except ReelstepError:
            raise
        except (OSError, RecursionError, ValueError, LookupError, TypeError, AttributeError) as error:  # JSON of another shape than ours, or nothing to read
            raise BundleError(f"{path} cannot be read as a bundle ({type(error).__name__}: {str(error)[:200]}); look at its permissions, or {AGAIN}") from error

    @classmethod
    def _open(cls, path: Path, trusted: Sequence[PublicKey]) -> Bundle:
        data = _read_manifest(path)
        signed_by = _signer(path, data, trusted)
        manifest = _parse_manifest(path, data)
        graphs = [entry["file"] for profiles in manifest["programs"].values() for entry in profiles.values()]
        for name in (PLAN, CARD, *graphs):
            if name not in manifest["files"]:
                raise BundleError(f"{path / MANIFEST} gives no sha256 for {name!r}; {AGAIN}")
        weights = file_state(path / WEIGHTS) if WEIGHTS in manifest["files"] else None
        for name, entry in manifest["files"].items():
            _verify_file(path, name, entry)
        plan = Plan.from_json(json.loads(_read_verified(path, manifest, PLAN)))
        if plan.hash != manifest["plan_hash"]:
            raise BundleError(f"{path / PLAN} is not the plan that the manifest names; {AGAIN}")
        for p in plan.programs:
            entry = manifest["programs"].get(p.program, {}).get(p.profile)
            if entry is None or manifest["files"][entry["file"]]["sha256"] != p.graph_hash:
                raise BundleError(f"{path}: program {p.program!r} at profile {p.profile!r} is not the graph that {PLAN} was made for; {AGAIN}")
        return cls(path, manifest, plan, signed_by, weights)

    @cached_property
    def model_card(self) -> str:
        return self._read(CARD).decode()

    @cached_property
    def solvers(self) -> dict[str, Any]:
        """Tables by name, as they were handed in."""
        return self._json_files(SOLVERS)

    @cached_property
    def fitted(self) -> dict[str, Any]:
        """Artifacts by name, as they were handed in."""
        return self._json_files(FITTED)

    def _json_files(self, folder: str) -> dict[str, Any]:
        files = [name for name in self.manifest["files"] if name.startswith(f"{folder}/")]
        return {PurePosixPath(name).name.removesuffix(".json"): json.loads(self._read(name)) for name in files}

    def _read(self, name: str) -> bytes:
        """Raises BundleError for a file that is not the one which was verified, so that whoever writes there meanwhile changes nothing."""
        return _read_verified(self.path, self.manifest, name)

    @property
    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = self.manifest["settings"]
        return found

    @property
    def total_bytes(self) -> int:
        """Of all files."""
        around = [self.path / MANIFEST, *([self.path / SIGNATURE] if self.signed_by else [])]
        return int(sum(entry["bytes"] for entry in self.manifest["files"].values())) + sum(file.stat().st_size for file in around)

    @property
    def has_weights(self) -> bool:
        return WEIGHTS in self.manifest["files"]

    @property
    def weights_hash(self) -> str:
        """sha256 of the weights file; of nothing where there is none."""
        return str(self.manifest["files"][WEIGHTS]["sha256"]) if self.has_weights else hashlib.sha256().hexdigest()

    @cached_property
    def signatures(self) -> dict[tuple[str, str], Signature]:
        """By (program, profile), in the order of the plan."""
        programs = self.manifest["programs"]
        keys = [(p.program, p.profile) for p in self.plan.programs]
        return {key: Signature.from_json(*key, programs[key[0]][key[1]]["signature"]) for key in keys}

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every distinct weight, mapped from the file, so that all programs and profiles share one copy."""
        import torch
        from safetensors import SafetensorError, safe_open

        if not self.has_weights:
            return {name: torch.empty(t["shape"], dtype=getattr(torch, t["dtype"]), device="meta") for name, t in self.manifest["meta_weights"].items()}
        path, tensors, fault = self.path / WEIGHTS, {}, None
        try:
            with safe_open(path, "pt", device="cpu") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # a safe_open is not a mapping
        except (SafetensorError, OSError) as error:
            fault = error
        if not path.exists() or file_state(path) != self._weights:  # after it was opened: what is mapped by now stays
            raise _exchanged(path) from fault
        if fault is not None:
            raise BundleError(f"{path} holds no weights ({fault}); {AGAIN}") from fault
        return tensors

    def weights_bytes(self, name: str, profile: str, float_bytes: int) -> int:
        """Of what the program reads, with this many bytes for a floating number, but one in 8 bits: no engine of it is smaller."""
        from reelstep.compiler.graphs import element_bytes

        used = {stored: self.tensors[stored] for stored in self.manifest["programs"][name][profile]["weights"].values()}
        return sum(t.numel() * element_bytes(t, float_bytes) for t in used.values())

    def program(self, name: str, profile: str) -> ExportedProgram:
        """The graph with its weights. Raises NotFound for an unknown program or profile, BundleError for weights that are not there."""
        from reelstep.compiler.graphs import load_graph

        if name not in self.manifest["programs"]:
            raise unknown("program", name, self.manifest["programs"])
        profiles = self.manifest["programs"][name]
        if profile not in profiles:
            raise unknown(f"profile of program {name!r}", profile, profiles)
        entry = profiles[profile]
        if lacks := sorted({*entry["weights"].values()} - self.tensors.keys()):
            raise BundleError(f"{self.path}: program {name!r} at profile {profile!r} reads {', '.join(lacks)[:200]}, which {WEIGHTS} does not have; {AGAIN}")
        weights = {qualified: self.tensors[stored] for qualified, stored in entry["weights"].items()}
        return load_graph(self._read(entry["file"]), weights, self.signatures[name, profile], str(self.path / entry["file"]))


def digest(manifest: Mapping[str, Any]) -> str:
    """Of all that a manifest says, hex."""
    return hashlib.sha256(canonical_json({key: value for key, value in manifest.items() if key != "sha256"})).hexdigest()


def _read_manifest(path: Path) -> bytes:
    file = path / MANIFEST
    if not file.is_file():
        what = f"is not a bundle: it has no {MANIFEST}" if path.exists() else "does not exist"
        raise BundleError(f"{path} {what}; make one with `reelstep compile`")
    return file.read_bytes()


def _signer(path: Path, manifest: bytes, trusted: Sequence[PublicKey]) -> PublicKey | None:
    """Who signed the manifest; None where nobody did. Raises BundleError for a signature that does not hold, or is of none of the `trusted`, if any."""
    file = path / SIGNATURE
    signed = file.is_file()
    if not signed and not trusted:
        return None
    from reelstep.compiler.signing import check_signature, check_trusted

    signer = check_signature(manifest, file.read_bytes(), str(file)) if signed else None
    check_trusted(signer, trusted, str(path))
    return signer


def _parse_manifest(path: Path, data: bytes) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(data)
    except ValueError as error:
        raise BundleError(f"{file} is damaged ({error}); {AGAIN}") from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise BundleError(f"{file} is damaged: it names no format; {AGAIN}")
    if manifest["format"] != FORMAT:
        writer = manifest.get("reelstep", "an unknown version")
        raise BundleError(f"{path} has bundle format {manifest['format']}, written by reelstep {writer}; reelstep {__version__} reads format {FORMAT}; {AGAIN}")
    if manifest.get("sha256") != digest(manifest) or data != canonical_json(manifest):
        raise BundleError(f"{file} is damaged: its sha256 is not the one it states; {AGAIN}")
    if lacks := [name for name in FIELDS if name not in manifest]:
        raise BundleError(f"{file} does not say: {', '.join(lacks)}; {AGAIN}")
    if lacks := [name for name, entry in manifest["files"].items() if not {"sha256", "bytes"} <= entry.keys()]:
        raise BundleError(f"{file} gives no sha256 or size for {', '.join(lacks)}; {AGAIN}")
    return manifest


def _read_verified(path: Path, manifest: Mapping[str, Any], name: str) -> bytes:
    try:
        data = (path / name).read_bytes()
    except OSError as error:
        raise _exchanged(path / name) from error
    if hashlib.sha256(data).hexdigest() != manifest["files"][name]["sha256"]:
        raise _exchanged(path / name)
    return data


def _exchanged(file: Path) -> BundleError:
    return BundleError(f"{file} is not the file that was verified when the bundle was opened: something else was put there; open the bundle again")


def _verify_file(path: Path, name: str, entry: Mapping[str, Any]) -> None:
    parts = PurePosixPath(name).parts
    if PurePosixPath(name).is_absolute() or not parts or ".." in parts or "\\" in name:
        raise BundleError(f"{path / MANIFEST} names {name!r}, which is outside the bundle; do not use this bundle")
    file = path / name
    if not file.is_file():
        raise BundleError(f"{file} is missing; {AGAIN}")
    if not file.resolve().is_relative_to(path.resolve()):
        raise BundleError(f"{file} is a link to outside the bundle; do not use this bundle")
    if file.stat().st_size != entry["bytes"] or sha256_file(file) != entry["sha256"]:
        raise BundleError(f"{file} is damaged: its size or sha256 is not the one in {MANIFEST}; {AGAIN}")
