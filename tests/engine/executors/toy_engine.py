"""An engine over the closed-form model of `toy_ranks`, and who listens to it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from reelstep.engine.executors.inline import Inline
from reelstep.engine.loop import Engine
from reelstep.engine.models.spec import ModelSettings
from reelstep.engine.request import Call, Defaults, Event, Failed, Finished, Limits, Request
from reelstep.engine.served import ServedModel
from reelstep.tests.engine.executors.toy_ranks import MODEL, alone

SETTINGS = ModelSettings(
    tasks=("text_to_video",), limits=Limits(sizes=((16, 16),), frames=(8,), max_steps=100, max_scale=20.0, max_count=4, max_prompt_bytes=31),
    defaults={"text_to_video": Defaults("euler", "linear", 4, 1.0, 8, 8.0)}, path="condot", prediction="velocity", latent_channels=3,
    condition_channels=0, spatial_stride=8, temporal_stride=2, text_length=32, tile_frames=4, tile_overlap=1,
)  # fmt: skip


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not so after {seconds} s"
        time.sleep(0.01)


def point(seed: int) -> Call:
    generator = torch.Generator().manual_seed(seed)
    return Call("denoise", "video", {"x": torch.randn((1, 3, 4, 2, 2), generator=generator), "modulation": torch.rand((1, 7, 4), generator=generator)})


class Heard:
    """A listener that remembers the end."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.last: Event | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Finished | Failed):
            self.last = event
            self.ended.set()

    def result(self, seconds: float = 120.0) -> Finished:
        assert self.ended.wait(seconds), f"no end after {seconds} s"
        assert isinstance(self.last, Finished), self.last
        return self.last


def ask(number: int, steps: int) -> Request:
    return Request(
        id=f"request {number}", model=MODEL, task="text_to_video", prompt="a cat", negative_prompt="", seed=number, count=1, width=16, height=16,
        frames=8, frames_per_second=8.0, steps=steps, scale=2.0, solver="euler", schedule="linear", guidance="cfg", guidance_options={},
        step_cache="", step_cache_options={}, image=None, preview_every=0, priority=0, deadline=math.inf,
    )  # fmt: skip


def engine_on(executor: Any) -> Engine:
    return Engine({MODEL: ServedModel(MODEL, "1", SETTINGS, ("linear",), {})}, executor, max_running=8, release=getattr(executor, "close", None))


def check_against_one_process(heard: Sequence[Heard], steps: Callable[[int], int], first: int = 0) -> None:
    """Pictures and counts of the same requests, numbered from `first`, in one process that nobody kills. steps: of the request of a number."""
    engine = engine_on(Inline({MODEL: alone()}))
    for number, there in enumerate(heard, first):
        here = Heard()
        engine.submit(ask(number, steps(number)), here)
        found, wanted = there.result(), here.result()
        assert np.array_equal(found.media.frames, wanted.media.frames), number
        assert (found.usage.nfe, found.usage.forwards) == (wanted.usage.nfe, wanted.usage.forwards) == (steps(number), 2 * steps(number))
    engine.close(0)
