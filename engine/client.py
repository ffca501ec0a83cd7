"""The Python client, for plain and for asyncio code.

    with Client("localhost:50051") as client:
        result = client.generate("a yellow star grows on a purple background")
        Path("star.mp4").write_bytes(result.artifacts[0].data)

Errors are those of `reelstep.errors`, as the server raised them. Every artifact is checked against its CRC and SHA-256.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, TypedDict, Unpack

import google_crc32c
import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from reelstep import errors
from reelstep.engine.media_types import NO_PICTURE
from reelstep.engine.request import CHUNK_BYTES, PEFT_FILE, SPEC_NAMES, Progress, Queued, read_file
from reelstep.engine.result import Artifact, ClientEvent, Cost, Generation, PreviewFile
from reelstep.errors import FieldViolation, InternalError, InvalidRequest, ReelstepError
from reelstep.protos.reelstep.v1 import lora_pb2
from reelstep.protos.reelstep.v1 import media_pb2 as pb

DEFAULT_ADDRESS = "localhost:50051"
SERVICE = pb.DESCRIPTOR.services_by_name["MediaService"].full_name
LORA_SERVICE = lora_pb2.DESCRIPTOR.services_by_name["LoraService"].full_name
GENERATE = (f"/{SERVICE}/Generate", pb.GenerateRequest.SerializeToString, pb.GenerateResponse.FromString)
LIST_MODELS = (f"/{SERVICE}/ListModels", pb.ListModelsRequest.SerializeToString, pb.ListModelsResponse.FromString)
LOAD_LORA = (f"/{LORA_SERVICE}/LoadLora", lora_pb2.LoadLoraRequest.SerializeToString, lora_pb2.LoadLoraResponse.FromString)
UNLOAD_LORA = (f"/{LORA_SERVICE}/UnloadLora", lora_pb2.UnloadLoraRequest.SerializeToString, lora_pb2.UnloadLoraResponse.FromString)
CHANNEL_OPTIONS = (("grpc.keepalive_time_ms", 30_000), ("grpc.keepalive_timeout_ms", 10_000))
"""Finds a server that vanished without closing the connection, as in a power cut."""

PLAIN: Mapping[str, type[ReelstepError]] = {
    "REELSTEP_ERROR": ReelstepError,
    "CONFIG_ERROR": errors.ConfigError,
    "UNSUPPORTED_REQUEST": errors.UnsupportedRequest,
    "NOT_FOUND": errors.NotFound,
    "ALREADY_EXISTS": errors.AlreadyExists,
    "NOT_ALLOWED": errors.NotAllowed,
    "BUNDLE_ERROR": errors.BundleError,
    "COMPILE_ERROR": errors.CompileError,
    "CANCELLED": errors.Cancelled,
    "STORAGE_ERROR": errors.StorageError,
    "INTERNAL_ERROR": errors.InternalError,
}
"""Errors that are their message, by the reason in ErrorInfo. The others carry more and are rebuilt in `from_status`."""


Lora = pb.Model.Lora
"""An adapter that a server has loaded: name, rank, layers, sha256 of its file."""


class Options(TypedDict, total=False):
    """Choices of one generation. What is left out, or None, is the model's default; GenerationSpec in media.proto has the limits."""

    model: str | None
    negative_prompt: str | None
    image: bytes | Path | None
    seed: int | None
    count: int | None
    width: int | None
    height: int | None
    frames: int | None
    frames_per_second: float | None
    steps: int | None
    scale: float | None
    solver: str | None
    schedule: str | None
    guidance: str | None  # a rule
    guidance_options: Mapping[str, float] | None  # of the rule
    quality: str | None  # draft, standard, best, or auto for the best that `timeout` allows, in place of steps, scale, solver, schedule and guidance
    step_cache: str | None  # a rule
    step_cache_options: Mapping[str, float] | None  # of that rule
    lora: Mapping[str, float] | None  # strengths of adapters that the server has loaded, by name
    media_type: str | None
    preview_every: int | None  # steps between previews
    request_id: str | None  # a UUID


