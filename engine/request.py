"""What a client asks for, the limits it is held to, and what runs for it: the nouns that every layer shares."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from reelstep.errors import FieldViolation, InvalidRequest, ReelstepError

Array = Any
"""A torch tensor. Named loosely, so that the scheduler and the service need no torch."""

MAX_PROMPT_BYTES = 4096
MAX_SEED = 2**63 - 1


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


@dataclass(frozen=True)
class Defaults:
    """What a model uses where the request is silent."""

    solver: str
    schedule: str
    steps: int
    scale: float
    frames: int
    frames_per_second: float
    guidance: str = "cfg"


@dataclass(frozen=True)
class Fit:
    """What a fitted solver or guidance holds for, and no other choice. Its own name stands in `solver` or `guidance`."""

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
    image: npt.NDArray[np.uint8] | None  # [H, W, 3 or 4]
    preview_every: int  # steps between previews; 0 for none
    priority: int  # 0 default, 1 highest, then 2, ...
    deadline: float  # on time.monotonic's clock; math.inf for none


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
    """What a request cost. NFE counts the velocities a solver asked for, forwards the denoiser's rows that ran; both for the output that took most."""

    nfe: int
    forwards: int
    queue_s: float
    compute_s: Mapping[str, float]  # by program; a call shared with others counts in full


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


def validate(request: Request, limits: Limits) -> None:
    """Raise InvalidRequest naming every field of `request` that is outside `limits`. No compute happens before this."""
    bad: list[FieldViolation] = []
    prompt_bytes = len(request.prompt.encode("utf-8", "surrogatepass"))
    check(bad, bool(request.prompt.strip()), "prompt", "is empty; say in words what the video should show")
    check(bad, prompt_bytes <= limits.max_prompt_bytes, "prompt", f"is {prompt_bytes} bytes; at most {limits.max_prompt_bytes}")
    negative_bytes = len(request.negative_prompt.encode("utf-8", "surrogatepass"))
    check(bad, negative_bytes <= limits.max_prompt_bytes, "negative_prompt", f"is {negative_bytes} bytes; at most {limits.max_prompt_bytes}")
    sizes = ", ".join(f"{w}x{h}" for w, h in limits.sizes)
    check(bad, (request.width, request.height) in limits.sizes, "width", f"{request.width}x{request.height} was not compiled; one of: {sizes}")
    allowed = ", ".join(map(str, limits.frames))
    check(bad, request.frames in limits.frames, "frames", f"{request.frames} was not compiled; one of: {allowed}")
    check(bad, 1 <= request.steps <= limits.max_steps, "steps", f"{request.steps} is not in 1..{limits.max_steps}")
    check(bad, 1 <= request.count <= limits.max_count, "count", f"{request.count} is not in 1..{limits.max_count}")
    check(bad, 0 <= request.scale <= limits.max_scale, "guidance", f"{request.scale} is not in 0..{limits.max_scale:g}")  # NaN fails too
    check(bad, 0 <= request.seed <= MAX_SEED - request.count, "seed", f"{request.seed} is not in 0..2^63 - count")
    fps = request.frames_per_second
    check(bad, math.isfinite(fps) and 0 < fps <= 240, "frames_per_second", f"{fps} is not in (0, 240]")
    check(bad, request.preview_every >= 0, "preview.every_steps", f"{request.preview_every} is negative")
    check(bad, request.priority >= 0, "priority", f"{request.priority} is negative")
    if bad:
        raise InvalidRequest(bad)
