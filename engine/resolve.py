"""From what was asked to a complete Request: the one place where that is done, for the service and for `sample` alike."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from reelstep.engine.media_types import ENCODERS, STILL_TYPES
from reelstep.engine.request import (
    AUTO,
    Asked,
    Defaults,
    Event,
    Fit,
    Limits,
    Offer,
    Request,
    Student,
    accepts,
    check_choice,
    choose,
    complete,
    given,
    inert,
    origin,
    parts,
    validate,
)
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
    @property
    def distilled(self) -> Student | None:
        """Of a student of few steps."""

    @property
    def lora(self) -> Adaptable | None:
        """Of a bundle that takes adapters with a request."""

    @property
    def fused(self) -> tuple[Fused, ...]:
        """Adapters that are in the weights."""


class Adaptable(Protocol):
    """What adapters a request may bring: of these layers, and of this rank in all."""

    @property
    def rank(self) -> int: ...
    @property
    def layers(self) -> Sequence[tuple[str, int, int]]:
        """Name, inputs, outputs."""


class Fused(Protocol):
    """An adapter in the weights."""

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str:
        """sha256 of its file, in hexadecimal."""

    @property
    def strength(self) -> float: ...
    @property
    def rank(self) -> int: ...
    @property
    def layers(self) -> int: ...


class Lora(Protocol):
    """A loaded adapter. rank: the largest of its layers. pairs: by layer. digest: sha256 of its file, in hexadecimal."""

    @property
    def digest(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def pairs(self) -> Mapping[str, object]: ...


class Served(Offer, Protocol):
    """A loaded model, as the edge sees it."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def settings(self) -> Settings: ...
    @property
    def step_caches(self) -> Mapping[str, Mapping[str, float]]:
        """All options of each rule, as this model has them where a request is silent. Empty for a model that can run none."""

    @property
    def loras(self) -> Mapping[str, Lora]:
        """What requests may name."""

    def check_step_cache(self, request: Request) -> None:
        """Raises ConfigError or NotFound for what the rule does not take, or does not go with."""

    def check_lora(self, request: Request) -> None:
        """Raises ConfigError or NotFound for adapters that the request cannot run with."""


class Engine(Protocol):
    """What the edge needs of an engine. All methods may be called from any thread."""

    @property
    def models(self) -> Mapping[str, Served]: ...

    def submit(self, request: Request, listener: Callable[[Event], None]) -> None:
        """Start; returns at once. The listener is called on the engine's thread, the last time with Finished or Failed."""

    def cancel(self, request_id: str) -> None:
        """Stop before the next call; the listener then gets Failed(Cancelled). An unknown id is no error."""

    def load_lora(self, model: str, name: str, file: Path, config: str, most: int, replacing: bool) -> Lora:
        """Let requests that arrive from now on name this adapter. config: the text of PEFT's for it, or empty. most: adapters that the model may have.

        Raises ConfigError for a file that is none for the model, AlreadyExists for another of this name unless it may be replaced, Overloaded, NotFound.
        """

    def unload_lora(self, model: str, name: str) -> None:
        """Requests that arrive from now on cannot name it. Raises NotFound."""

    def close(self, grace_s: float) -> None:
        """Finish what is running within `grace_s`, fail the rest as Unavailable, release the devices."""


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
    quality: str = ""  # an entry of the model's menu, in place of the six choices above; `auto` is the best one that the deadline allows
    step_cache: str = ""  # empty for none
    step_cache_options: Mapping[str, float] = field(default_factory=dict)
    lora: Mapping[str, float] = field(default_factory=dict)  # strengths by name
    image: bytes | None = None
    media_type: str = ""
    preview_every: int = 0
    request_id: str = ""
    deadline: float = math.inf  # on time.monotonic's clock


def resolve(ask: Ask, models: Mapping[str, Served]) -> Request:
    """Fill every open choice, decode the picture and check all of it. No network runs before this has passed. Of quality `auto` the entries of the menu that
    all else goes with stay open.

    Raises NotFound (model, quality, solver, schedule, guidance, step cache, LoRA), UnsupportedRequest (task, step cache, LoRA), InvalidRequest (all other
    fields, all at once).
    """
    check_text(ask)
    served = choose_model(ask.model, models)
    task = choose_task(ask, served)
    settings = served.settings
    check_inert(ask, settings.defaults[task], settings.distilled)
    request = leave_open(ask, task, served) if ask.quality == AUTO else build(ask, task, served)
    if ask.image is None:
        return request
    from reelstep.engine.media import decode_picture, fit_picture  # here: most requests bring no picture

    image = decode_picture(ask.image, settings.limits)
    return replace(request, image=fit_picture(image, request.width, request.height))  # a request may wait long, and what it holds is small so


