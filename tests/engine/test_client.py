"""The client, sync and asyncio, against a fake engine's server; and damage that only a broken server would send."""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import pytest

from reelstep.engine.client import Assembler, AsyncClient, Client
from reelstep.engine.result import Artifact, Generation, PreviewFile
from reelstep.errors import DeadlineExceeded, InternalError, InvalidRequest, NotFound, Overloaded, Unavailable
from reelstep.protos.reelstep.v1 import media_pb2 as pb
from reelstep.tests.engine.service.in_process import Served, served, wait_until


@pytest.fixture(scope="module")
def fake() -> Iterator[Served]:
    with served() as running:
        yield running


def test_a_generation_has_its_files_seeds_and_cost(fake: Served) -> None:
    with Client(fake.address) as client:
        got = client.generate("a fox", seed=3, count=2, steps=5, scale=2.0, solver="heun", media_type="image/webp")
    assert got.seeds == (3, 4)
    assert all(a.data[8:12] == b"WEBP" and (a.width, a.height, a.frames) == (64, 64, 8) for a in got.artifacts)
    assert (got.model, got.task, got.solver, got.schedule, got.steps, got.scale) == ("fake", "text_to_video", "heun", "linear", 5, 2.0)
    assert (got.usage.nfe, got.usage.forwards, got.usage.queue_s, got.usage.compute_s) == (5, 10, 0.25, {"denoise": 1.5, "decode": 0.5})


def test_a_generation_says_which_quality_it_was_and_what_that_chose(fake: Served) -> None:
    with Client(fake.address) as client:
        got = client.generate("a fox", quality="draft")
        assert (got.quality, got.solver, got.steps, got.guidance, got.scale) == ("draft", "bns_6", 6, "cfg", 2.5)
        assert not got.auto
        got = client.generate("a fox", quality="auto", timeout=10)
        assert (got.quality, got.auto, got.solver, got.steps) == ("draft", True, "bns_6", 6)
        assert client.generate("a fox").quality == ""
        with pytest.raises(InvalidRequest, match=r"leave quality out, or else solver, the guidance scale$"):
            client.generate("a fox", quality="draft", solver="heun", scale=1.0)
        with pytest.raises(NotFound, match="it has: draft, standard, best"):
            client.generate("a fox", quality="ultra")


def test_a_generation_says_which_step_cache_ran_and_what_it_skipped(fake: Served) -> None:
    with Client(fake.address) as client:
        got = client.generate("a fox", steps=5, step_cache="skip", step_cache_options={"threshold": 0.5})
        assert (got.step_cache, got.usage.forwards, got.usage.cached) == ("skip", 5, 5)
        plain = client.generate("a fox", steps=5)
        assert (plain.step_cache, plain.usage.forwards, plain.usage.cached) == ("", 10, 0)
        with pytest.raises(InvalidRequest, match=r"step_cache_options: 'threshold': 'high' cannot be sent"):
            client.generate("a fox", step_cache="skip", step_cache_options={"threshold": "high"})  # type: ignore[dict-item]


def test_asyncio_gives_the_same_as_plain_code(fake: Served) -> None:
    async def run() -> tuple[Generation, list[pb.Model]]:
        async with AsyncClient(fake.address) as client:
            return await client.generate("a fox", seed=3), await client.models()

    got, models = asyncio.run(run())
    with Client(fake.address) as client:
        assert client.generate("a fox", seed=3).artifacts[0].data == got.artifacts[0].data
        assert client.models() == models


def test_a_stream_tells_of_previews_then_artifacts_then_the_result(fake: Served) -> None:
    with Client(fake.address) as client:
        events = list(client.stream("slow", preview_every=1))
    kinds = [type(e) for e in events]
    assert PreviewFile in kinds
    assert kinds[-2:] == [Artifact, Generation]


def test_closing_a_stream_stops_the_work(fake: Served) -> None:
    with Client(fake.address) as client:
        events = client.stream("endless")
        next(events)
        one = fake.engine.requests[-1].id
        events.close()
        wait_until(lambda: one in fake.engine.cancelled)


def test_cancelling_a_task_stops_the_work(fake: Served) -> None:
    async def run() -> str:
        async with AsyncClient(fake.address) as client:
            started = asyncio.Event()
            task = asyncio.create_task(client.generate("endless", on_event=lambda _: started.set()))
            await started.wait()
            one = fake.engine.requests[-1].id
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return one

    one = asyncio.run(run())
    wait_until(lambda: one in fake.engine.cancelled)


def test_errors_are_those_that_the_server_raised(fake: Served) -> None:
    with Client(fake.address) as client:
        with pytest.raises(InvalidRequest) as invalid:
            client.generate("", steps=0)
        with pytest.raises(NotFound, match="known: fake"):
            client.generate("a fox", model="nonesuch")
        with pytest.raises(Overloaded) as full:
            client.generate("full")
        with pytest.raises(DeadlineExceeded):
            client.generate("endless", timeout=0.3)
    assert {v.field for v in invalid.value.violations} == {"prompt", "steps"}
    assert full.value.retry_after_s == 2.5


