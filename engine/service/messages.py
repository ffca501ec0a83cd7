"""Between wire messages and our own nouns, both ways, field by field."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any
from uuid import UUID

import google_crc32c
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from reelstep.engine import request as core
from reelstep.engine.media_types import ENCODERS
from reelstep.engine.resolve import DEFAULT_MEDIA_TYPE, Ask, Fused, Lora, Served
from reelstep.errors import FieldViolation, InvalidRequest
from reelstep.protos.reelstep.v1 import media_pb2 as pb

MAX_PREVIEW_BYTES = 64 << 10
PREVIEW_MEDIA_TYPE = "image/webp"


def now() -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(time.time_ns())
    return stamp


def duration(seconds: float) -> Duration:
    span = Duration()
    span.FromTimedelta(timedelta(seconds=seconds))
    return span


def to_ask(request: pb.GenerateRequest, deadline: float) -> Ask:
    """deadline: on time.monotonic's clock. Raises InvalidRequest for fields that this server does not take."""
    check_call(request)
    spec = request.spec

    def given(field: str) -> bool:
        return spec.HasField(field)

    return Ask(
        prompt=spec.prompt,
        model=spec.model,
        negative_prompt=spec.negative_prompt,
        seed=spec.seed if given("seed") else None,
        count=spec.count if given("count") else None,
        width=spec.width if given("width") else None,
        height=spec.height if given("height") else None,
        frames=spec.frames if given("frames") else None,
        frames_per_second=spec.frames_per_second if given("frames_per_second") else None,
        steps=spec.steps if given("steps") else None,
        scale=spec.guidance if given("guidance") else None,
        solver=spec.solver,
        schedule=spec.schedule,
        guidance=spec.guidance_rule,
        guidance_options=dict(spec.guidance_options),
        quality=spec.quality,
        step_cache=spec.step_cache,
        step_cache_options=dict(spec.step_cache_options),
        lora={each.name: each.strength if each.HasField("strength") else 1.0 for each in spec.lora},
        image=spec.image or None,
        media_type=spec.output_media_type,
        preview_every=request.preview.every_steps,
        request_id=request.request_id,
        deadline=deadline,
    )


def check_call(request: pb.GenerateRequest) -> None:
    """The fields of the call itself; those of the spec are checked by `resolve`."""
    bad: list[FieldViolation] = []
    core.check(bad, request.inline_artifacts, "inline_artifacts", "must be true: this server keeps no artifacts to read later")
    core.check(bad, not request.spec.assets, "spec.assets", "this server has no asset store; put the picture's bytes into spec.image")
    unknown_options = ", ".join(name[:40] for name in list(request.spec.extra.fields)[:5])
    core.check(bad, not unknown_options, "spec.extra", f"no model here declares: {unknown_options}")
    names = [each.name for each in request.spec.lora]
    core.check(bad, len({*names}) == len(names), "lora", "names one twice; give each once, with the sum of its strengths")
    core.check(bad, not request.request_id or is_uuid(request.request_id), "request_id", "is not a UUID")
    preview = request.preview
    core.check(bad, preview.max_bytes <= MAX_PREVIEW_BYTES, "preview.max_bytes", f"at most {MAX_PREVIEW_BYTES}")
    known = ", ".join(sorted(ENCODERS))
    core.check(bad, preview.media_type in ("", *ENCODERS), "preview.media_type", f"one of: {known}")
    if bad:
        raise InvalidRequest(bad)


def is_uuid(text: str) -> bool:
    try:
        return len(text) <= 45 and bool(UUID(text))
    except ValueError:
        return False


def spec_parts(asked: core.Asked) -> dict[str, Any]:
    """The six choices by the names of their fields in the API."""
    return {core.SPEC_NAMES.get(name, name): value for name, value in core.parts(asked).items()}


def to_spec(request: core.Request, media_type: str) -> pb.GenerationSpec:
    """The spec that was run, complete but for the picture's bytes; of quality `auto` before it was chosen what that is."""
    return pb.GenerationSpec(
        model=request.model,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        seed=request.seed,
        count=request.count,
        width=request.width,
        height=request.height,
        frames=request.frames,
        frames_per_second=request.frames_per_second,
        output_media_type=media_type or DEFAULT_MEDIA_TYPE,
        **({"quality": core.AUTO} if request.auto else spec_parts(request)),
        step_cache=request.step_cache,
        step_cache_options=request.step_cache_options,
        lora=[pb.GenerationSpec.Lora(name=name, strength=strength) for name, strength in request.lora.items()],
    )