OWN_NAMES = {there: here for here, there in SPEC_NAMES.items()}
"""From GenerationSpec's names."""
LARGEST: Mapping[int, int] = {FieldDescriptor.CPPTYPE_UINT32: 2**32 - 1, FieldDescriptor.CPPTYPE_INT64: 2**63 - 1}
"""Whole number that a field of the wire holds, by its type."""


def build_request(prompt: str, options: Options) -> pb.GenerateRequest:
    """The message for a call. Raises InvalidRequest for values that the wire cannot carry, such as a negative number of steps or a picture of no bytes."""
    if odd := sorted(options.keys() - Options.__annotations__.keys()):
        raise InvalidRequest([FieldViolation(name, f"is no option; one of: {', '.join(Options.__annotations__)}") for name in odd])
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    request = pb.GenerateRequest(inline_artifacts=True)
    set_field(request, "request_id", given.pop("request_id", ""))
    set_field(request.preview, "every_steps", given.pop("preview_every", 0))
    if isinstance(image := given.get("image"), Path):
        given["image"] = read_file("image", image)
    if given.get("image") == b"":  # which the wire cannot tell from no picture, and another task would run
        raise InvalidRequest([FieldViolation("image", NO_PICTURE)])
    for options_field in ("guidance_options", "step_cache_options"):
        for option, value in given.pop(options_field, {}).items():
            set_option(request.spec, options_field, option, value)
    for name, strength in given.pop("lora", {}).items():
        add_lora(request.spec, name, strength)
    for name, value in {"prompt": prompt, **given}.items():
        set_field(request.spec, name, value, SPEC_NAMES.get(name, name))
    return request


def checked(timeout: float | None) -> float | None:
    """The same. Raises InvalidRequest for what is no time to wait."""
    if timeout is not None and not 0 < timeout < math.inf:
        raise InvalidRequest([FieldViolation("timeout", f"{timeout} is not a number of seconds above 0; None waits for as long as it takes")])
    return timeout


def set_field(message: Message, field: str, value: object, there: str = "") -> None:
    """there: what the message calls the field, if otherwise."""
    try:
        setattr(message, there or field, value)
    except UnicodeEncodeError as error:
        raise InvalidRequest([FieldViolation(field, "is not UTF-8 text; send it as UTF-8")]) from error
    except (ValueError, TypeError) as error:
        most = LARGEST.get(message.DESCRIPTOR.fields_by_name[there or field].cpp_type)
        why = f"is not a whole number from 0 to {most}" if most else f"cannot be sent: {error}"
        raise InvalidRequest([FieldViolation(field, f"{value!r:.80} {why}")]) from error


def set_option(spec: pb.GenerationSpec, field: str, option: str, value: Any) -> None:
    try:
        getattr(spec, field)[option] = value
    except (ValueError, TypeError) as error:
        raise InvalidRequest([FieldViolation(field, f"{option!r:.80}: {value!r:.80} cannot be sent: {error}")]) from error


def add_lora(spec: pb.GenerationSpec, name: Any, strength: Any) -> None:
    try:
        spec.lora.add(name=name, strength=strength)
    except (ValueError, TypeError) as error:
        raise InvalidRequest([FieldViolation("lora", f"{name!r:.80}: {strength!r:.80} cannot be sent: {error}")]) from error


def lora_parts(name: str, file: Path, model: str | None, replace: bool) -> Iterator[lora_pb2.LoadLoraRequest]:
    """The messages of an upload; the file is read, with the configuration of PEFT where one lies beside it, before this returns."""
    data, beside = read_file("file", file), file.with_name(PEFT_FILE)
    start = lora_pb2.LoadLoraRequest.Start(size_bytes=len(data), sha256=hashlib.sha256(data).digest(), replace=replace)
    config = read_file("adapter_config", beside).decode("utf-8", "replace") if beside.is_file() else ""
    for key, value in (("name", name), ("model", model or ""), ("adapter_config", config)):
        set_field(start, key, value)
    return chain((lora_pb2.LoadLoraRequest(start=start),), map(partial(lora_part, data), range(0, len(data), CHUNK_BYTES)))


