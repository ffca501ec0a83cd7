"""The table from our errors to gRPC statuses, and the details that go with them (google.rpc, AIP-193)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details
from google.rpc import status_pb2

from reelstep import errors
from reelstep.engine.request import SPEC_NAMES

Code = grpc.StatusCode
DOMAIN = "reelstep"

STATUS: Mapping[type[errors.ReelstepError], tuple[grpc.StatusCode, str]] = {
    errors.ReelstepError: (Code.INTERNAL, "REELSTEP_ERROR"),
    errors.ConfigError: (Code.FAILED_PRECONDITION, "CONFIG_ERROR"),
    errors.InvalidRequest: (Code.INVALID_ARGUMENT, "INVALID_REQUEST"),
    errors.UnsupportedRequest: (Code.FAILED_PRECONDITION, "UNSUPPORTED_REQUEST"),
    errors.NotFound: (Code.NOT_FOUND, "NOT_FOUND"),
    errors.AlreadyExists: (Code.ALREADY_EXISTS, "ALREADY_EXISTS"),
    errors.NotAllowed: (Code.PERMISSION_DENIED, "NOT_ALLOWED"),
    errors.BundleError: (Code.INTERNAL, "BUNDLE_ERROR"),
    errors.CompileError: (Code.INTERNAL, "COMPILE_ERROR"),
    errors.Overloaded: (Code.RESOURCE_EXHAUSTED, "OVERLOADED"),
    errors.Unavailable: (Code.UNAVAILABLE, "UNAVAILABLE"),
    errors.DeadlineExceeded: (Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    errors.Cancelled: (Code.CANCELLED, "CANCELLED"),
    errors.StorageError: (Code.INTERNAL, "STORAGE_ERROR"),
    errors.InternalError: (Code.INTERNAL, "INTERNAL_ERROR"),
}

MAX_MESSAGE_BYTES = 400
MAX_DETAILS_BYTES = 2000
"""Together under 4 KiB on the wire, where the message is percent-encoded (up to 3x) and the details are base64 (4/3).

Beyond 8 KiB a client loses the true code to "metadata size exceeds limit".
"""


def clip(text: str, size_bytes: int) -> str:
    """The start of `text` in at most `size_bytes` of UTF-8."""
    data = text.encode("utf-8", "replace")
    return data.decode() if len(data) <= size_bytes else data[: size_bytes - 3].decode("utf-8", "ignore") + "..."


def to_status(error: errors.ReelstepError) -> status_pb2.Status:
    """The google.rpc.Status of an error. Violations that no longer fit are left out; the message still counts as a whole."""
    code, reason = STATUS[type(error)]
    if isinstance(error, errors.InvalidRequest):
        error = errors.InvalidRequest(errors.FieldViolation(SPEC_NAMES.get(v.field, v.field), v.description) for v in error.violations)
    number: int = code.value[0]
    status = status_pb2.Status(code=number, message=clip(str(error), MAX_MESSAGE_BYTES))
    for message in (details.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata_of(error)), *details_of(error)):
        packed = Any()
        packed.Pack(message)
        status.details.append(packed)
    return status


def metadata_of(error: errors.ReelstepError) -> dict[str, str]:
    return {"stage": clip(error.stage, 100)} if isinstance(error, errors.DeadlineExceeded) else {}


def details_of(error: errors.ReelstepError) -> list[Message]:
    """What a client can act on, beside the ErrorInfo that every error has."""
    if isinstance(error, errors.InvalidRequest):
        return [bad_request(error)]
    if isinstance(error, errors.NotFound):
        return [details.ResourceInfo(description=clip(str(error), MAX_MESSAGE_BYTES))]
    if isinstance(error, errors.Overloaded | errors.Unavailable):
        delay = Duration()
        delay.FromMilliseconds(pushback_ms(error.retry_after_s))
        return [details.RetryInfo(retry_delay=delay)]
    return []


def bad_request(error: errors.InvalidRequest) -> details.BadRequest:
    found = details.BadRequest()
    for violation in error.violations:
        one = details.BadRequest.FieldViolation(field=clip(violation.field, 100), description=clip(violation.description, 300))
        if found.ByteSize() + one.ByteSize() > MAX_DETAILS_BYTES - MAX_MESSAGE_BYTES - 200:
            break
        found.field_violations.append(one)
    return found


def pushback_ms(retry_after_s: float) -> int:
    return math.ceil(1000 * max(retry_after_s, 0))


def trailers(error: errors.ReelstepError, status: status_pb2.Status) -> tuple[tuple[str, str | bytes], ...]:
    """The status for the client's code, and the pushback that gRPC's own retry obeys."""
    rich = ("grpc-status-details-bin", status.SerializeToString())
    if isinstance(error, errors.Overloaded | errors.Unavailable):
        return rich, ("grpc-retry-pushback-ms", str(pushback_ms(error.retry_after_s)))
    return (rich,)
