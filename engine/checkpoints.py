"""States of running requests on the disk, so that a server that is started again goes on where it was.

A result depends on what was asked and on what runs it, and on nothing else: so a state is kept under the hash of both, and any request that asks for the same
continues from it, bit for bit. One file for each, safetensors with the rest as JSON in its metadata; nothing in it is code.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from threading import Lock
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from reelstep.compiler.storage import replace_file
from reelstep.engine.pipelines.state import PipelineState, Run
from reelstep.engine.request import Request
from reelstep.engine.samplers.guidance import GuidanceState
from reelstep.engine.samplers.ns import SamplerState
from reelstep.engine.samplers.step_cache import Memory
from reelstep.errors import ConfigError, StorageError

log = logging.getLogger(__name__)

CLASSES: Mapping[str, Callable[..., Any]] = {each.__name__: each for each in (PipelineState, Run, SamplerState, GuidanceState, Memory)}
"""All that a state is made of, beside tensors and plain values."""
ASKED = {each.name for each in fields(Request)} - {"id", "preview_every", "priority", "deadline"}
"""The fields of a request that its result depends on."""


class Checkpoints:
    """A directory of states. Written on a thread of its own, in order; a file is whole or not there. Of a request that is quicker than the disk, the newest
    state alone waits.

    every: steps between two states of a request. most: files; the oldest make room. identity: of what runs a model, by its name: bundle, backend,
    precision. Raises ConfigError for numbers below 1, StorageError for a directory that cannot be made.
    """

    def __init__(self, folder: Path, every: int, identity: Mapping[str, str], most: int = 256) -> None:
        if every < 1 or most < 1:
            raise ConfigError(f"a checkpoint every {every} steps, at most {most} files; both are at least 1")
        self.folder, self.every, self.identity, self.most = folder, every, identity, most
        self._writer = ThreadPoolExecutor(1, "reelstep-checkpoints")
        self._waiting: dict[Path, bytes] = {}
        self._lock = Lock()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make {folder}: {error.strerror}; choose another directory for checkpoints") from error

    def path(self, request: Request, adapters: Sequence[str] = ()) -> Path:
        """adapters: fingerprints of those that the request names, which may be others by these names the next time."""
        asked = {name: getattr(request, name) for name in sorted(ASKED)}
        if request.image is not None:
            asked["image"] = [hashlib.sha256(request.image.tobytes()).hexdigest(), *request.image.shape]
        text = json.dumps([self.identity[request.model], asked, adapters], sort_keys=True, default=dict)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.state"

    def find(self, request: Request, adapters: Sequence[str] = ()) -> PipelineState | None:
        """What was kept of a request like this one; a file that cannot be read is no state. adapters: as of `path`, here and below."""
        path = self.path(request, adapters)
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
                state = whole(json.loads((file.metadata() or {})["state"]), tensors)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            log.warning("%s is damaged or of another version (%s): the request begins anew", path, error)
            return None
        log.info("request %s goes on after step %d of %d", request.id, state.step, state.steps)
        return state if isinstance(state, PipelineState) else None

    def keep(self, request: Request, state: PipelineState, adapters: Sequence[str] = ()) -> None:
        """Write the state as it is now. What goes wrong with the disk is logged: the request itself is well."""
        tensors: dict[str, Tensor] = {}
        described = json.dumps(plain(state, tensors))
        path, data = self.path(request, adapters), save(tensors, {"state": described})
        with self._lock:
            waits = path in self._waiting
            self._waiting[path] = data
        if not waits:
            self._writer.submit(self._write, path)

    def forget(self, request: Request, adapters: Sequence[str] = ()) -> None:
        path = self.path(request, adapters)
        self._writer.submit(lambda: path.unlink(missing_ok=True))

    def close(self) -> None:
        """What was handed over is on the disk afterwards. Idempotent."""
        self._writer.shutdown()

    def _write(self, path: Path) -> None:
        with self._lock:
            data = self._waiting.pop(path)
        try:
            replace_file(path, data)
            files = sorted(self.folder.glob("*.state"), key=lambda file: file.stat().st_mtime)
            for old in files[: -self.most]:
                old.unlink(missing_ok=True)
        except (StorageError, OSError) as error:
            log.warning("a checkpoint was not kept: %s", error)


def plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for a value; its tensors are put aside under numbers. A preview is for the moment only and is left out."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().contiguous().clone()  # safetensors refuses tensors that share memory
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": [[key, plain(each, tensors)] for key, each in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [plain(each, tensors) for each in value]}
    if type(value).__name__ in CLASSES:
        return {"class": type(value).__name__, "fields": {f.name: plain(getattr(value, f.name), tensors) for f in fields(value) if f.name != "preview"}}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} is nothing that a state is made of")


def whole(described: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value that `plain` described. Raises KeyError, TypeError or ValueError for what it did not."""
    if not isinstance(described, dict):
        return described
    if "class" in described:
        return CLASSES[described["class"]](**{name: whole(each, tensors) for name, each in described["fields"].items()})
    ((kind, content),) = described.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: whole(each, tensors) for key, each in content}
    made = [whole(each, tensors) for each in content]
    return {"list": made, "tuple": tuple(made)}[kind]