def lora_part(data: bytes, offset: int) -> lora_pb2.LoadLoraRequest:
    piece = data[offset : offset + CHUNK_BYTES]
    return lora_pb2.LoadLoraRequest(chunk=lora_pb2.LoadLoraRequest.Chunk(offset=offset, data=piece, crc32c=google_crc32c.value(piece)))


def unload_request(name: str, model: str | None) -> lora_pb2.UnloadLoraRequest:
    request = lora_pb2.UnloadLoraRequest()
    set_field(request, "name", name)
    set_field(request, "model", model or "")
    return request


class Assembler:
    """Turns the messages of one call into events; puts artifacts together and checks them. Raises InternalError for damage."""

    def __init__(self) -> None:
        self._open: pb.Artifact | None = None
        self._pieces: list[bytes] = []
        self._done: list[Artifact] = []
        self.finished = False

    def feed(self, response: pb.GenerateResponse) -> Iterator[ClientEvent]:
        """The events in one message, none or one."""
        if response.HasField("chunk"):
            yield from self._chunk(response.chunk)
            return
        event = response.event
        kind = event.WhichOneof("kind")
        if kind == "queued":
            yield Queued(event.queued.position, seconds(event.queued.estimated_wait))
        elif kind == "progress":
            p = event.progress
            yield Progress(p.stage, p.step, p.steps, seconds(p.estimated_remaining))
        elif kind == "preview":
            yield PreviewFile(event.preview.step, event.preview.media_type, event.preview.data)
        elif kind == "artifact":
            self._open, self._pieces = event.artifact, []
        elif kind == "finished":
            self.finished = True
            yield self._generation(event.finished)

    def _chunk(self, chunk: pb.ArtifactChunk) -> Iterator[Artifact]:
        expected = sum(map(len, self._pieces))
        if self._open is None or chunk.artifact != self._open.name or chunk.offset != expected:
            raise InternalError(f"{chunk.artifact}: a piece at byte {chunk.offset} came where byte {expected} was due; send the request again")
        if google_crc32c.value(chunk.data) != chunk.crc32c:
            raise InternalError(f"{chunk.artifact}: the piece at byte {chunk.offset} is damaged; send the request again")
        self._pieces.append(chunk.data)
        if chunk.last:
            yield self._close(self._open, b"".join(self._pieces))

    def _close(self, artifact: pb.Artifact, data: bytes) -> Artifact:
        if len(data) != artifact.size_bytes or hashlib.sha256(data).digest() != artifact.sha256:
            raise InternalError(f"{artifact.name}: {len(data)} of {artifact.size_bytes} bytes came and their SHA-256 does not match; send the request again")
        self._open = None
        done = Artifact(artifact.name, artifact.media_type, data, artifact.width, artifact.height, artifact.frames, artifact.seed)
        self._done.append(done)
        return done

    def _generation(self, job: pb.Job) -> Generation:
        if [a.name for a in job.artifacts] != [a.name for a in self._done]:
            raise InternalError(f"{job.name}: {len(self._done)} of {len(job.artifacts)} artifacts came; send the request again")
        usage = job.usage
        return Generation(
            id=job.name.removeprefix("jobs/"),
            model=job.spec.model,
            task=usage.task,
            solver=usage.solver,
            schedule=usage.schedule,
            steps=job.spec.steps,
            guidance=usage.guidance_rule,
            scale=usage.guidance,
            quality=usage.quality,
            step_cache=usage.step_cache,
            artifacts=tuple(self._done),
            usage=Cost(usage.nfe, usage.forwards, usage.cached, seconds(usage.queue), {name: seconds(span) for name, span in usage.compute.items()}),
            lora={each.name: each.strength for each in job.spec.lora},
            auto=usage.auto,
        )


def seconds(span: Any) -> float:
    """A protobuf Duration in seconds."""
    return float(span.seconds + span.nanos * 1e-9)


