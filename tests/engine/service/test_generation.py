"""MediaService over a real connection, driven by a plain gRPC client with default limits."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from uuid import uuid4

import google_crc32c
import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2

from reelstep.engine.media import fit_picture
from reelstep.engine.models.spec import Distilled
from reelstep.engine.service import generation, messages
from reelstep.engine.service.generation import SERVICE
from reelstep.protos.reelstep.v1 import media_pb2 as pb
from reelstep.tests.engine.service.fake_engine import FakeEngine, FakeModel, FakeSettings
from reelstep.tests.engine.service.in_process import Served, served, wait_until

MIB = 1 << 20


@pytest.fixture(scope="module")
def channel(fake: Served) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(fake.address) as channel:
        yield channel


def request(prompt: str = "a fox", **spec: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(spec=pb.GenerationSpec(prompt=prompt, **spec), inline_artifacts=True)  # type: ignore[arg-type]


def call(channel: grpc.Channel, message: pb.GenerateRequest | bytes, timeout: float | None = 10) -> list[pb.GenerateResponse]:
    method = channel.unary_stream(f"/{SERVICE}/Generate", response_deserializer=pb.GenerateResponse.FromString)
    data = message if isinstance(message, bytes) else message.SerializeToString()
    return list(method(data, timeout=timeout))


def refused(channel: grpc.Channel, message: pb.GenerateRequest | bytes, timeout: float | None = 10) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """Code, message and violations by field of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, message, timeout)
    violations: dict[str, str] = {}
    for key, value in caught.value.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                bad = error_details_pb2.BadRequest()
                if detail.Unpack(bad):
                    violations = {v.field: v.description for v in bad.field_violations}
    return caught.value.code(), caught.value.details(), violations


