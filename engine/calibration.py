"""Requests by which a model is quantised: their calls to measure its layers on, and the results of others to compare.

They run here one after the other without an engine's loop, so that the same prompts give the same calls on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reelstep.compiler.load import Progress, silent
from reelstep.compiler.quantisation import Calls, Engines
from reelstep.engine.media import encode
from reelstep.engine.models.spec import ModelSpec
from reelstep.engine.pipelines import PIPELINES
from reelstep.engine.pipelines.latent import Job
from reelstep.engine.pipelines.state import PipelineState
from reelstep.engine.request import Call, Media, Request
from reelstep.engine.resolve import Ask, resolve
from reelstep.engine.runner import Outputs, Runner
from reelstep.engine.served import ServedModel, schedules_of
from reelstep.errors import ConfigError

Measure = Callable[[npt.NDArray[np.uint8], npt.NDArray[np.uint8]], float]
"""Of two videos [F, H, W, 3]."""

Hear = Callable[[Sequence[Call]], None]
"""Is told of the calls that may run together."""

QUANTISED = "denoise"
"""The program that runs at every step; the others run once."""

HELD_OUT_SEED = 1 << 20


def check_tasks(spec: ModelSpec) -> None:
    """Raises ConfigError for a model that does no task."""
    if not spec.settings.tasks:
        raise ConfigError(f"model {spec.name!r} does no task, so no request can measure it; compile it without --quantise")


@dataclass(frozen=True)
class TaskRequests:
    """Every task of the model with its defaults, once for each prompt. Pictures to animate are made by the model itself.

    prompts: to measure on; held_out: to compare with, from other noise. progress: told of each request. Raises ConfigError for a prompt in
    both, or none in one, and InvalidRequest for one that the model does not take.
    """

    served: ServedModel
    prompts: Sequence[str]
    held_out: Sequence[str]
    psnr: Measure
    ssim: Measure
    seed: int = 0
    progress: Progress = silent

    def __post_init__(self) -> None:
        if not self.prompts or not self.held_out:
            raise ConfigError(f"{len(self.prompts)} prompts to measure on and {len(self.held_out)} to compare with; at least one of each")
        if both := sorted({*self.prompts} & {*self.held_out}):
            raise ConfigError(f"prompt {both[0]!r} is both measured on and compared with; give others")
        for prompt in (*self.prompts, *self.held_out):  # now, and not when everything is captured
            self.request(prompt, self.tasks[0], self.seed)

    @classmethod
    def of(
        cls, spec: ModelSpec, prompts: Sequence[str], held_out: Sequence[str], psnr: Measure, ssim: Measure, progress: Progress = silent
    ) -> TaskRequests:  # fmt: skip
        """Raises ConfigError for a model that does no task."""
        check_tasks(spec)
        return cls(unfitted(spec), prompts, held_out, psnr, ssim, progress=progress)

    @property
    def tasks(self) -> list[str]:
        """Those that need no picture come first."""
        can = self.served.settings.defaults.keys()
        needs = {"text_to_image": {"text_to_image"}, "text_to_video": {"text_to_video"}, "animate_sticker": {"animate_sticker", "text_to_image"}}
        return [task for task, needed in needs.items() if needed <= can]

    @property
    def identity(self) -> Any:
        return [*self.prompts, "", *self.held_out, self.seed]

    def calls(self, engines: Engines) -> Calls:
        """Of `denoise`, the branches of guidance at one step in one batch."""
        found: dict[tuple[str, str], list[Mapping[str, Tensor]]] = {}

        def hear(calls: Sequence[Call]) -> None:
            if calls[0].program == QUANTISED:
                limit = engines[calls[0].key].signature.max_batch
                batches = {name: torch.cat([call.inputs[name] for call in calls]).split(limit) for name in calls[0].inputs}
                found.setdefault(calls[0].key, []).extend(dict(zip(batches, rows, strict=True)) for rows in zip(*batches.values(), strict=True))

        for request in self.requests(self.prompts, self.seed, engines):
            self.run(request, engines, hear)
        return found

    def compare(self, reference: Engines, quantised: Engines) -> tuple[float, float, int]:
        scores = []
        for request in self.requests(self.held_out, self.seed + HELD_OUT_SEED, reference):
            exact, made = (self.run(request, engines).frames[0] for engines in (reference, quantised))
            scores.append((self.psnr(made, exact), self.ssim(made, exact)))
        psnr, ssim = np.mean(scores, axis=0)
        return float(psnr), float(ssim), len(scores)

    def requests(self, prompts: Sequence[str], seed: int, engines: Engines) -> Iterator[Request]:
        for done, ((k, prompt), task) in enumerate(product(enumerate(prompts), self.tasks)):
            self.progress(f"quantise: {task} of {prompt[:60]!r}", done, len(prompts) * len(self.tasks))
            picture = make_picture(self.served, prompt, seed + k, runner_on(engines)) if task == "animate_sticker" else None
            yield self.request(prompt, task, seed + k, picture)

    def request(self, prompt: str, task: str, seed: int, picture: bytes | None = None) -> Request:
        frames = 1 if task == "text_to_image" else self.served.settings.defaults[task].frames
        return resolve(Ask(prompt, seed=seed, frames=frames, image=picture), {self.served.name: self.served})

    def run(self, request: Request, engines: Engines, hear: Hear = lambda calls: None) -> Media:
        """The result of one request."""
        return run_request(self.served, request, runner_on(engines), hear)


def unfitted(spec: ModelSpec) -> ServedModel:
    """A model as it is served before anything was fitted to it."""
    return ServedModel(spec.name, spec.version, spec.settings, schedules_of(spec.settings), {})


def runner_on(engines: Engines) -> Runner:
    return Runner(engines, {key: engine.signature.max_batch for key, engine in engines.items()})


def run_request(served: ServedModel, request: Request, runner: Runner, hear: Hear = lambda calls: None) -> Media:
    """The result of one request, one round of calls after the other."""
    table, rule = served.table(request.solver, request.schedule, request.steps), served.rule(request.guidance, request.scale, request.guidance_options)
    pipeline = PIPELINES[request.task](Job(request, served.settings, table, rule), PipelineState())
    calls = next(pipeline)
    while True:
        hear(calls)
        try:
            calls = pipeline.send(answers(runner, calls))
        except StopIteration as done:
            media: Media = done.value
            return media


def make_picture(served: ServedModel, prompt: str, seed: int, runner: Runner) -> bytes:
    """A PNG to animate, made by the model itself. Raises UnsupportedRequest for one that makes no pictures of words."""
    still = resolve(Ask(prompt, seed=seed, frames=1), {served.name: served})
    return encode(run_request(served, still, runner).frames[0], 1.0, "image/png")


def answers(runner: Runner, calls: Sequence[Call]) -> tuple[Outputs, ...]:
    """Outputs of each call, in order; those of one key run in one batch."""
    found: dict[int, Outputs] = {}
    for key in dict.fromkeys(call.key for call in calls):
        places = [k for k, call in enumerate(calls) if call.key == key]
        found |= zip(places, runner.run([calls[k] for k in places]), strict=True)
    return tuple(found[k] for k in range(len(calls)))
