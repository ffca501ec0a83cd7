"""An engine without networks, for tests of the edge: frames are made of the seed, and its behaviour follows from the prompt."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from reelstep.compiler.lora import Layer, Layout
from reelstep.engine.models.spec import Distilled, Fused
from reelstep.engine.request import Choice, Defaults, Event, Failed, Finished, Fit, Limits, Media, Preview, Progress, Queued, Request, Usage
from reelstep.errors import Cancelled, ConfigError, DeadlineExceeded, InternalError, NotFound, Overloaded

MENU = {
    "draft": Choice(solver="bns_6", forwards=12.0, psnr_db=30.5, ssim=0.875, frechet=None, command="reelstep bench steps"),
    "standard": Choice(
        solver="heun", steps=5, guidance="gate", guidance_options={"stop": 0.25}, forwards=14.5, psnr_db=31.0, ssim=0.9, frechet=0.25, command="the same"
    ),
    "best": Choice(schedule="quadratic", steps=50, scale=4.0, forwards=100.0, psnr_db=40.0, ssim=0.99, frechet=0.0, command="the same"),
}
VIDEO = Defaults(solver="euler", schedule="linear", steps=4, scale=3.0, frames=8, frames_per_second=8.0, menu=MENU)
IMAGE = Defaults(solver="euler", schedule="linear", steps=4, scale=3.0, frames=1, frames_per_second=8.0)
LIMITS = Limits(
    sizes=((64, 64), (512, 384)), frames=(1, 8), max_steps=100, max_scale=20.0, max_count=4, max_image_bytes=100_000, max_image_pixels=1_000_000
)  # fmt: skip

LAYOUT = Layout(4, (Layer("blocks.0.q", 8, 8), Layer("blocks.0.k", 8, 8)))


@dataclass(frozen=True)
class FakeSettings:
    tasks: tuple[str, ...] = ("text_to_image", "text_to_video", "animate_sticker")
    limits: Limits = LIMITS
    defaults: dict[str, Defaults] = field(default_factory=lambda: {"text_to_image": IMAGE, "text_to_video": VIDEO, "animate_sticker": VIDEO})
    distilled: Distilled | None = None
    lora: Layout | None = LAYOUT
    fused: tuple[Fused, ...] = (Fused("base", "0" * 64, 0.5, 2, 1),)


@dataclass(frozen=True)
class FakeLora:
    rank: int = 3
    pairs: dict[str, object] = field(default_factory=lambda: {"blocks.0.q": None})
    digest: str = "1" * 64


@dataclass(frozen=True)
class FakeModel:
    name: str = "fake"
    version: str = "1"
    settings: FakeSettings = FakeSettings()
    solvers: tuple[str, ...] = ("euler", "heun", "bns_6")
    schedules: tuple[str, ...] = ("linear", "quadratic")
    fits: dict[str, Fit] = field(default_factory=lambda: {"bns_6": Fit(("text_to_video",), "bns_6", "", 6, "cfg", {"rescale": 0.0}, 2.5)})
    guidance_rules: dict[str, dict[str, float]] = field(default_factory=lambda: {"none": {}, "cfg": {"rescale": 0.0}, "gate": {"stop": 0.5}})
    step_caches: dict[str, dict[str, float]] = field(default_factory=lambda: {"skip": {"threshold": 0.25, "last": 1.0}})

    loras: dict[str, FakeLora] = field(default_factory=lambda: {"neon": FakeLora(), "ink": FakeLora()})

    def check_lora(self, request: Request) -> None:
        if len(request.lora) > 1:
            raise ConfigError("too large a rank")

    def check_guidance(self, rule: str, scale: float, options: Mapping[str, float]) -> None:
        if unknown_options := options.keys() - self.guidance_rules[rule]:
            raise NotFound(f"unknown option {sorted(unknown_options)}")
        if rule == "none" and scale != 1:
            raise ConfigError("no scale")

    def check_step_cache(self, request: Request) -> None:
        if unknown_options := request.step_cache_options.keys() - self.step_caches.get(request.step_cache, {}):
            raise NotFound(f"unknown option {sorted(unknown_options)}")
        if request.step_cache and request.steps < 3:
            raise ConfigError("take more steps")


def frames_of(request: Request, index: int) -> npt.NDArray[np.uint8]:
    """Noise of the seed, [F, H, W, 3]: incompressible, so that artifacts are large."""
    shape = (request.frames, request.height, request.width, 3)
    return np.random.default_rng(request.seed + index).integers(0, 256, shape, dtype=np.uint8)


class FakeEngine:
    """One thread for each request. In the prompt: `slow` waits 50 ms a step, `endless` never ends, `nan` fails, `crash` raises a bug, `full` is refused.

    Quality `auto` becomes the cheapest that it may.
    """

    def __init__(self, *models: FakeModel) -> None:
        self.models = {m.name: m for m in models or (FakeModel(),)}
        self.requests: list[Request] = []
        self.cancelled: list[str] = []
        self.ended: dict[str, str] = {}
        self._stop: dict[str, threading.Event] = {}

    def submit(self, request: Request, listener: Callable[[Event], None]) -> None:
        if "full" in request.prompt:
            raise Overloaded("the queue is full; try again in 2.5 s", retry_after_s=2.5)
        if "crash" in request.prompt:
            raise RuntimeError("secret path /etc/inside")
        self.requests.append(request)
        self._stop[request.id] = threading.Event()
        threading.Thread(target=self._run, args=(request, listener), daemon=True).start()

    def cancel(self, request_id: str) -> None:
        if request_id in self._stop and request_id not in self.ended:
            self.cancelled.append(request_id)
            self._stop[request_id].set()

    def close(self, grace_s: float) -> None:
        end = time.monotonic() + grace_s
        while len(self.ended) < len(self._stop) and time.monotonic() < end:
            time.sleep(0.01)
        for request_id in tuple(self._stop):
            self.cancel(request_id)

    def _run(self, request: Request, listener: Callable[[Event], None]) -> None:
        last = self._steps(request, listener)
        self.ended[request.id] = type(last).__name__
        listener(last)

    def _steps(self, request: Request, listener: Callable[[Event], None]) -> Finished | Failed:
        listener(Queued(position=0, estimated_wait_s=0.0))
        quality = next(iter(request.auto), "")
        request = request.settled(quality)
        endless = "endless" in request.prompt
        step = 0
        while endless or step < request.steps:
            step += 1
            if self._stop[request.id].wait(0.05 if endless or "slow" in request.prompt else 0.0):
                return Failed(Cancelled(f"request {request.id} was cancelled"))
            if request.deadline <= time.monotonic():
                return Failed(DeadlineExceeded("denoise"))
            if "nan" in request.prompt:
                return Failed(InternalError("denoise gave NaN at step 1"))
            listener(Progress("denoise", min(step, request.steps), request.steps, 0.1))
            if request.preview_every and step % request.preview_every == 0:
                listener(Preview(step, frames_of(request, 0)[None]))
        frames = np.stack([frames_of(request, k) for k in range(request.count)])
        seeds = tuple(request.seed + k for k in range(request.count))
        cached = request.steps if request.step_cache else 0
        usage = Usage(
            nfe=request.steps, forwards=2 * request.steps - cached, cached=cached, queue_s=0.25, compute_s={"denoise": 1.5, "decode": 0.5}, quality=quality
        )
        return Finished(Media(frames, seeds, request.frames_per_second), usage)
