"""Resumable training state: saved often, to a temporary name, then renamed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from reelstep.errors import ConfigError, StorageError


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write `state` so that a crash at any moment leaves the old file or the new one, never half of one."""
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(state), temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # PyTorch's own writer tells of a full disk in a RuntimeError
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {reason(error)}; what was saved before is unchanged. Free some space, and run it again to go on") from error


def load(path: Path, processes: str | None = None, asked: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The saved state, or None where there is none. Tensors and plain values only: nothing else is unpickled.

    processes: that must have saved it, in words. asked: options that it was saved with, under "asked". Raises ConfigError for a file that cannot be read, and
    for one of other processes or options, which it names.
    """
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError) as error:
        raise ConfigError(f"{path} cannot be read as what was saved there ({reason(error)}); remove it to begin again") from error
    if asked is not None:
        check_same(path, state.get("asked", {}), asked)
    if processes is not None and (by := state.get("processes")) != processes:
        raise ConfigError(f"{path} was saved by {by or 'an older version'}, this is {processes}; continue it as it was begun, or remove it")
    return state


def keep(path: Path, modules: Mapping[str, nn.Module], optimizers: Sequence[torch.optim.Optimizer], step: int, seconds: float, **rest: Any) -> None:
    """Save a training in one process after `step` steps and so many seconds, for `resume`. rest: what else belongs to it, "asked" among it."""
    states = {name: module.state_dict() for name, module in modules.items()}
    save(path, {**states, "optimizers": [optimizer.state_dict() for optimizer in optimizers], "step": step, "elapsed_s": seconds, **rest})


def resume(
    path: Path, modules: Mapping[str, nn.Module], optimizers: Sequence[torch.optim.Optimizer], asked: Mapping[str, Any] | None = None
) -> tuple[int, float]:  # fmt: skip
    """Bring a training to where `keep` saw it. Gives the steps done and the seconds they took; 0 of both, and nothing is touched, where none was saved.

    asked: as of `load`, which this raises as.
    """
    if (saved := load(path, asked=asked)) is None:
        return 0, 0.0
    for name, module in modules.items():
        module.load_state_dict(saved[name])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return saved["step"], saved["elapsed_s"]


def check_same(path: Path, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raises ConfigError, naming each option that differs."""
    differ = [f"{name} {saved.get(name, 'unknown')}, asked for {value}" for name, value in asked.items() if saved.get(name, ...) != value]
    if differ:
        raise ConfigError(f"{path} was saved with {'; '.join(differ)}. Go on with what it was saved with, or remove it, or save elsewhere")


def reason(error: Exception) -> str:
    """Its first line: PyTorch adds where in its sources it was."""
    return str(error).partition("\n")[0] or type(error).__name__
