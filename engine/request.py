"""What a client asks for, the limits it is held to, and what runs for it: the nouns that every layer shares, and what completes and checks them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from reelstep.errors import ConfigError, FieldViolation, InvalidRequest, NotFound, ReelstepError, unknown

Array = Any
"""A torch tensor. Named loosely, so that the scheduler and the service need no torch."""

MAX_PROMPT_BYTES = 4096
MAX_SEED = 2**63 - 1
MAX_STRENGTH = 10.0
"""Of a LoRA. Useful ones are around 1; far beyond, nothing is left of the model."""
PEFT_FILE = "adapter_config.json"
"""Beside a LoRA that PEFT itself has written, whose keys begin with `base_model.model.`: its configuration, with alpha."""
CHUNK_BYTES = 256 << 10
"""Of a file, at most, in one message: of a LoRA what clients send and the service takes, of a result what the service sends."""
QUALITIES = ("draft", "standard", "best")
"""What the entries of a menu are called, in order of cost."""
AUTO = "auto"
"""The quality that is the best of a menu's that is expected to be done in time."""

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What one model accepts. Sizes are the shape profiles that were compiled; nothing else can run."""

    sizes: tuple[tuple[int, int], ...]  # (width, height) in pixels
    frames: tuple[int, ...]  # of a video; 1 is an image
    max_steps: int
    max_scale: float
    max_count: int
    max_image_bytes: int = 8 << 20
    max_image_pixels: int = 4096 * 4096
    max_prompt_bytes: int = MAX_PROMPT_BYTES


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One entry of a menu: how to sample, and what was measured of it, each number a mean over samples.

    An empty name, or None, is left to the fitted solver or guidance that the entry names, else to the task's defaults. Raises ConfigError for
    numbers that cannot have been measured.
    """

    solver: str = ""
    schedule: str = ""
    steps: int | None = None
    guidance: str = ""
    guidance_options: Mapping[str, float] = field(default_factory=dict)
    scale: float | None = None
    forwards: float  # rows that the denoiser ran for one output
    psnr_db: float  # to the exact solution from the same noise
    ssim: float  # to the same
    frechet: float | None  # distance to the exact solutions as a set; None where it was not measured
    command: str  # that measured all of this

    def __post_init__(self) -> None:
        distance = 0.0 if self.frechet is None else self.frechet
        numbers = (self.forwards, self.psnr_db, self.ssim, distance)
        if not (all(map(math.isfinite, numbers)) and self.forwards > 0 and -1 <= self.ssim <= 1 and distance >= 0 and self.command.strip()):
            raise ConfigError(
                f"forwards {self.forwards}, {self.psnr_db} dB, SSIM {self.ssim}, Frechet distance {self.frechet}, measured by {self.command!r}: an entry of "
                "a menu has finite numbers, forwards above 0, SSIM in -1..1, no negative distance, and the command that measured them"
            )


@dataclass(frozen=True)
class Defaults:
    """What a model uses where the request is silent, and its menu for those who ask for a quality. Raises ConfigError for a menu out of order."""

    solver: str
    schedule: str
    steps: int
    scale: float
    frames: int
    frames_per_second: float
    guidance: str = "cfg"
    menu: Mapping[str, Choice] = field(default_factory=dict)  # by quality, as far as they were measured

    def __post_init__(self) -> None:
        if not self.menu.keys() <= set(QUALITIES):
            raise ConfigError(f"a menu has entries for {', '.join(self.menu)}; what it may have is: {', '.join(QUALITIES)}")
        costs = [self.menu[quality].forwards for quality in self.qualities]
        if costs != sorted(costs):
            raise ConfigError(f"the menu's {', '.join(self.qualities)} cost {', '.join(f'{c:g}' for c in costs)} forwards; a better quality costs no less")

    @property
    def qualities(self) -> tuple[str, ...]:
        """The names in the menu, in order of cost."""
        return tuple(quality for quality in QUALITIES if quality in self.menu)


@dataclass(frozen=True)
class Fit:
    """A complete choice of how to sample: what a fitted solver or guidance holds for, and nothing else. Its own name stands in `solver` or `guidance`."""

    tasks: tuple[str, ...]
    solver: str
    schedule: str  # empty for a solver with times of its own
    steps: int
    guidance: str
    guidance_options: Mapping[str, float]
    scale: float


