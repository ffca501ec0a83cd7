"""The error tree is what its docstring draws, and every error reads as a sentence a caller can act on."""

from __future__ import annotations

import inspect
import re

import pytest

from reelstep import errors
from reelstep.errors import (
    ConfigError,
    DeadlineExceeded,
    FieldViolation,
    InvalidRequest,
    NotFound,
    Overloaded,
    ReelstepError,
    StorageError,
    Unavailable,
    unknown,
)

CLASSES = {name: c for name, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, ReelstepError) and c is not ReelstepError}


def test_the_docstring_draws_every_error_and_no_other() -> None:
    assert errors.__doc__ is not None
    drawn = re.findall(r"^[├└]── (\w+)", errors.__doc__, re.MULTILINE)
    assert sorted(drawn) == sorted(CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_an_error_hangs_directly_below_the_root_and_says_what_it_is(name: str) -> None:
    assert CLASSES[name].__mro__[1] is ReelstepError
    assert CLASSES[name].__doc__


@pytest.mark.parametrize(("ours", "builtin"), [(ConfigError, ValueError), (InvalidRequest, ValueError), (NotFound, LookupError), (StorageError, OSError)])
def test_a_caller_who_knows_only_python_catches_the_built_in_error(ours: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(ours, builtin)


def test_an_invalid_request_reports_all_its_fields_at_once() -> None:
    error = InvalidRequest(v for v in [FieldViolation("steps", "0 is not in 1..64"), FieldViolation("prompt", "is empty")])
    assert [v.field for v in error.violations] == ["steps", "prompt"]
    assert str(error) == "steps: 0 is not in 1..64; prompt: is empty"


def test_an_unknown_name_is_told_with_the_known_ones_in_order() -> None:
    error = unknown("solver", "eulr", ["midpoint", "euler"])
    assert isinstance(error, NotFound)
    assert str(error) == "unknown solver 'eulr'; known: euler, midpoint"


def test_an_unknown_name_among_none_says_so() -> None:
    assert str(unknown("job", "7", [])) == "unknown job '7'; known: none"


@pytest.mark.parametrize("error", [Overloaded("queue is full", 2.5), Unavailable("starting", 2.5)])
def test_an_error_that_passes_says_when_to_try_again(error: Overloaded | Unavailable) -> None:
    assert error.retry_after_s == 2.5


def test_a_missed_deadline_says_where_the_time_went() -> None:
    error = DeadlineExceeded("denoise")
    assert error.stage == "denoise"
    assert str(error).startswith("deadline exceeded while denoise; allow more time")