def test_a_large_artifact_reaches_a_client_with_default_limits_in_checked_pieces(channel: grpc.Channel) -> None:
    responses = call(channel, request(width=512, height=384, frames=8, seed=5, output_media_type="image/png"))
    events = [r.event for r in responses if r.HasField("event")]
    chunks = [r.chunk for r in responses if r.HasField("chunk")]
    artifact = next(e.artifact for e in events if e.HasField("artifact"))
    data = b"".join(c.data for c in chunks)
    assert artifact.size_bytes == len(data) > 4 * MIB
    assert hashlib.sha256(data).digest() == artifact.sha256
    assert all(google_crc32c.value(c.data) == c.crc32c for c in chunks)
    assert [c.offset for c in chunks] == [256 * 1024 * i for i in range(len(chunks))]
    assert [c.last for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert max(r.ByteSize() for r in responses) < MIB


def test_a_result_that_nobody_takes_is_held_no_longer_than_its_time(channel: grpc.Channel, fake: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "DELIVERY_S", -9.5)  # half a second for all of it, computing included
    code, text, _ = refused(channel, request("an endless fox"), timeout=10)
    assert code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "deadline exceeded while delivering" in text


def test_events_are_numbered_without_gaps_and_end_with_the_finished_job(channel: grpc.Channel) -> None:
    responses = call(channel, request("a slow fox", seed=7, count=2, steps=6, guidance=2.5, solver="heun"))
    events = [r.event for r in responses if r.HasField("event")]
    assert [e.sequence for e in events] == list(range(1, len(events) + 1))
    assert next(e.WhichOneof("kind") for e in events) == "queued"
    assert "progress" in [e.WhichOneof("kind") for e in events]
    job = responses[-1].event.finished
    assert job.state == pb.JOB_STATE_SUCCEEDED
    assert [a.seed for a in job.artifacts] == [7, 8]
    assert (job.spec.seed, job.spec.solver, job.spec.schedule, job.spec.frames, job.spec.width) == (7, "heun", "linear", 8, 64)
    assert (job.usage.nfe, job.usage.forwards, job.usage.guidance, job.usage.task) == (6, 12, 2.5, "text_to_video")
    assert job.usage.queue.ToMilliseconds() == 250
    assert {k: v.ToMilliseconds() for k, v in job.usage.compute.items()} == {"denoise": 1500, "decode": 500}
    assert job.create_time.ToDatetime() < job.end_time.ToDatetime()


def test_sending_the_finished_spec_again_gives_the_same_bytes(channel: grpc.Channel) -> None:
    first = call(channel, request(frames=1, output_media_type="image/png"))
    again = call(channel, pb.GenerateRequest(spec=first[-1].event.finished.spec, inline_artifacts=True))
    assert first[-1].event.finished.artifacts[0].sha256 == again[-1].event.finished.artifacts[0].sha256


def test_previews_fit_their_limit_however_large_the_video(channel: grpc.Channel) -> None:
    message = request("slow", width=512, height=384, frames=8)
    message.preview.CopyFrom(pb.PreviewPolicy(every_steps=1, max_bytes=9000))
    previews = [r.event.preview for r in call(channel, message) if r.event.HasField("preview")]
    assert previews
    assert all(0 < len(p.data) <= 9000 and p.media_type == "image/webp" and p.data[8:12] == b"WEBP" for p in previews)


@pytest.mark.parametrize(
    ("field", "spec"),
    [
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": " \n\t"}),
        ("prompt", {"prompt": "x" * 5000}),
        ("negative_prompt", {"negative_prompt": "é" * 3000}),
        ("steps", {"steps": 0}),
        ("steps", {"steps": 2**32 - 1}),
        ("frames", {"frames": 0}),
        ("frames", {"frames": 10**6}),
        ("width", {"width": 0}),
        ("width", {"width": 2**31, "height": 2**31}),
        ("width", {"width": 63}),
        ("count", {"count": 0}),
        ("count", {"count": 10**9}),
        ("guidance", {"guidance": math.nan}),
        ("guidance", {"guidance": math.inf}),
        ("guidance", {"guidance": -1.0}),
        ("guidance", {"guidance": 1e30}),
        ("guidance", {"guidance": 7.0, "guidance_rule": "none"}),
        ("guidance_options", {"guidance_options": {"treshold": 0.9}}),
        ("step_cache_options", {"step_cache": "skip", "step_cache_options": {"treshold": 0.9}}),
        ("step_cache_options", {"step_cache_options": {"threshold": 0.9}}),
        ("step_cache", {"step_cache": "skip", "steps": 2}),
        ("frames_per_second", {"frames_per_second": 0.0}),
        ("frames_per_second", {"frames_per_second": math.nan}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": 2**63 - 1}),
        ("image", {"image": b"hello, I am a text file"}),
        ("image", {"image": b"\x89PNG\r\n\x1a\n"}),
        ("image", {"image": b"x" * 100_001}),
        ("output_media_type", {"output_media_type": "video/x-matroska"}),
        ("spec.assets", {"assets": ["assets/1"]}),
    ],
)
def test_a_bad_field_is_named_before_any_work_is_done(fake: Served, channel: grpc.Channel, field: str, spec: dict[str, object]) -> None:
    before = len(fake.engine.requests)
    code, _, violations = refused(channel, request(**{"prompt": "a fox", **spec}))  # type: ignore[arg-type]
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert list(violations) == [field]
    assert len(fake.engine.requests) == before


def test_a_rule_of_guidance_and_its_options_reach_the_engine_and_come_back(fake: Served, channel: grpc.Channel) -> None:
    job = call(channel, request("a fox", guidance_rule="gate", guidance_options={"stop": 0.25}))[-1].event.finished
    assert (fake.engine.requests[-1].guidance, fake.engine.requests[-1].guidance_options) == ("gate", {"stop": 0.25})
    assert (job.spec.guidance_rule, dict(job.spec.guidance_options), job.usage.guidance_rule) == ("gate", {"stop": 0.25}, "gate")
    call(channel, request("a fox"))
    assert (fake.engine.requests[-1].guidance, fake.engine.requests[-1].guidance_options) == ("cfg", {"rescale": 0.0}), "the model's choice"
    call(channel, request("a fox", guidance_rule="none"))
    assert fake.engine.requests[-1].scale == 1, "a rule without a scale does not take the default one"
    code, message, _ = refused(channel, request("a fox", guidance_rule="gone"))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "cfg, gate, none" in message


def test_a_step_cache_and_its_options_reach_the_engine_come_back_and_are_counted_apart(fake: Served, channel: grpc.Channel) -> None:
    job = call(channel, request("a fox", steps=6, step_cache="skip", step_cache_options={"last": 2.0}))[-1].event.finished
    asked = fake.engine.requests[-1]
    assert (asked.step_cache, asked.step_cache_options) == ("skip", {"threshold": 0.25, "last": 2.0}), "what was silent is the model's choice"
    assert (job.spec.step_cache, dict(job.spec.step_cache_options), job.usage.step_cache) == ("skip", {"threshold": 0.25, "last": 2.0}, "skip")
    assert (job.usage.nfe, job.usage.forwards, job.usage.cached) == (6, 6, 6)
    plain = call(channel, request("a fox"))[-1].event.finished
    assert (fake.engine.requests[-1].step_cache, plain.usage.step_cache, plain.usage.cached) == ("", "", 0), "off unless asked for"
    code, message, _ = refused(channel, request("a fox", step_cache="gone"))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "known: skip" in message


def test_a_student_is_listed_with_its_teacher_and_its_grids_and_no_other_model_with_any(fake: Served) -> None:
    method = f"/{SERVICE}/ListModels", pb.ListModelsRequest.SerializeToString, pb.ListModelsResponse.FromString
    with grpc.insecure_channel(fake.address) as channel:
        (model,) = channel.unary_unary(*method)(pb.ListModelsRequest()).models
        assert not model.HasField("student")
    settings = FakeSettings(distilled=Distilled({2: (0.0, 0.25, 1.0), 1: (0.0, 1.0)}, scale=3.0, teacher="fake"))
    with served(FakeEngine(FakeModel(settings=settings))) as other, grpc.insecure_channel(other.address) as channel:
        (model,) = channel.unary_unary(*method)(pb.ListModelsRequest()).models
        assert (model.student.teacher, model.student.guidance) == ("fake", 3.0)
        assert [(grid.steps, list(grid.times)) for grid in model.student.grids] == [(1, [0.0, 1.0]), (2, [0.0, 0.25, 1.0])]


def test_a_model_without_step_caches_lists_none_and_refuses_them(fake: Served) -> None:
    method = f"/{SERVICE}/ListModels", pb.ListModelsRequest.SerializeToString, pb.ListModelsResponse.FromString
    with grpc.insecure_channel(fake.address) as channel:
        (model,) = channel.unary_unary(*method)(pb.ListModelsRequest()).models
        assert [(cache.name, dict(cache.options)) for cache in model.step_caches] == [("skip", {"threshold": 0.25, "last": 1.0})]
    with served(FakeEngine(FakeModel(step_caches={}))) as other, grpc.insecure_channel(other.address) as channel:
        (model,) = channel.unary_unary(*method)(pb.ListModelsRequest()).models
        assert list(model.step_caches) == []
        code, message, _ = refused(channel, request("a fox", step_cache="skip"))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "leave step_cache out" in message


def test_a_fitted_solver_brings_its_own_choices_and_refuses_others(fake: Served, channel: grpc.Channel) -> None:
    job = call(channel, request("a fox", solver="bns_6"))[-1].event.finished
    asked = fake.engine.requests[-1]
    assert (asked.steps, asked.scale, asked.guidance) == (6, 2.5, "cfg")
    assert (job.usage.solver, job.usage.guidance) == ("bns_6", 2.5)
    for field, spec in (("steps", {"steps": 8}), ("guidance", {"guidance": 7.0}), ("guidance_rule", {"guidance_rule": "gate"}), ("solver", {"frames": 1})):
        code, message, violations = refused(channel, request("a fox", solver="bns_6", **spec))  # type: ignore[arg-type]
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert list(violations) == [field]
        assert "bns_6" in message


def test_a_quality_chooses_what_runs_and_the_answer_says_so_and_can_be_sent_again(fake: Served, channel: grpc.Channel) -> None:
    first = call(channel, request("a fox", quality="standard", frames=8, output_media_type="image/png"))[-1].event.finished
    asked = fake.engine.requests[-1]
    assert (asked.solver, asked.steps, asked.guidance, asked.guidance_options, asked.scale) == ("heun", 5, "gate", {"stop": 0.25}, 3.0)
    assert (first.usage.quality, first.usage.solver, first.usage.guidance_rule) == ("standard", "heun", "gate")
    assert (first.spec.quality, first.spec.solver, first.spec.steps, dict(first.spec.guidance_options)) == ("", "heun", 5, {"stop": 0.25})
    again = call(channel, pb.GenerateRequest(spec=first.spec, inline_artifacts=True))[-1].event.finished
    assert again.artifacts[0].sha256 == first.artifacts[0].sha256
    assert again.usage.quality == ""


def test_auto_is_answered_with_what_it_came_to_and_that_can_be_sent_again(fake: Served, channel: grpc.Channel) -> None:
    first = call(channel, request("a fox", quality="auto", frames=8, output_media_type="image/png"))[-1].event.finished
    pending = fake.engine.requests[-1]
    assert messages.to_spec(pending, "image/png").quality == "auto"
    assert not messages.to_spec(pending, "image/png").HasField("steps"), "nothing is chosen before its turn"
    assert (first.usage.quality, first.usage.auto, first.usage.solver) == ("draft", True, "bns_6")
    assert (first.spec.quality, first.spec.solver, first.spec.steps, first.steps_done, first.steps_total) == ("", "bns_6", 6, 6, 6)
    again = call(channel, pb.GenerateRequest(spec=first.spec, inline_artifacts=True))[-1].event.finished
    assert again.artifacts[0].sha256 == first.artifacts[0].sha256
    assert (again.usage.quality, again.usage.auto) == ("", False)


def test_a_quality_is_refused_beside_a_choice_and_where_the_menu_lacks_it(fake: Served, channel: grpc.Channel) -> None:
    before = len(fake.engine.requests)
    code, _, violations = refused(channel, request("a fox", quality="draft", steps=0, guidance_rule="cfg"))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert list(violations) == ["quality"]
    assert violations["quality"].endswith("leave quality out, or else steps, the guidance rule")
    code, message, _ = refused(channel, request("a fox", quality="ultra"))
    assert code is grpc.StatusCode.NOT_FOUND
    assert "it has: draft, standard, best" in message
    assert len(fake.engine.requests) == before


def test_the_menu_is_listed_in_order_of_cost_complete_and_with_what_was_measured(channel: grpc.Channel) -> None:
    method = channel.unary_unary(f"/{SERVICE}/ListModels", pb.ListModelsRequest.SerializeToString, pb.ListModelsResponse.FromString)
    (model,) = method(pb.ListModelsRequest()).models
    assert list(model.defaults["text_to_image"].menu) == []
    draft, standard, best = model.defaults["text_to_video"].menu
    assert [entry.quality for entry in (draft, standard, best)] == ["draft", "standard", "best"]
    assert (draft.solver, draft.schedule, draft.steps, draft.guidance_rule, draft.guidance) == ("bns_6", "linear", 6, "cfg", 2.5)
    assert (draft.forwards, draft.psnr_db, draft.ssim, draft.HasField("frechet"), draft.command) == (12.0, 30.5, 0.875, False, "reelstep bench steps")
    assert (standard.guidance_rule, dict(standard.guidance_options), standard.guidance, standard.frechet) == ("gate", {"stop": 0.25}, 3.0, 0.25)
    assert best.HasField("frechet"), "zero was measured"


def test_all_bad_fields_are_named_at_once(channel: grpc.Channel) -> None:
    _, message, violations = refused(channel, request("", steps=0, frames=3, guidance=math.nan))
    assert set(violations) == {"prompt", "steps", "frames", "guidance"}
    assert "one of: 1, 8" in message


@pytest.mark.parametrize("prompt", [b"\xff\xfe", b"caf\xe9", b"\xed\xa0\x80"])
def test_a_prompt_that_is_not_utf8_is_an_invalid_argument(channel: grpc.Channel, prompt: bytes) -> None:
    spec = b"\x12" + bytes([len(prompt)]) + prompt
    code, message, violations = refused(channel, b"\x0a" + bytes([len(spec)]) + spec + b"\x18\x01")
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "UTF-8" in message
    assert list(violations) == ["request"]


def test_bytes_that_are_no_message_are_an_invalid_argument(channel: grpc.Channel) -> None:
    code, _, _ = refused(channel, b"\x0a\xff\xff\xff")
    assert code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(("kind", "known"), [("model", "fake"), ("solver", "bns_6, euler, heun"), ("schedule", "linear, quadratic")])
def test_an_unknown_name_is_not_found_and_the_known_ones_stand_beside_it(channel: grpc.Channel, kind: str, known: str) -> None:
    code, message, _ = refused(channel, request(**{kind: "nonesuch"}))
    assert code is grpc.StatusCode.NOT_FOUND
    assert message == f"unknown {kind} 'nonesuch'; known: {known}"


def test_an_option_that_no_model_declares_and_a_call_for_kept_artifacts_are_refused(channel: grpc.Channel) -> None:
    message = request()
    message.inline_artifacts = False
    message.request_id = "not-a-uuid"
    message.preview.max_bytes = MIB
    message.preview.media_type = "text/plain"
    message.spec.extra["sparkle"] = 1
    _, _, violations = refused(channel, message)
    assert set(violations) == {"inline_artifacts", "request_id", "preview.max_bytes", "preview.media_type", "spec.extra"}


def test_two_running_requests_cannot_share_an_id(fake: Served, channel: grpc.Channel) -> None:
    message = request("endless")
    message.request_id = str(uuid4())
    method = channel.unary_stream(f"/{SERVICE}/Generate", pb.GenerateRequest.SerializeToString, pb.GenerateResponse.FromString)
    running = method(message)
    next(running)
    _, _, violations = refused(channel, message)
    assert list(violations) == ["request_id"]
    running.cancel()
    wait_until(lambda: message.request_id in fake.engine.ended)


@pytest.mark.parametrize(
    ("prompt", "code"),
    [("full", grpc.StatusCode.RESOURCE_EXHAUSTED), ("nan", grpc.StatusCode.INTERNAL), ("crash", grpc.StatusCode.INTERNAL)],
)
def test_failures_behind_the_edge_keep_their_code_and_show_no_inside(channel: grpc.Channel, prompt: str, code: grpc.StatusCode) -> None:
    got, message, _ = refused(channel, request(prompt))
    assert got is code
    assert "Traceback" not in message
    assert "secret" not in message


def test_a_model_that_does_not_do_the_task_says_what_it_does() -> None:
    settings = type(FakeModel().settings)(tasks=("text_to_video",))
    with served(FakeEngine(FakeModel(settings=settings))) as other, grpc.insecure_channel(other.address) as channel:
        code, message, _ = refused(channel, request(frames=1))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "it does: text_to_video" in message


def test_with_several_models_one_must_be_named_and_pages_list_them_all() -> None:
    with served(FakeEngine(*(FakeModel(name) for name in ("c", "a", "b")))) as other, grpc.insecure_channel(other.address) as channel:
        _, _, violations = refused(channel, request())
        assert violations == {"model": "is empty and 3 models are loaded; name one of: a, b, c"}
        method = channel.unary_unary(f"/{SERVICE}/ListModels", pb.ListModelsRequest.SerializeToString, pb.ListModelsResponse.FromString)
        first = method(pb.ListModelsRequest(page_size=2))
        second = method(pb.ListModelsRequest(page_size=2, page_token=first.next_page_token))
    assert [m.name for m in (*first.models, *second.models)] == ["a", "b", "c"]
    assert second.next_page_token == ""


def test_a_deadline_stops_the_work(fake: Served, channel: grpc.Channel) -> None:
    began = time.monotonic()
    code, _, _ = refused(channel, request("endless"), timeout=0.3)
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - began < 2
    wait_until(lambda: fake.engine.requests[-1].id in fake.engine.ended)


def test_the_deadline_reaches_the_engine_on_its_own_clock(fake: Served, channel: grpc.Channel) -> None:
    now = time.monotonic()
    call(channel, request(), timeout=50)
    assert now + 45 < fake.engine.requests[-1].deadline < now + 55
    call(channel, request(), timeout=None)
    assert now + 590 < fake.engine.requests[-1].deadline < now + 620


@pytest.mark.parametrize("leave", ["cancel", "disconnect"])
def test_the_work_stops_when_the_client_leaves(fake: Served, leave: str) -> None:
    channel = grpc.insecure_channel(fake.address)
    method = channel.unary_stream(f"/{SERVICE}/Generate", pb.GenerateRequest.SerializeToString, pb.GenerateResponse.FromString)
    running = method(request("endless"))
    next(running)
    one = fake.engine.requests[-1].id
    assert one not in fake.engine.ended
    running.cancel() if leave == "cancel" else channel.close()
    wait_until(lambda: fake.engine.ended.get(one) == "Failed")
    assert one in fake.engine.cancelled
    channel.close()


def test_a_picture_reaches_the_engine_decoded_and_fitted_and_chooses_the_task(fake: Served, channel: grpc.Channel) -> None:
    from io import BytesIO

    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 4), np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    job = call(channel, request(image=file.getvalue()))[-1].event.finished
    assert job.usage.task == "animate_sticker"
    assert job.spec.image == b""
    image = fake.engine.requests[-1].image
    assert image is not None
    assert np.array_equal(image, fit_picture(pixels, 64, 64))


def test_the_service_answers_every_method_that_the_proto_has_and_nothing_else(channel: grpc.Channel) -> None:
    for method in pb.DESCRIPTOR.services_by_name["MediaService"].methods:
        with pytest.raises(grpc.RpcError) as caught:
            list(channel.unary_stream(f"/{SERVICE}/{method.name}")(b"\xff", timeout=5))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"/{SERVICE}/CreateJob")(b"", timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
