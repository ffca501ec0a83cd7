"""From what was asked to a complete Request: the one place where defaults are filled in, for the service and for `sample` alike."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar
from uuid import uuid4

from reelstep.engine.media import ENCODERS, STILL_TYPES, decode_picture
from reelstep.engine.request import Defaults, Event, Fit, Limits, Request, check, validate
from reelstep.errors import ConfigError, FieldViolation, InvalidRequest, NotFound, UnsupportedRequest, unknown

DEFAULT_MEDIA_TYPE = "video/mp4"
DRAWN_SEED_BITS = 31  # short enough to be typed again


class Settings(Protocol):
    """The part of a model's settings that the edge reads."""

    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def limits(self) -> Limits: ...
    @property
    def defaults(self) -> Mapping[str, Defaults]: ...


class Served(Protocol):
    """A loaded model, as the edge sees it."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def settings(self) -> Settings: ...
    @property
    def solvers(self) -> tuple[str, ...]: ...
    @property
    def schedules(self) -> tuple[str, ...]: ...
    @property
    def guidance_rules(self) -> Mapping[str, Mapping[str, float]]:
        """All options of each rule, as this model has them where a request is silent."""

    @property
    def fits(self) -> Mapping[str, Fit]:
        """What each fitted solver or guidance holds for. One that is not here holds for everything."""

    def check_guidance(self, rule: str, scale: float, options: Mapping[str, float]) -> None:
        """Raises ConfigError or NotFound for what the rule does not take."""


class Engine(Protocol):
    """What the edge needs of an engine. All methods may be called from any thread."""

    @property
    def models(self) -> Mapping[str, Served]: ...

    def submit(self, request: Request, listener: Callable[[Event], None]) -> None:
        """Start; returns at once. The listener is called on the engine's thread, the last time with Finished or Failed."""

    def cancel(self, request_id: str) -> None:
        """Stop before the next call; the listener then gets Failed(Cancelled). An unknown id is no error."""

    def close(self, grace_s: float) -> None:
        """Finish what is running within `grace_s`, cancel the rest, release the devices."""


@dataclass(frozen=True)
class Ask:
    """A request as it came: None, or an empty name, is a choice left to the model."""

    prompt: str
    model: str = ""
    negative_prompt: str = ""
    seed: int | None = None
    count: int | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    frames_per_second: float | None = None
    steps: int | None = None
    scale: float | None = None
    solver: str = ""
    schedule: str = ""
    guidance: str = ""
    guidance_options: Mapping[str, float] = field(default_factory=dict)
    image: bytes | None = None
    media_type: str = ""
    preview_every: int = 0
    request_id: str = ""
    deadline: float = math.inf  # on time.monotonic's clock


def resolve(ask: Ask, models: Mapping[str, Served]) -> Request:
    """Fill every open choice, decode the picture and check all of it. No network runs before this has passed.

    Raises NotFound (model, solver, schedule), UnsupportedRequest (task), InvalidRequest (all other fields, all at once).
    """
    check_text(ask)
    served = choose_model(ask.model, models)
    task = choose_task(ask, served)
    settings = served.settings
    defaults = settings.defaults[task]
    named = [name for name in (ask.solver or defaults.solver, ask.guidance or defaults.guidance) if name in served.fits]
    own = Fit((task,), defaults.solver, defaults.schedule, defaults.steps, defaults.guidance, {}, defaults.scale)
    fit = served.fits[named[0]] if named else own
    guidance = choose("guidance", ask.guidance or fit.guidance, tuple(served.guidance_rules))
    width, height = choose_size(ask.width, ask.height, settings.limits)
    request = Request(
        id=ask.request_id or str(uuid4()),
        model=served.name,
        task=task,
        prompt=ask.prompt,
        negative_prompt=ask.negative_prompt,
        seed=secrets.randbits(DRAWN_SEED_BITS) if ask.seed is None else ask.seed,
        count=given(ask.count, 1),
        width=width,
        height=height,
        frames=given(ask.frames, defaults.frames),
        frames_per_second=given(ask.frames_per_second, defaults.frames_per_second),
        steps=given(ask.steps, fit.steps),
        scale=given(ask.scale, 1.0 if guidance == "none" else fit.scale),
        solver=choose("solver", ask.solver or fit.solver, served.solvers),
        schedule=choose("schedule", ask.schedule or fit.schedule or defaults.schedule, served.schedules),
        guidance=guidance,
        guidance_options={**served.guidance_rules[guidance], **(fit.guidance_options if guidance == fit.guidance else {}), **ask.guidance_options},
        image=None,
        preview_every=ask.preview_every,
        priority=0,
        deadline=ask.deadline,
    )
    validate(request, settings.limits)
    check_guidance(request, served)
    for name in named:
        check_fit(name, request, served.fits[name])
    if ask.image is None:
        return request
    return replace(request, image=decode_picture(ask.image, settings.limits))


