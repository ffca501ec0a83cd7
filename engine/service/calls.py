"""What is common to all calls: parse, run, and turn what was raised into a status. Tracing, identity and quotas belong here."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from reelstep.engine.service.errors import STATUS, to_status, trailers
from reelstep.errors import FieldViolation, InternalError, InvalidRequest, ReelstepError

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)


def parse(kind: type[RequestT], data: bytes) -> RequestT:
    """The message in `data`. Raises InvalidRequest; gRPC's own deserialiser would answer INTERNAL to text that is not UTF-8."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        text = f"is not a {kind.DESCRIPTOR.full_name}; text fields, the prompt too, must be UTF-8"
        raise InvalidRequest([FieldViolation("request", text)]) from error


def known(error: Exception) -> ReelstepError:
    """`error` if it is ours; else one that tells nothing of the inside, which goes to the log."""
    if isinstance(error, ReelstepError):
        return error
    log.error("a call failed for a reason that is not the client's", exc_info=error)
    return InternalError("internal error; the server's log has the reason")


async def abort(context: Context, error: Exception) -> None:
    """End the call with the status of `error`."""
    ours = known(error)
    status = to_status(ours)
    await context.abort(STATUS[type(ours)][0], status.message, trailers(ours, status))


def unary(kind: type[RequestT], method: Callable[[RequestT, Context], Awaitable[ResponseT]]) -> grpc.RpcMethodHandler[Any, Any]:
    async def call(data: bytes, context: Context) -> ResponseT | None:
        try:
            return await method(parse(kind, data), context)
        except Exception as error:  # noqa: BLE001 - the edge: every error becomes a status, and unknown ones are logged
            await abort(context, error)
            return None

    return grpc.unary_unary_rpc_method_handler(call, response_serializer=serialize)


def server_stream(kind: type[RequestT], method: Callable[[RequestT, Context], Awaitable[None]]) -> grpc.RpcMethodHandler[Any, Any]:
    """`method` writes its answers to the context, so that a client's leaving interrupts it wherever it is."""

    async def call(data: bytes, context: Context) -> None:
        try:
            await method(parse(kind, data), context)
        except Exception as error:  # noqa: BLE001 - the edge: every error becomes a status, and unknown ones are logged
            await abort(context, error)

    return grpc.unary_stream_rpc_method_handler(call, response_serializer=serialize)


Read: TypeAlias = Callable[[], Awaitable[RequestT | None]]
"""The next message of a client; None after the last."""


def client_stream(kind: type[RequestT], method: Callable[[Read[RequestT], Context], Awaitable[ResponseT]]) -> grpc.RpcMethodHandler[Any, Any]:
    """`method` may refuse before it has read anything, and then nothing more is taken in."""

    async def call(_: object, context: Context) -> ResponseT | None:
        async def read() -> RequestT | None:
            data = await context.read()
            return None if data is grpc.aio.EOF else parse(kind, data)

        try:
            return await method(read, context)
        except Exception as error:  # noqa: BLE001 - the edge: every error becomes a status, and unknown ones are logged
            await abort(context, error)
            return None

    return grpc.stream_unary_rpc_method_handler(call, response_serializer=serialize)


def serialize(message: Message) -> bytes:
    return message.SerializeToString()