@dataclass(frozen=True)
class Request:
    """One generation, complete: every open choice was made when it was built (`resolve`)."""

    id: str
    model: str
    task: str  # a pipeline: text_to_image, text_to_video, animate_sticker
    prompt: str
    negative_prompt: str
    seed: int  # of the first output; output k uses seed + k
    count: int
    width: int
    height: int
    frames: int
    frames_per_second: float
    steps: int
    scale: float
    solver: str
    schedule: str
    guidance: str  # a rule
    guidance_options: Mapping[str, float]  # of the rule; what is absent is the rule's own choice
    step_cache: str  # a rule, or empty for none
    step_cache_options: Mapping[str, float]  # of that rule
    image: npt.NDArray[np.uint8] | None  # [H, W, 3 or 4]
    preview_every: int  # steps between previews; 0 for none
    priority: int  # the smaller goes first; 0 by default
    deadline: float  # on time.monotonic's clock; math.inf for none
    lora: Mapping[str, float] = field(default_factory=dict)  # strengths by name
    auto: Mapping[str, Fit] = field(default_factory=dict)  # of quality `auto`: what it may still become, by quality, in order of cost; the first stands above

    def settled(self, quality: str) -> Request:
        """With one entry of `auto`, and nothing open any more; itself where nothing was."""
        if not self.auto:
            return self
        chosen = self.auto[quality]
        return replace(
            self, auto={}, solver=chosen.solver, schedule=chosen.schedule, steps=chosen.steps, guidance=chosen.guidance,
            guidance_options=chosen.guidance_options, scale=chosen.scale,
        )  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One network call: the unit of scheduling. Calls with equal `key` may be stacked along their rows.

    inputs: each [rows, ...]. The answer is a mapping of output names to tensors [rows, ...].
    """

    program: str
    profile: str
    inputs: Mapping[str, Array]

    @property
    def rows(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def key(self) -> tuple[str, str]:
        return self.program, self.profile


@dataclass(frozen=True)
class Media:
    """What a pipeline returns. frames: uint8 [count, F, H, W, 3]; seeds: one for each."""

    frames: npt.NDArray[np.uint8]
    seeds: tuple[int, ...]
    frames_per_second: float


@dataclass(frozen=True)
class Usage:
    """What a request cost, for the output that took most. NFE counts the velocities a solver asked for, forwards the denoiser's rows that ran whole,
    cached those that a step cache answered with the blocks skipped."""

    nfe: int
    forwards: int
    cached: int
    queue_s: float
    compute_s: Mapping[str, float]  # by program; a call shared with others counts in full
    quality: str = ""  # that was chosen for a request of quality `auto`


@dataclass(frozen=True)
class Queued:
    """Event: accepted and waiting. position: requests before it."""

    position: int
    estimated_wait_s: float


@dataclass(frozen=True)
class Progress:
    """Event: a step is done. stage: the program that runs now."""

    stage: str
    step: int
    steps: int
    estimated_remaining_s: float


@dataclass(frozen=True)
class Preview:
    """Event: how the outputs look now. frames: uint8 [count, F, H, W, 3]."""

    step: int
    frames: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Finished:
    """Event, the last one: the result and its cost."""

    media: Media
    usage: Usage


@dataclass(frozen=True)
class Failed:
    """Event, the last one: no result. error: one of `reelstep.errors`."""

    error: ReelstepError


Event = Queued | Progress | Preview | Finished | Failed


def check(violations: list[FieldViolation], ok: bool, field: str, description: str) -> None:
    """Note a violation unless `ok`."""
    if not ok:
        violations.append(FieldViolation(field, description))


def read_file(field: str, path: Path) -> bytes:
    """What goes into a field of a request. Raises InvalidRequest for a file that cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest([FieldViolation(field, f"cannot read {path}: {error.strerror}")]) from error


def check_steps(violations: list[FieldViolation], steps: int, limits: Limits) -> None:
    check(violations, 1 <= steps <= limits.max_steps, "steps", f"{steps} is not in 1..{limits.max_steps}")


def check_scale(violations: list[FieldViolation], scale: float, limits: Limits) -> None:
    check(violations, 0 <= scale <= limits.max_scale, "scale", f"{scale} is not in 0..{limits.max_scale:g}")  # NaN fails too


