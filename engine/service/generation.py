"""MediaService: each method checks, calls the engine, translates and returns."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar, cast

import grpc
from google.protobuf.timestamp_pb2 import Timestamp

from reelstep.engine.media import Pixels, encode
from reelstep.engine.request import CHUNK_BYTES, Failed, Finished, Preview, Request
from reelstep.engine.resolve import DEFAULT_MEDIA_TYPE, Engine, resolve
from reelstep.engine.service import messages
from reelstep.engine.service.calls import Context, server_stream, unary
from reelstep.engine.service.mailbox import Mailbox
from reelstep.errors import DeadlineExceeded, FieldViolation, InvalidRequest, Unavailable
from reelstep.protos.reelstep.v1 import media_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["MediaService"].full_name
MAX_PAGE = 100
RETRY_AFTER_S = 1.0
DELIVERY_S = 30.0
"""After a request's deadline, by which it is computed, for a client to take what it asked for; one that reads nothing holds it no longer."""

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One running Generate: what was asked and what runs for it."""

    call: pb.GenerateRequest
    request: Request
    media_type: str
    created: Timestamp

    @property
    def name(self) -> str:
        return f"jobs/{self.request.id}"


class MediaService:
    """The methods of reelstep.v1.MediaService. `engine` is None until it is loaded; `closed` says why no new work is taken."""

    def __init__(self, media_threads: Executor, max_request_s: float) -> None:
        self.engine: Engine | None = None
        self.closed = "the server is loading its models"
        self.running: set[str] = set()
        self.idle = asyncio.Event()
        self.idle.set()
        self._media_threads = media_threads
        self._max_request_s = max_request_s

    def open(self, engine: Engine) -> None:
        self.engine, self.closed = engine, ""

    def handler(self) -> grpc.GenericRpcHandler:
        methods = {
            "Generate": server_stream(pb.GenerateRequest, self.generate),
            "ListModels": unary(pb.ListModelsRequest, self.list_models),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    async def list_models(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:
        models = self.ready().models
        names = sorted(name for name in models if name > request.page_token)
        page = names[: min(request.page_size or MAX_PAGE, MAX_PAGE)]
        token = page[-1] if len(page) < len(names) else ""
        return pb.ListModelsResponse(models=[messages.to_model(models[name]) for name in page], next_page_token=token)

    async def generate(self, call: pb.GenerateRequest, context: Context) -> None:
        engine = self.ready()
        job = await self._job(engine, call, context)
        mailbox = Mailbox()
        self._enter(job.request.id)
        try:
            engine.submit(job.request, mailbox.post)
            async with asyncio.timeout(job.request.deadline - time.monotonic() + DELIVERY_S):
                await self._watch(job, mailbox, Stream(context))
        except TimeoutError:
            raise DeadlineExceeded("delivering") from None
        finally:
            engine.cancel(job.request.id)
            self._leave(job.request.id)

    async def _job(self, engine: Engine, call: pb.GenerateRequest, context: Context) -> Job:
        """Check the whole request. Raises what `resolve` raises, and DeadlineExceeded for one that comes too late."""
        created = messages.now()
        ask = messages.to_ask(call, self._deadline(context))
        request = await self._in_thread(lambda: resolve(ask, engine.models))
        if request.deadline <= time.monotonic():
            raise DeadlineExceeded("arriving")
        if request.id in self.running:
            raise InvalidRequest([FieldViolation("request_id", f"{request.id} is running already; use another")])
        return Job(call, request, ask.media_type or DEFAULT_MEDIA_TYPE, created)

    def ready(self) -> Engine:
        """Raises Unavailable while no new work is taken."""
        if self.engine is None or self.closed:
            raise Unavailable(f"{self.closed}; try again soon, or another replica", RETRY_AFTER_S)
        return self.engine

    def _deadline(self, context: Context) -> float:
        left = cast(float | None, context.time_remaining())  # None without a deadline, which the stubs leave out
        return time.monotonic() + (self._max_request_s if left is None else min(left, self._max_request_s))

    def _enter(self, request_id: str) -> None:
        self.running.add(request_id)
        self.idle.clear()

    def _leave(self, request_id: str) -> None:
        self.running.discard(request_id)
        if not self.running:
            self.idle.set()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._media_threads, work)

    async def _watch(self, job: Job, mailbox: Mailbox, stream: Stream) -> None:
        """Follow the job to its end. Raises the error of a job that failed."""
        while not isinstance(event := await mailbox.get(), Finished):
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Preview):
                preview = await self._in_thread(partial(encode_preview, event, job.call.preview, job.request.frames_per_second))
                await stream.event(pb.JobEvent(preview=preview))
            else:
                await stream.event(messages.to_status_event(event))
        await self._deliver(job, event, stream)

    async def _deliver(self, job: Job, end: Finished, stream: Stream) -> None:
        """Every output as an artifact event and its chunks, one encoded at a time; then `finished`."""
        artifacts = []
        for index, (frames, seed) in enumerate(zip(end.media.frames, end.media.seeds, strict=True)):
            data = await self._in_thread(partial(encode, frames, end.media.frames_per_second, job.media_type))
            artifact = describe(f"artifacts/{job.request.id}-{index}", job.media_type, data, frames, seed)
            artifacts.append(artifact)
            await stream.event(pb.JobEvent(artifact=artifact))
            for offset in range(0, len(data), CHUNK_BYTES):
                await stream.chunk(messages.to_chunk(artifact.name, data, offset, CHUNK_BYTES))
        await stream.event(pb.JobEvent(finished=finished(job, end, artifacts)))


class Stream:
    """Writes to one client, and gives each event its sequence number and time."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._sequence = 0

    async def event(self, event: pb.JobEvent) -> None:
        self._sequence += 1
        event.sequence = self._sequence
        event.time.CopyFrom(messages.now())
        await self._context.write(pb.GenerateResponse(event=event))

    async def chunk(self, chunk: pb.ArtifactChunk) -> None:
        await self._context.write(pb.GenerateResponse(chunk=chunk))