def from_error(error: grpc.RpcError, address: str, started: bool) -> ReelstepError:
    """What a failed call means. Without details it was gRPC that failed, not our server. started: answers had come."""
    code, text = error.code(), error.details() or ""
    trailers: Any = error.trailing_metadata() or ()
    for key, value in trailers:
        if key == "grpc-status-details-bin":
            return from_status(status_pb2.Status.FromString(value))
    if code is grpc.StatusCode.UNAVAILABLE:
        happened = "went away while it was generating; ask again once it is back" if started else "does not answer; is `reelstep serve` running there?"
        return errors.Unavailable(f"the server at {address} {happened} ({text})", retry_after_s=1.0)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.DeadlineExceeded("waiting for the answer")
    if code is grpc.StatusCode.CANCELLED:
        return errors.Cancelled("the call was cancelled")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:  # only gRPC's own size limits come without details
        return InvalidRequest([FieldViolation("request", f"too large for the server; send a smaller picture or a shorter prompt ({text})")])
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return errors.UnsupportedRequest(f"the server at {address} does not serve this call; is it of another version? ({text})")
    return InternalError(f"{code.name}: {text}")


def from_status(status: status_pb2.Status) -> ReelstepError:
    """The error that the server raised, rebuilt from its rich status."""
    info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    for detail in status.details:
        for kind in (info, bad, retry):
            detail.Unpack(kind)  # fills only the one whose type it is
    if info.reason == "INVALID_REQUEST":
        return InvalidRequest(FieldViolation(OWN_NAMES.get(v.field, v.field), v.description) for v in bad.field_violations)
    if info.reason == "DEADLINE_EXCEEDED":
        return errors.DeadlineExceeded(info.metadata["stage"])
    if info.reason == "OVERLOADED":
        return errors.Overloaded(status.message, seconds(retry.retry_delay))
    if info.reason == "UNAVAILABLE":
        return errors.Unavailable(status.message, seconds(retry.retry_delay))
    return PLAIN.get(info.reason, ReelstepError)(status.message)


def incomplete(address: str) -> InternalError:
    return InternalError(f"the server at {address} ended the stream without a result; is it of another version?")