@pytest.mark.parametrize(
    ("says", "options"),
    [
        ("steps: -1 is not a whole number from 0 to 4294967295", {"steps": -1}),
        ("steps: 2.5 is not a whole number from 0 to 4294967295", {"steps": 2.5}),
        ("count: 1099511627776 is not a whole number from 0 to 4294967295", {"count": 2**40}),
        ("seed: 9223372036854775808 is not a whole number from 0 to 9223372036854775807", {"seed": 2**63}),
        ("every_steps: -1 is not a whole number", {"preview_every": -1}),
        ("scale: 'high' cannot be sent: ", {"scale": "high"}),
        ("fps: is no option; one of: model, negative_prompt, image, seed, count, width", {"fps": 8.0}),
        ("timeout: nan is not a number of seconds above 0", {"timeout": math.nan}),
        ("timeout: -1 is not a number of seconds above 0", {"timeout": -1}),
        ("image: is not a picture that can be read; send one of: PNG, JPEG, WEBP, GIF", {"image": b""}),
        ("image: is not a picture that can be read; send one of: PNG, JPEG, WEBP, GIF", {"image": Path(os.devnull)}),
    ],
)
def test_what_the_wire_cannot_carry_is_refused_before_it_is_sent(says: str, options: dict[str, object]) -> None:
    with Client("localhost:1") as client, pytest.raises(InvalidRequest) as caught:
        client.generate("a fox", **options)  # type: ignore[arg-type]
    assert len(caught.value.violations) == 1
    assert str(caught.value).startswith(says)


CALLS: list[Callable[[Any], Any]] = [
    lambda client: client.models(timeout=-1),
    lambda client: client.load_lora("a", Path(os.devnull), timeout=-1),
    lambda client: client.unload_lora("a", timeout=-1),
]


@pytest.mark.parametrize("call", CALLS, ids=["models", "load_lora", "unload_lora"])
def test_a_time_that_is_none_is_refused_by_every_call_of_both_clients(call: Callable[[Any], Any]) -> None:
    async def run() -> None:
        async with AsyncClient("localhost:1") as client:
            await call(client)

    says = "timeout: -1 is not a number of seconds above 0"
    with Client("localhost:1") as client, pytest.raises(InvalidRequest, match=says):
        call(client)
    with pytest.raises(InvalidRequest, match=says):
        asyncio.run(run())


def test_a_prompt_that_was_not_utf8_on_the_command_line_is_refused() -> None:
    with Client("localhost:1") as client, pytest.raises(InvalidRequest, match="prompt: is not UTF-8"):
        client.generate("caf\udce9")


def test_no_server_is_unavailable_and_says_what_to_start() -> None:
    with Client("localhost:1") as client, pytest.raises(Unavailable, match="is `reelstep serve` running there"):
        client.generate("a fox")


def test_a_request_too_large_for_the_server_says_so(fake: Served) -> None:
    with Client(fake.address) as client, pytest.raises(InvalidRequest, match="too large for the server"):
        client.generate("a fox", image=b"x" * (12 << 20))


DATA = b"0123456789"


def artifact_event() -> pb.GenerateResponse:
    artifact = pb.Artifact(name="artifacts/a", size_bytes=len(DATA), sha256=hashlib.sha256(DATA).digest())
    return pb.GenerateResponse(event=pb.JobEvent(artifact=artifact))


def chunk(data: bytes, offset: int = 0, crc: int | None = None, name: str = "artifacts/a") -> pb.GenerateResponse:
    value = google_crc32c.value(data) if crc is None else crc
    return pb.GenerateResponse(chunk=pb.ArtifactChunk(artifact=name, offset=offset, data=data, crc32c=value, last=True))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (chunk(DATA, crc=1), "is damaged"),
        (chunk(DATA, offset=5), "came where byte 0 was due"),
        (chunk(DATA, name="artifacts/b"), "came where"),
        (chunk(DATA[:-1]), "9 of 10 bytes"),
        (chunk(b"x" * 10), "SHA-256 does not match"),
    ],
)
def test_damaged_artifacts_are_never_handed_out(bad: pb.GenerateResponse, says: str) -> None:
    assembler = Assembler()
    assert list(assembler.feed(artifact_event())) == []
    with pytest.raises(InternalError, match=says):
        list(assembler.feed(bad))


def test_a_result_without_its_artifacts_is_an_error() -> None:
    job = pb.Job(name="jobs/1", artifacts=[pb.Artifact(name="artifacts/a")])
    with pytest.raises(InternalError, match="0 of 1 artifacts"):
        list(Assembler().feed(pb.GenerateResponse(event=pb.JobEvent(finished=job))))