def describe(name: str, media_type: str, data: bytes, frames: Pixels, seed: int) -> pb.Artifact:
    count, height, width, _ = frames.shape
    sha256 = hashlib.sha256(data).digest()
    return pb.Artifact(name=name, media_type=media_type, size_bytes=len(data), sha256=sha256, width=width, height=height, frames=count, seed=seed)


def finished(job: Job, end: Finished, artifacts: list[pb.Artifact]) -> pb.Job:
    ran = job.request.settled(end.usage.quality)
    start = Timestamp()
    start.FromNanoseconds(job.created.ToNanoseconds() + round(end.usage.queue_s * 1e9))
    return pb.Job(
        name=job.name,
        state=pb.JOB_STATE_SUCCEEDED,
        spec=messages.to_spec(replace(ran, seed=end.media.seeds[0]), job.media_type),
        create_time=job.created,
        start_time=start,
        end_time=messages.now(),
        steps_done=ran.steps,
        steps_total=ran.steps,
        artifacts=artifacts,
        priority=job.request.priority,
        attempt=1,
        usage=messages.to_usage(ran, end.usage, job.call.spec.quality),
    )


def encode_preview(event: Preview, policy: pb.PreviewPolicy, frames_per_second: float) -> pb.JobEvent.Preview:
    """The first output, at half the size again and again until it fits."""
    media_type = policy.media_type or messages.PREVIEW_MEDIA_TYPE
    most = policy.max_bytes or messages.MAX_PREVIEW_BYTES
    frames = event.frames[0]
    data = encode(frames, frames_per_second, media_type)
    while len(data) > most and max(frames.shape[1:3]) > 1:
        frames = frames[:, ::2, ::2]
        data = encode(frames, frames_per_second, media_type)
    return pb.JobEvent.Preview(media_type=media_type, data=data, step=event.step)
