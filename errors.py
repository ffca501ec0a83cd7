"""The errors of Reelstep. Every one says what was asked, what is allowed and what to change.

ReelstepError
├── ConfigError            sizes or options of ours that do not fit together
├── InvalidRequest         a request that no model could serve; carries field violations
├── UnsupportedRequest     legal elsewhere, not on this model
├── NotFound               unknown model, solver, program, backend, SKU, job
├── AlreadyExists          another thing has the name
├── NotAllowed             something that whoever runs the server has not allowed
├── BundleError            a bundle that is damaged, incomplete or of another version
├── CompileError           a program that a backend cannot compile
├── Overloaded             queue or budget full; try again later
├── Unavailable            starting, draining, device lost
├── DeadlineExceeded       no time left, in the queue or running
├── Cancelled              the client went away or asked for it
├── StorageError           a file could not be written; what was there is kept
└── InternalError          a bug or a numerical failure
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


class ReelstepError(Exception):
    """Base of all errors a caller may see."""


class ConfigError(ReelstepError, ValueError):
    """Sizes or options that do not fit together."""


@dataclass(frozen=True)
class FieldViolation:
    """One field of a request and what is wrong with it."""

    field: str
    description: str


class InvalidRequest(ReelstepError, ValueError):
    """A request with bad fields. All of them are reported at once."""

    def __init__(self, violations: Iterable[FieldViolation]) -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in self.violations))


class UnsupportedRequest(ReelstepError):
    """Legal for another model, not for this one."""


class NotFound(ReelstepError, LookupError):
    """An unknown name. Built by `unknown`, so that the known names stand beside it."""


def unknown(kind: str, name: str, known: Iterable[str]) -> NotFound:
    """The error for a name that is in no table."""
    return NotFound(f"unknown {kind} {name!r}; known: {', '.join(sorted(known)) or 'none'}")


class AlreadyExists(ReelstepError):
    """Another thing has this name. What is there is kept."""


class NotAllowed(ReelstepError):
    """Something that whoever runs the server has not allowed its clients."""


class BundleError(ReelstepError):
    """A bundle that is damaged, incomplete or of another version."""


class CompileError(ReelstepError):
    """A program that a backend cannot compile."""


class Overloaded(ReelstepError):
    """No room now. `retry_after_s` says when to try again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class Unavailable(ReelstepError):
    """Starting, draining or lost. `retry_after_s` says when to try again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class DeadlineExceeded(ReelstepError):
    """The deadline passed. `stage` says where: queued, or the program that was running."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        super().__init__(f"deadline exceeded while {stage}; allow more time; to generate, fewer steps or quality 'auto' take less")


class Cancelled(ReelstepError):
    """The client went away or asked to stop."""


class StorageError(ReelstepError, OSError):
    """A file could not be written. What was there before is kept."""


class InternalError(ReelstepError):
    """A bug, or a numerical failure such as a NaN output."""