T = TypeVar("T")


def given(value: T | None, default: T) -> T:
    return default if value is None else value


def check_text(ask: Ask) -> None:
    """A lone surrogate is how Python holds bytes that were not UTF-8 (a command line, JSON); no tokenizer can take it."""
    names = ("prompt", "negative_prompt", "model", "solver", "schedule", "guidance")
    bad = [FieldViolation(name, "is not UTF-8 text; send it as UTF-8") for name in names if not is_utf8(getattr(ask, name))]
    if ask.media_type and ask.media_type not in ENCODERS:
        bad.append(FieldViolation("output_media_type", f"{ask.media_type[:80]!r} cannot be written; one of: {', '.join(sorted(ENCODERS))}"))
    if bad:
        raise InvalidRequest(bad)


def is_utf8(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


def choose(kind: str, name: str, known: tuple[str, ...]) -> str:
    if name not in known:
        raise unknown(kind, name[:80], known)
    return name


def choose_model(name: str, models: Mapping[str, Served]) -> Served:
    """The model of that name; without a name the only one there is."""
    if name:
        return models[choose("model", name, tuple(models))]
    if len(models) != 1:
        raise InvalidRequest([FieldViolation("model", f"is empty and {len(models)} models are loaded; name one of: {', '.join(sorted(models))}")])
    return next(iter(models.values()))


def choose_task(ask: Ask, served: Served) -> str:
    """A picture is animated; one frame, or a still media type without frames, is a picture; all else is a video."""
    still = ask.frames == 1 or (ask.frames is None and ask.media_type in STILL_TYPES)
    if ask.image is not None and ask.frames == 1:
        raise InvalidRequest([FieldViolation("frames", "1 with an image: an animation has more; leave frames or the image out")])
    task = "animate_sticker" if ask.image is not None else "text_to_image" if still else "text_to_video"
    if task not in served.settings.tasks:
        raise UnsupportedRequest(f"model {served.name!r} does not do {task}; it does: {', '.join(served.settings.tasks) or 'nothing'}")
    return task


def check_guidance(request: Request, served: Served) -> None:
    """Scale and options that a rule does not take, or that do not go together."""
    try:
        served.check_guidance(request.guidance, request.scale, request.guidance_options)
    except (ConfigError, NotFound) as error:
        raise InvalidRequest([FieldViolation("guidance_options" if isinstance(error, NotFound) else "guidance", str(error))]) from error


def check_fit(name: str, request: Request, fit: Fit) -> None:
    """What is fitted is for the field it was fitted to."""
    asked = [
        ("solver", request.solver, fit.solver),
        ("schedule", request.schedule, fit.schedule or request.schedule),
        ("steps", request.steps, fit.steps),
        ("guidance", request.scale, fit.scale),
        ("guidance_rule", request.guidance, fit.guidance),
        ("guidance_options", request.guidance_options if request.guidance == fit.guidance else fit.guidance_options, fit.guidance_options),
    ]
    bad = [
        FieldViolation(field, f"{wanted!r}, but {name!r} was fitted with {fitted!r}; leave it out, or choose something else than {name!r}")
        for field, wanted, fitted in asked
        if wanted != fitted
    ]
    check(bad, request.task in fit.tasks, "solver", f"{name!r} was fitted for {', '.join(fit.tasks)}, not for {request.task}; choose another")
    if bad:
        raise InvalidRequest(bad)


def choose_size(width: int | None, height: int | None, limits: Limits) -> tuple[int, int]:
    """The first compiled size that agrees with what was given; what was given where none does, for `validate` to refuse."""
    for w, h in limits.sizes:
        if width in (None, w) and height in (None, h):
            return w, h
    return given(width, limits.sizes[0][0]), given(height, limits.sizes[0][1])