def bad_strength(strength: float) -> str:
    """What is wrong with the strength of a LoRA, or nothing."""
    return "" if abs(strength) <= MAX_STRENGTH else f"strength {strength:g} is not in {-MAX_STRENGTH:g}..{MAX_STRENGTH:g}"  # NaN is not either


def validate(request: Request, limits: Limits) -> None:
    """Raise InvalidRequest naming every field of `request` that is outside `limits`. No compute happens before this."""
    bad: list[FieldViolation] = []
    prompt_bytes = len(request.prompt.encode("utf-8", "surrogatepass"))
    check(bad, bool(request.prompt.strip()), "prompt", "is empty; say in words what the video should show")
    check(bad, prompt_bytes <= limits.max_prompt_bytes, "prompt", f"is {prompt_bytes} bytes; at most {limits.max_prompt_bytes}")
    negative_bytes = len(request.negative_prompt.encode("utf-8", "surrogatepass"))
    check(bad, negative_bytes <= limits.max_prompt_bytes, "negative_prompt", f"is {negative_bytes} bytes; at most {limits.max_prompt_bytes}")
    sizes = ", ".join(f"{w}x{h}" for w, h in limits.sizes)
    wrong = "height" if request.width in {w for w, _ in limits.sizes} else "width"
    check(bad, (request.width, request.height) in limits.sizes, wrong, f"size {request.width}x{request.height} was not compiled; one of: {sizes}")
    allowed = ", ".join(map(str, limits.frames))
    check(bad, request.frames in limits.frames, "frames", f"{request.frames} was not compiled; one of: {allowed}")
    check_steps(bad, request.steps, limits)
    check(bad, 1 <= request.count <= limits.max_count, "count", f"{request.count} is not in 1..{limits.max_count}")
    check_scale(bad, request.scale, limits)
    check(bad, 0 <= request.seed <= MAX_SEED - request.count, "seed", f"{request.seed} is not in 0..2^63 - 1 - count")
    fps = request.frames_per_second
    check(bad, 0.1 <= fps <= 240, "frames_per_second", f"{fps} is not in 0.1..240")
    check(bad, request.preview_every >= 0, "preview.every_steps", f"{request.preview_every} is negative")
    check(bad, request.priority >= 0, "priority", f"{request.priority} is negative")
    for name, strength in request.lora.items():
        check(bad, not bad_strength(strength), "lora", f"{name[:80]!r}: {bad_strength(strength)}")
    if bad:
        raise InvalidRequest(bad)


class Asked(Protocol):
    """What a request or an entry of a menu says of how to sample: an empty name, or None, is left open."""

    @property
    def solver(self) -> str: ...
    @property
    def schedule(self) -> str: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def guidance(self) -> str: ...
    @property
    def guidance_options(self) -> Mapping[str, float]: ...
    @property
    def scale(self) -> float | None: ...


SPEC_NAMES: Mapping[str, str] = {"scale": "guidance", "guidance": "guidance_rule", "media_type": "output_media_type"}
"""What GenerationSpec of the API calls the fields that have another name everywhere else."""


def parts(asked: Asked) -> dict[str, Any]:
    """The six choices by name."""
    return {
        "solver": asked.solver,
        "schedule": asked.schedule,
        "steps": asked.steps,
        "scale": asked.scale,
        "guidance": asked.guidance,
        "guidance_options": asked.guidance_options,
    }


class Offer(Protocol):
    """What one model has to sample with."""

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


def given(value: T | None, default: T) -> T:
    return default if value is None else value


def choose(kind: str, name: str, known: tuple[str, ...]) -> str:
    if name not in known:
        raise unknown(kind, name[:80], known)
    return name


