"""The sources of this package, on which what it makes depends as well."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from reelstep import errors


@cache
def source_hash(*folders: str) -> str:
    """sha256 over names and bytes of all modules in these folders of the package, hex."""
    root, digest = Path(errors.__file__).parent, hashlib.sha256()
    for path in sorted(path for folder in folders for path in (root / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def made_of(*parts: str) -> str:
    """Names an engine by what it is made of, and by the code that makes it. hex."""
    return hashlib.sha256("\n".join([*parts, source_hash("compiler", "kernels")]).encode()).hexdigest()
