"""Every error of ours has one status, its details fit into gRPC's metadata, and the client rebuilds it."""

from __future__ import annotations

import base64
import inspect
from urllib.parse import quote

import pytest
from google.rpc import error_details_pb2, status_pb2

from reelstep import errors
from reelstep.engine.client import from_status
from reelstep.engine.service.errors import DOMAIN, STATUS, clip, to_status, trailers
from reelstep.errors import ReelstepError

ALL = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, ReelstepError)]


def example(kind: type[ReelstepError], text: str = "what happened") -> ReelstepError:
    if kind is errors.InvalidRequest:
        return errors.InvalidRequest([errors.FieldViolation("steps", text), errors.FieldViolation("width", "is odd")])
    if kind in (errors.Overloaded, errors.Unavailable):
        return kind(text, 2.5)  # type: ignore[call-arg]
    return kind(text)


def unpack(status: status_pb2.Status, kind: type) -> list[object]:
    found = []
    for detail in status.details:
        message = kind()
        if detail.Unpack(message):
            found.append(message)
    return found


def test_the_table_holds_every_error_class_and_nothing_else() -> None:
    assert set(STATUS) == set(ALL)
    assert len({reason for _, reason in STATUS.values()}) == len(STATUS)


@pytest.mark.parametrize("kind", ALL)
def test_the_client_gets_the_error_that_the_server_raised(kind: type[ReelstepError]) -> None:
    sent = example(kind)
    status = to_status(sent)
    got = from_status(status_pb2.Status.FromString(status.SerializeToString()))
    assert type(got) is kind
    assert str(got) == str(sent)
    assert {**vars(got)} == {**vars(sent)}


@pytest.mark.parametrize("kind", ALL)
def test_every_status_says_its_reason_and_its_domain(kind: type[ReelstepError]) -> None:
    (info,) = unpack(to_status(example(kind)), error_details_pb2.ErrorInfo)
    assert (info.domain, info.reason) == (DOMAIN, STATUS[kind][1])  # type: ignore[attr-defined]


def test_a_busy_server_says_when_to_come_back_in_both_ways() -> None:
    error = errors.Overloaded("full", 2.5)
    status = to_status(error)
    (retry,) = unpack(status, error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToMilliseconds() == 2500  # type: ignore[attr-defined]
    assert ("grpc-retry-pushback-ms", "2500") in trailers(error, status)


def test_an_unknown_name_is_described_as_a_resource() -> None:
    (resource,) = unpack(to_status(errors.unknown("model", "x", ["a"])), error_details_pb2.ResourceInfo)
    assert "known: a" in resource.description  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["x" * 100_000, "é" * 100_000, "😀" * 100_000, "\udcff" * 1000])
@pytest.mark.parametrize("kind", ALL)
def test_message_and_details_stay_under_4_kib_on_the_wire(kind: type[ReelstepError], text: str) -> None:
    error = example(kind, text)
    if isinstance(error, errors.InvalidRequest):
        error = errors.InvalidRequest([errors.FieldViolation(f"field{i}", text) for i in range(50)])
    status = to_status(error)
    on_wire = len(quote(status.message)) + len(base64.b64encode(status.SerializeToString()))
    assert on_wire < 4096


def test_clipping_never_splits_a_character() -> None:
    assert clip("ééé", 100) == "ééé"
    assert clip("é" * 10, 10) == "ééé..."
