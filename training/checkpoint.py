"""Resumable training state: saved often, to a temporary name, then renamed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from reelstep.errors import ConfigError


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` so that a crash at any moment leaves the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(dict(state), temporary)
    os.replace(temporary, path)


def load(path: Path, processes: str | None = None) -> dict[str, Any] | None:
    """The saved state, or None where there is none. Tensors and plain values only: nothing else is unpickled.

    processes: that must have saved it, in words. Raises ConfigError if others did.
    """
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if processes is not None and (by := state.get("processes")) != processes:
        raise ConfigError(f"{path} was saved by {by or 'an older version'}, this is {processes}; continue it as it was begun, or remove it")
    return state
