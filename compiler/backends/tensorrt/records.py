"""What TensorRT says while it works: its errors and warnings are kept, so that a failure can be explained; its progress is passed on."""

from __future__ import annotations

import logging
from collections import deque
from types import TracebackType
from typing import Any

import tensorrt as trt

from reelstep.compiler.backends import Watch

KEPT = 20
"""Messages. The last ones tell what failed; a build can log thousands."""

LOG = logging.getLogger("torch_tensorrt [TensorRT Conversion Context]")
"""Where Torch-TensorRT's `TRT_LOGGER` writes. TensorRT has one logger a process, the first it is given, so all of ours are given that one."""


class Errors(trt.IErrorRecorder):  # type: ignore[misc]  # the bindings carry no types
    """The errors of a builder, runtime, engine, refitter or context, by TensorRT's own codes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: deque[tuple[trt.ErrorCodeTRT, str]] = deque(maxlen=KEPT)
        self.count = 0

    def num_errors(self) -> int:
        return len(self.found)

    def get_error_code(self, index: int) -> trt.ErrorCodeTRT:
        return self.found[index][0]

    def get_error_desc(self, index: int) -> str:
        return self.found[index][1]

    def has_overflowed(self) -> bool:
        return self.count > len(self.found)

    def clear(self) -> None:
        self.found.clear()
        self.count = 0

    def report_error(self, code: trt.ErrorCodeTRT, description: str) -> bool:
        """False: the call that failed may clean up and return."""
        self.found.append((code, description))
        self.count += 1
        return False


class Records(logging.Handler):
    """Errors and log of the piece of work for which this is entered."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.errors = Errors()
        self.messages: deque[str] = deque(maxlen=KEPT)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> Records:
        self.errors.clear()  # what an earlier piece of work met does not explain this one
        self.messages.clear()
        LOG.addHandler(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        LOG.removeHandler(self)

    def watch(self, *parts: Any) -> None:
        """Let every part report its errors here."""
        for part in parts:
            part.error_recorder = self.errors

    def explain(self) -> str:
        """What was recorded; a sentence that says so if nothing was."""
        said = [f"{code.name}: {description}" for code, description in self.errors.found]
        said += [message for message in self.messages if not any(description in message for _, description in self.errors.found)]
        return "TensorRT said: " + " | ".join(said) if said else "TensorRT gave no reason"


class Progress(trt.IProgressMonitor):  # type: ignore[misc]  # the bindings carry no types
    """Tells `watch` of every step. `stopped` is what it raised: nothing may be raised through TensorRT's own frames, so the build is asked to end."""

    def __init__(self, watch: Watch, where: str) -> None:
        super().__init__()
        self.watch, self.where = watch, where
        self.steps: dict[str, int] = {}
        self.stopped: BaseException | None = None

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        self.steps[phase_name] = num_steps
        self._tell(phase_name, 0)

    def step_complete(self, phase_name: str, step: int) -> bool:
        self._tell(phase_name, step + 1)
        return self.stopped is None

    def phase_finish(self, phase_name: str) -> None:
        self._tell(phase_name, self.steps[phase_name])
        del self.steps[phase_name]

    def _tell(self, phase: str, done: int) -> None:
        if self.stopped is None:
            try:
                self.watch(f"{self.where}: {phase}", done, self.steps[phase])
            except BaseException as error:  # noqa: BLE001  # raised again by whoever started the build
                self.stopped = error