def build(ask: Ask, task: str, served: Served) -> Request:
    """The request without its picture. Raises as `resolve`."""
    settings = served.settings
    defaults = settings.defaults[task]
    choice = complete(from_menu(ask, task, served) if ask.quality else ask, task, defaults, served)
    width, height = choose_size(ask.width, ask.height, settings.limits)
    step_cache, step_cache_options = choose_step_cache(ask, served)
    request = Request(
        id=ask.request_id or str(uuid4()),
        model=served.name,
        task=task,
        prompt=ask.prompt,
        negative_prompt=ask.negative_prompt,
        seed=drawn(ask.seed),
        count=given(ask.count, 1),
        width=width,
        height=height,
        frames=given(ask.frames, defaults.frames),
        frames_per_second=given(ask.frames_per_second, defaults.frames_per_second),
        steps=choice.steps,
        scale=choice.scale,
        solver=choice.solver,
        schedule=choice.schedule,
        guidance=choice.guidance,
        guidance_options=choice.guidance_options,
        step_cache=step_cache,
        step_cache_options=step_cache_options,
        image=None,
        preview_every=ask.preview_every,
        priority=0,
        deadline=ask.deadline,
        lora=choose_lora(ask, served),
    )
    validate(request, settings.limits)
    check_choice(choice, settings.limits, served)
    check_step_cache(request, served)
    check_lora(ask, request, served)
    return request


def leave_open(ask: Ask, task: str, served: Served) -> Request:
    """As the cheapest entry of the menu, with all that may still be chosen. Raises as `build`, and InvalidRequest with what is wrong with each entry where none
    goes with the rest."""
    from_menu(ask, task, served)
    same = replace(ask, seed=drawn(ask.seed), request_id=ask.request_id or str(uuid4()))
    requests: dict[str, Request] = {}
    violations: list[FieldViolation] = []
    for quality in served.settings.defaults[task].qualities:
        try:
            requests[quality] = build(replace(same, quality=quality), task, served)
        except InvalidRequest as error:
            violations += error.violations
    if not requests:
        raise InvalidRequest(dict.fromkeys(violations))
    auto = {
        quality: Fit((task,), each.solver, each.schedule, each.steps, each.guidance, each.guidance_options, each.scale) for quality, each in requests.items()
    }
    return replace(next(iter(requests.values())), auto=auto)


def drawn(seed: int | None) -> int:
    return secrets.randbits(DRAWN_SEED_BITS) if seed is None else seed


def check_text(ask: Ask) -> None:
    """A lone surrogate is how Python holds bytes that were not UTF-8 (a command line, JSON); no tokenizer can take it."""
    names = ("prompt", "negative_prompt", "model", "quality", "solver", "schedule", "guidance", "step_cache")
    bad = [FieldViolation(name, "is not UTF-8 text; send it as UTF-8") for name in names if not is_utf8(getattr(ask, name))]
    bad += [FieldViolation("lora", "has a name that is not UTF-8 text; send it as UTF-8") for name in ask.lora if not is_utf8(name)]
    if ask.media_type and ask.media_type not in ENCODERS:
        bad.append(FieldViolation("media_type", f"{ask.media_type[:80]!r} cannot be written; one of: {', '.join(sorted(ENCODERS))}"))
    if bad:
        raise InvalidRequest(bad)