class Client:
    """Blocking client. Safe to share between threads; close it, or use it in `with`."""

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        self.address = address
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._generate = self._channel.unary_stream(*GENERATE)
        self._models = self._channel.unary_unary(*LIST_MODELS)
        self._load_lora = self._channel.stream_unary(*LOAD_LORA)
        self._unload_lora = self._channel.unary_unary(*UNLOAD_LORA)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what runs and disconnect."""
        self._channel.close()

    def models(self, timeout: float | None = None) -> list[pb.Model]:
        """What the server has loaded, with limits and defaults."""
        found: list[pb.Model] = []
        request = pb.ListModelsRequest()
        try:
            while True:
                page = self._models(request, timeout=checked(timeout))
                found += page.models
                if not page.next_page_token:
                    return found
                request.page_token = page.next_page_token
        except grpc.RpcError as error:
            raise from_error(error, self.address, started=False) from error

    def load_lora(self, name: str, file: Path, *, model: str | None = None, replace: bool = False, timeout: float | None = None) -> Lora:
        """Load a safetensors file into the server, for requests to name; what PEFT wrote goes with the adapter_config.json beside it.

        The same adapter again is no error. replace: another one of this name, which otherwise is AlreadyExists. model: where the server has several.
        """
        try:
            return self._load_lora(lora_parts(name, file, model, replace), timeout=checked(timeout)).lora
        except grpc.RpcError as error:
            raise from_error(error, self.address, started=False) from error

    def unload_lora(self, name: str, *, model: str | None = None, timeout: float | None = None) -> None:
        """Requests that arrive later cannot name it; those that run or wait keep it."""
        try:
            self._unload_lora(unload_request(name, model), timeout=checked(timeout))
        except grpc.RpcError as error:
            raise from_error(error, self.address, started=False) from error

    def generate(
        self,
        prompt: str,
        *,
        timeout: float | None = None,
        on_event: Callable[[ClientEvent], None] | None = None,
        **options: Unpack[Options],
    ) -> Generation:
        """Make it and wait for it. timeout: seconds, after which the server stops too. on_event: told of every event."""
        for event in self.stream(prompt, timeout=timeout, **options):
            if on_event is not None:
                on_event(event)
            if isinstance(event, Generation):
                return event
        raise incomplete(self.address)

    def stream(self, prompt: str, *, timeout: float | None = None, **options: Unpack[Options]) -> Generator[ClientEvent, None, None]:
        """Events as they come, the Generation last. Closing the iterator cancels the work."""
        return self._events(build_request(prompt, options), checked(timeout))

    def _events(self, request: pb.GenerateRequest, timeout: float | None) -> Generator[ClientEvent, None, None]:
        assembler, started = Assembler(), False
        call = self._generate(request, timeout=timeout)
        try:
            for response in call:
                started = True
                yield from assembler.feed(response)
        except grpc.RpcError as error:
            raise from_error(error, self.address, started) from error
        finally:
            call.cancel()
        if not assembler.finished:
            raise incomplete(self.address)


class AsyncClient:
    """The same for asyncio. Make and use it on one event loop; close it, or use it in `async with`."""

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        self.address = address
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._generate = self._channel.unary_stream(*GENERATE)
        self._models = self._channel.unary_unary(*LIST_MODELS)
        self._load_lora = self._channel.stream_unary(*LOAD_LORA)
        self._unload_lora = self._channel.unary_unary(*UNLOAD_LORA)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what runs and disconnect."""
        await self._channel.close()

    async def models(self, timeout: float | None = None) -> list[pb.Model]:
        """What the server has loaded, with limits and defaults."""
        found: list[pb.Model] = []
        request = pb.ListModelsRequest()
        try:
            while True:
                page = await self._models(request, timeout=checked(timeout))
                found += page.models
                if not page.next_page_token:
                    return found
                request.page_token = page.next_page_token
        except grpc.RpcError as error:
            raise from_error(error, self.address, started=False) from error

    async def load_lora(self, name: str, file: Path, *, model: str | None = None, replace: bool = False, timeout: float | None = None) -> Lora:
        """Load a safetensors file into the server, for requests to name; what PEFT wrote goes with the adapter_config.json beside it.

        The same adapter again is no error. replace: another one of this name, which otherwise is AlreadyExists. model: where the server has several.
        """
        try:
            return (await self._load_lora(await asyncio.to_thread(lora_parts, name, file, model, replace), timeout=checked(timeout))).lora
        except grpc.RpcError as error:
            raise from_error(error, self.address, started=False) from error

    async def unload_lora(self, name: str, *, model: str | None = None, timeout: float | None = None) -> None:
        """Requests that arrive later cannot name it; those that run or wait keep it."""
        try:
            await self._unload_lora(unload_request(name, model), timeout=checked(timeout))
        except grpc.RpcError as error:
            raise from_error(error, self.address, started=False) from error

    async def generate(
        self,
        prompt: str,
        *,
        timeout: float | None = None,
        on_event: Callable[[ClientEvent], None] | None = None,
        **options: Unpack[Options],
    ) -> Generation:
        """Make it and wait for it. timeout: seconds, after which the server stops too. Cancelling the task cancels the work."""
        async for event in self.stream(prompt, timeout=timeout, **options):
            if on_event is not None:
                on_event(event)
            if isinstance(event, Generation):
                return event
        raise incomplete(self.address)

    def stream(self, prompt: str, *, timeout: float | None = None, **options: Unpack[Options]) -> AsyncGenerator[ClientEvent, None]:
        """Events as they come, the Generation last. Closing the iterator cancels the work."""
        return self._events(build_request(prompt, options), checked(timeout))

    async def _events(self, request: pb.GenerateRequest, timeout: float | None) -> AsyncGenerator[ClientEvent, None]:
        assembler, started = Assembler(), False
        call = self._generate(request, timeout=timeout)
        try:
            async for response in call:
                started = True
                for event in assembler.feed(response):
                    yield event
        except grpc.RpcError as error:
            raise from_error(error, self.address, started) from error
        finally:
            call.cancel()
        if not assembler.finished:
            raise incomplete(self.address)
