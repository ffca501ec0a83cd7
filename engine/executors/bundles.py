"""Bundles on the machine of a rank, which may be another one than the engine's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reelstep.compiler.bundle import MANIFEST, Bundle
from reelstep.compiler.load import load
from reelstep.compiler.program import Precision
from reelstep.compiler.storage import whole_directory
from reelstep.engine.runner import Executable, Runner
from reelstep.errors import BundleError

if TYPE_CHECKING:  # one device is spared torch's collectives
    from reelstep.parallel.collectives import Communicator


@dataclass(frozen=True)
class Stored:
    """A bundle that each rank opens for itself: at the path where it was verified if there is one on its machine, else in the cache, from `receive`.

    digest: sha256 of the manifest, so that no rank and no restart takes another one.
    """

    path: Path
    digest: str
    cache: Path

    @classmethod
    def of(cls, bundle: Bundle, cache: Path) -> Stored:
        return cls(bundle.path.absolute(), bundle.manifest["sha256"], cache.absolute())

    @property
    def place(self) -> Path:
        return self.path if self.path.exists() else self.cache / "bundles" / f"{self.digest}.reel"

    @property
    def found(self) -> str:
        """The digest of what lies on this machine; empty where nothing does."""
        try:
            manifest: Mapping[str, str] = json.loads((self.place / MANIFEST).read_bytes())
        except (OSError, ValueError):
            return ""
        return manifest.get("sha256", "")

    def receive(self, files: Mapping[str, bytes]) -> None:
        """Write the bundle's files into the cache; `open` verifies them. Raises StorageError."""
        with whole_directory(self.place, lambda _: True) as folder:
            for name, data in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(data)

    def open(self) -> Bundle:
        """Raises BundleError for one that is absent, damaged or another one."""
        bundle = Bundle.open(self.place)
        if bundle.manifest["sha256"] != self.digest:
            raise BundleError(f"{self.place} was replaced while it was served; start the server again")
        return bundle


@dataclass(frozen=True)
class WholeBundles:
    """What a rank without others loads: every program of some bundles."""

    bundles: tuple[Stored, ...]
    backend: str | None
    precision: Precision | None

    def identity(self) -> Mapping[str, str]:
        return {f"bundle {stored.path.name}": stored.found for stored in self.bundles}

    def load(self, comm: Communicator) -> Mapping[str, Runner]:
        opened = [(stored.open(), stored.cache) for stored in self.bundles]
        return {bundle.plan.model: runner_of(bundle, load(bundle, cache, self.backend, self.precision)) for bundle, cache in opened}


def runner_of(bundle: Bundle, executables: Mapping[tuple[str, str], Executable]) -> Runner:
    """All programs of a bundle, as they were loaded on this machine."""
    return Runner(executables, {key: signature.max_batch for key, signature in bundle.signatures.items()})