def is_utf8(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


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


def check_inert(ask: Ask, defaults: Defaults, student: Student | None) -> None:
    """Raises InvalidRequest for all that a student of few steps does not heed."""
    if student is None:
        return
    bad = inert(ask, defaults, student)
    if ask.negative_prompt:
        text = f"{origin(student)} and never asks what it steers away from, so this is inert here; leave it out, or ask {student.teacher!r}"
        bad.append(FieldViolation("negative_prompt", text))
    if ask.step_cache:
        text = f"{ask.step_cache[:80]!r}: {origin(student)}, and its few steps have too little in common to skip one; leave it out, or ask {student.teacher!r}"
        bad.append(FieldViolation("step_cache", text))
    if bad:
        raise InvalidRequest(bad)


def from_menu(ask: Ask, task: str, served: Served) -> Asked:
    """The entry of the quality that was asked for, of `auto` the cheapest. Raises InvalidRequest where the request also chooses what the entry does, NotFound
    where there is none."""
    if chosen := [name for name, value in parts(ask).items() if value not in (None, "", {})]:
        words = {"scale": "the guidance scale", "guidance": "the guidance rule", "guidance_options": "the rule's options"}
        those = ", ".join(words.get(name, name) for name in chosen)
        text = f"{ask.quality[:80]!r} chooses solver, schedule, steps and guidance by itself; leave quality out, or else {those}"
        raise InvalidRequest([FieldViolation("quality", text)])
    defaults = served.settings.defaults[task]
    quality = defaults.qualities[0] if ask.quality == AUTO and defaults.menu else ask.quality
    if quality not in defaults.menu:
        known = f"{', '.join(defaults.qualities)}; {AUTO} is the best of them that the deadline allows" if defaults.menu else "none"
        raise NotFound(f"model {served.name!r} has no quality {quality[:80]!r} for {task}; it has: {known}; without one, the task's defaults are used")
    return defaults.menu[quality]


def choose_step_cache(ask: Ask, served: Served) -> tuple[str, Mapping[str, float]]:
    """The rule and all its options; an empty name and none without a step cache."""
    if not ask.step_cache:
        if ask.step_cache_options:
            raise InvalidRequest([FieldViolation("step_cache_options", "without a step cache; name one in step_cache, or leave them out")])
        return "", {}
    if not served.step_caches:
        text = f"model {served.name!r} was compiled without what a step cache needs; leave step_cache out, or serve a bundle compiled with --step-cache"
        raise UnsupportedRequest(text)
    name = choose("step cache", ask.step_cache, tuple(served.step_caches))
    return name, {**served.step_caches[name], **ask.step_cache_options}


def check_step_cache(request: Request, served: Served) -> None:
    """Options that a step cache does not take, and what it does not go with."""
    try:
        served.check_step_cache(request)
    except (ConfigError, NotFound) as error:
        own = replace(request, step_cache_options=served.step_caches[request.step_cache])
        options = isinstance(error, NotFound) or accepts(served.check_step_cache, own)
        raise InvalidRequest([FieldViolation("step_cache_options" if options else "step_cache", str(error))]) from error


def choose_lora(ask: Ask, served: Served) -> Mapping[str, float]:
    """Strengths of adapters that are loaded."""
    if ask.lora and served.settings.lora is None:
        text = f"model {served.name!r} was compiled to take no LoRA; leave lora out, or serve a bundle compiled with --lora-rank"
        raise UnsupportedRequest(text)
    for name in ask.lora:
        if name not in served.loras:
            text = f"{unknown('LoRA', name[:80], served.loras)}. Load it with `reelstep lora load NAME=FILE`, or start the server with `--lora NAME=FILE`"
            raise NotFound(text)
    return ask.lora


def check_lora(ask: Ask, request: Request, served: Served) -> None:
    """A LoRA makes another network, which what was fitted to the model does not hold for."""
    if not any(request.lora.values()):
        return
    if fitted := [name for name in (request.solver, request.guidance) if name in served.fits]:
        says = f"quality {ask.quality!r} names " if ask.quality else ""
        d = served.settings.defaults[request.task]
        instead = "" if {d.solver, d.guidance} & served.fits.keys() else f", such as solver {d.solver!r} with guidance {d.guidance!r}, the default,"
        text = f"{says}{', '.join(map(repr, fitted))}, fitted to {served.name!r} without a LoRA; choose what needs no fit{instead} or leave lora out"
        raise InvalidRequest([FieldViolation("lora", text)])
    try:
        served.check_lora(request)
    except ConfigError as error:
        raise InvalidRequest([FieldViolation("lora", str(error))]) from error


def choose_size(width: int | None, height: int | None, limits: Limits) -> tuple[int, int]:
    """The first compiled size that agrees with what was given; what was given where none does, for `validate` to refuse."""
    for w, h in limits.sizes:
        if width in (None, w) and height in (None, h):
            return w, h
    return given(width, limits.sizes[0][0]), given(height, limits.sizes[0][1])