def complete(asked: Asked, task: str, defaults: Defaults, offer: Offer) -> Fit:
    """Fill what is open: from the fit that is named, else from the task's defaults. Raises NotFound for a solver, schedule or rule that is not offered."""
    names = (asked.solver, asked.guidance, asked.solver or defaults.solver, asked.guidance or defaults.guidance)  # a fit that was asked for leads
    own = Fit((task,), defaults.solver, defaults.schedule, defaults.steps, defaults.guidance, {}, defaults.scale)
    fit = next((offer.fits[name] for name in names if name in offer.fits), own)
    guidance = choose("guidance", asked.guidance or fit.guidance, tuple(offer.guidance_rules))
    return Fit(
        tasks=(task,),
        solver=choose("solver", asked.solver or fit.solver, offer.solvers),
        schedule=choose("schedule", asked.schedule or fit.schedule or defaults.schedule, offer.schedules),
        steps=given(asked.steps, fit.steps),
        guidance=guidance,
        guidance_options={**offer.guidance_rules[guidance], **(fit.guidance_options if guidance == fit.guidance else {}), **asked.guidance_options},
        scale=given(asked.scale, 1.0 if guidance == "none" else fit.scale),
    )


class Student(Protocol):
    """What a model distilled to few steps is tied to."""

    @property
    def grids(self) -> Mapping[int, tuple[float, ...]]:
        """From each number of steps that it has to their times."""

    @property
    def scale(self) -> float:
        """Of guidance, that its teacher was run with."""

    @property
    def teacher(self) -> str: ...


def origin(student: Student) -> str:
    """How a refusal begins."""
    return f"this model was distilled from {student.teacher!r} at scale {student.scale:g}"


def inert(asked: Asked, defaults: Defaults, student: Student) -> list[FieldViolation]:
    """All that a student does not heed: whatever is not left open and not its own."""
    guidance = f"{origin(student)}, so guidance is in its weights and inert here"
    steps = f"{origin(student)} for {', '.join(map(str, sorted(student.grids)))} steps, and no other number has times of its own"
    own: dict[str, tuple[tuple[object, ...], str]] = {
        "solver": ((defaults.solver,), f"{origin(student)} to be run by {defaults.solver!r}, and no other solver goes the way that it learned"),
        "schedule": ((defaults.schedule,), f"{origin(student)} at times of its own, which belong to the number of steps"),
        "steps": (tuple(student.grids), steps),
        "scale": ((1.0,), guidance),
        "guidance": ((defaults.guidance,), guidance),
        "guidance_options": ((), guidance),
    }
    return [
        FieldViolation(field, f"{repr(wanted)[:80]}: {own[field][1]}; leave it out, or ask {student.teacher!r}")
        for field, wanted in parts(asked).items()
        if wanted not in (None, "", {}, *own[field][0])
    ]


def check_choice(choice: Fit, limits: Limits, offer: Offer) -> None:
    """Raises InvalidRequest for what is outside `limits`, and for parts that do not go together: of guidance, or with what is fitted."""
    bad: list[FieldViolation] = []
    check_steps(bad, choice.steps, limits)
    check_scale(bad, choice.scale, limits)
    if bad:
        raise InvalidRequest(bad)
    try:
        offer.check_guidance(choice.guidance, choice.scale, choice.guidance_options)
    except (ConfigError, NotFound) as error:
        own = offer.guidance_rules[choice.guidance]
        options = isinstance(error, NotFound) or accepts(offer.check_guidance, choice.guidance, choice.scale, own)
        raise InvalidRequest([FieldViolation("guidance_options" if options else "scale", str(error))]) from error
    for name in (choice.solver, choice.guidance):
        if name in offer.fits:
            check_fit(name, choice, offer.fits[name])


def accepts(checks: Callable[..., None], *arguments: object) -> bool:
    """Whether a check has nothing against them: with a rule's own options, so it was the given ones that it refused."""
    try:
        checks(*arguments)
    except ConfigError:
        return False
    return True


def check_fit(name: str, choice: Fit, fit: Fit) -> None:
    """What is fitted is for the field it was fitted to."""
    fitted = parts(replace(fit, schedule=fit.schedule or choice.schedule))
    wanted = parts(choice if choice.guidance == fit.guidance else replace(choice, guidance_options=fit.guidance_options))  # of another rule they say nothing
    bad = [
        FieldViolation(field, f"{value!r}, but {name!r} was fitted with {fitted[field]!r}; leave it out, or choose something else than {name!r}")
        for field, value in wanted.items()
        if value != fitted[field]
    ]
    for task in choice.tasks:
        check(bad, task in fit.tasks, "solver", f"{name!r} was fitted for {', '.join(fit.tasks)}, not for {task}; choose another")
    if bad:
        raise InvalidRequest(bad)