def to_usage(request: core.Request, usage: core.Usage, quality: str) -> pb.Usage:
    """request: that ran. quality: that was asked for."""
    return pb.Usage(
        nfe=usage.nfe,
        forwards=usage.forwards,
        cached=usage.cached,
        queue=duration(usage.queue_s),
        compute={program: duration(seconds) for program, seconds in usage.compute_s.items()},
        solver=request.solver,
        schedule=request.schedule,
        guidance=request.scale,
        task=request.task,
        guidance_rule=request.guidance,
        quality=usage.quality or quality,
        step_cache=request.step_cache,
        auto=quality == core.AUTO,
    )


def to_status_event(event: core.Queued | core.Progress) -> pb.JobEvent:
    if isinstance(event, core.Queued):
        queued = pb.JobEvent.Queued(position=event.position, estimated_wait=duration(event.estimated_wait_s))
        return pb.JobEvent(queued=queued)
    remaining = duration(event.estimated_remaining_s)
    progress = pb.JobEvent.Progress(stage=event.stage, step=event.step, steps=event.steps, estimated_remaining=remaining)
    return pb.JobEvent(progress=progress)


def to_chunk(artifact: str, data: bytes, offset: int, size: int) -> pb.ArtifactChunk:
    piece = data[offset : offset + size]
    last = offset + size >= len(data)
    return pb.ArtifactChunk(artifact=artifact, offset=offset, data=piece, crc32c=google_crc32c.value(piece), last=last)


def to_model(model: Served) -> pb.Model:
    limits = model.settings.limits
    return pb.Model(
        name=model.name,
        version=model.version,
        tasks=model.settings.tasks,
        max_width=max(w for w, _ in limits.sizes),
        max_height=max(h for _, h in limits.sizes),
        max_frames=max(limits.frames),
        max_steps=limits.max_steps,
        max_count=limits.max_count,
        output_media_types=sorted(ENCODERS),
        capabilities=["previews"],
        sizes=[pb.Model.Size(width=w, height=h) for w, h in limits.sizes],
        frames=limits.frames,
        solvers=model.solvers,
        schedules=model.schedules,
        max_guidance=limits.max_scale,
        max_prompt_bytes=limits.max_prompt_bytes,
        max_image_bytes=limits.max_image_bytes,
        guidance_rules=[pb.Model.GuidanceRule(name=name, options=options) for name, options in model.guidance_rules.items()],
        step_caches=[pb.Model.StepCache(name=name, options=options) for name, options in model.step_caches.items()],
        fits=[to_fit(name, fit) for name, fit in model.fits.items()],
        defaults={task: to_defaults(task, model) for task in model.settings.defaults},
        student=to_student(model.settings.distilled),
        loras=[to_lora(name, lora) for name, lora in sorted(model.loras.items())],
        lora_rank=model.settings.lora.rank if model.settings.lora else 0,
        lora_layers=[name for name, *_ in model.settings.lora.layers] if model.settings.lora else [],
        fused=[to_fused(each) for each in model.settings.fused],
    )


def to_lora(name: str, lora: Lora) -> pb.Model.Lora:
    return pb.Model.Lora(name=name, rank=lora.rank, layers=len(lora.pairs), sha256=lora.digest)


def to_fused(fused: Fused) -> pb.Model.Fused:
    return pb.Model.Fused(name=fused.name, sha256=fused.digest, strength=fused.strength, rank=fused.rank, layers=fused.layers)


def to_student(student: core.Student | None) -> pb.Model.Student | None:
    if student is None:
        return None
    grids = [pb.Model.Student.Grid(steps=steps, times=times) for steps, times in sorted(student.grids.items())]
    return pb.Model.Student(teacher=student.teacher, guidance=student.scale, grids=grids)


def to_fit(name: str, fit: core.Fit) -> pb.Model.Fit:
    return pb.Model.Fit(
        name=name,
        tasks=fit.tasks,
        **spec_parts(fit),
    )


def to_defaults(task: str, model: Served) -> pb.Model.Defaults:
    defaults = model.settings.defaults[task]
    return pb.Model.Defaults(
        solver=defaults.solver,
        schedule=defaults.schedule,
        steps=defaults.steps,
        guidance=defaults.scale,
        frames=defaults.frames,
        frames_per_second=defaults.frames_per_second,
        guidance_rule=defaults.guidance,
        menu=[to_choice(quality, task, model) for quality in defaults.qualities],
    )


def to_choice(quality: str, task: str, model: Served) -> pb.Model.Choice:
    """The entry with all that it leaves open filled in."""
    defaults = model.settings.defaults[task]
    entry = defaults.menu[quality]
    choice = core.complete(entry, task, defaults, model)
    return pb.Model.Choice(
        quality=quality,
        **spec_parts(choice),
        forwards=entry.forwards,
        psnr_db=entry.psnr_db,
        ssim=entry.ssim,
        frechet=entry.frechet,
        command=entry.command,
    )
