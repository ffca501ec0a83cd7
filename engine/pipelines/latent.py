"""What the latent video tasks share: text and time embedded once, a guided sampler, tiled decoding.

count outputs of one request, C channels, F H W latent frames and sides, S text tokens, D width, T pixel frames.
"""

from __future__ import annotations

from collections.abc import Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reelstep.compiler.lora import INPUT, SUFFIX
from reelstep.engine.models.byte_text import tokenize
from reelstep.engine.models.spec import ModelSettings
from reelstep.engine.models.tae import blend_ramp, tile_starts
from reelstep.engine.pipelines.state import PipelineState, Run
from reelstep.engine.request import Call, Media, Request
from reelstep.engine.samplers.convert import TO_VELOCITY, velocity_to_x1
from reelstep.engine.samplers.guidance import Guided, Query, Rule, guided
from reelstep.engine.samplers.ns import Table, sample, start
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.step_cache import Evaluation, Outcome, Piece, whole
from reelstep.engine.samplers.step_cache import Rule as CacheRule
from reelstep.errors import InternalError

Outputs = Mapping[str, Tensor]
Answers = tuple[Outputs, ...]
Pipeline = Generator[tuple[Call, ...], Answers, Media]
"""Yields calls that may run together, is sent their outputs in order, returns the result."""


@dataclass(frozen=True)
class Job:
    """What a pipeline is handed beside its state. table, rule, cache, lora: the solver, guidance, step cache and adapters that the request asked for."""

    request: Request
    settings: ModelSettings
    table: Table
    rule: Rule
    cache: CacheRule | None = None
    lora: Tensor | None = None  # [1, N], what the request's adapters add up to

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """[C, F, H, W]."""
        return self.settings.latent_shape(self.request.frames, self.request.width, self.request.height)

    @property
    def profile(self) -> str:
        return profile_of(self.request)

    def text_call(self, branches: Mapping[str, str]) -> Call:
        """`encode_text` of each branch's words, a row each."""
        tokens = torch.tensor([tokenize(text, self.settings.text_length) for text in branches.values()])
        return Call("encode_text", "any", {"tokens": tokens})

    def noise(self) -> Tensor:
        """[count, C, F, H, W], each output from its own seed: the same whatever it is batched with."""
        return torch.cat([draw_noise(self.latent_shape, self.request.seed + k) for k in range(self.request.count)])

    def fresh_noise(self, output: int, step: int) -> Tensor:
        """[1, C, F, H, W], what a solver with noise adds at a step: of the output's seed and the step alone, so that a run can be resumed."""
        words = np.random.SeedSequence((self.request.seed + output, step)).generate_state(1, np.uint64)
        return draw_noise(self.latent_shape, int(words[0]) >> 1)


def draw_noise(shape: tuple[int, int, int, int], seed: int) -> Tensor:
    """[1, C, F, H, W]: what a seed means, here and in everything that is compared with the engine."""
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))


def generate(job: Job, state: PipelineState, picture: Tensor | None) -> Pipeline:
    """Run one request from `state`. picture: [1, 3, 1, H, W] in [-1, 1], the sticker to animate, or None."""
    request = job.request
    if not state.runs:
        yield from prepare(job, state, picture)
        state.stage, state.steps = "denoise", job.table.n
        state.runs = [Run(start(job.table, noise)) for noise in job.noise().split(1)]
    if state.step < state.steps:
        yield from denoise(job, state)
    state.stage = "decode"
    video = yield from decode(job, torch.cat([run.sampler.x for run in state.runs]))
    frames = to_pixels(video[:, :, : request.frames])
    return Media(frames, tuple(request.seed + k for k in range(request.count)), request.frames_per_second)


def prepare(job: Job, state: PipelineState, picture: Tensor | None) -> Generator[tuple[Call, ...], Answers, None]:
    """All that is constant over the steps: text of each branch, time embeddings of every node, the condition latent."""
    request, settings = job.request, job.settings
    branches = {"text": request.prompt, "null": request.negative_prompt}
    calls = [job.text_call(branches), Call("embed_time", "any", {"t": torch.tensor(job.table.times[:-1], dtype=torch.float32)})]
    if picture is not None:
        calls.append(Call("encode_image", "image", {"picture": picture}))
    text, time, *encoded = yield tuple(calls)
    state.contexts = dict(zip(branches, text["context"].split(1), strict=True))
    state.modulations = time["modulation"]
    if settings.condition_channels:
        shape = (request.count, settings.condition_channels, *job.latent_shape[1:])
        state.condition = encoded[0]["latent"].expand(shape).contiguous() if encoded else torch.zeros(shape)


def denoise(job: Job, state: PipelineState) -> Generator[tuple[Call, ...], Answers, None]:
    """The guided sampler of every output; in each round the queries of all that are not done become calls, and their answers velocities."""
    path = PATHS[job.settings.path]
    to_velocity = TO_VELOCITY[job.settings.prediction]
    loops = {k: guided(sample(job.table, run.sampler, partial(job.fresh_noise, k)), job.rule, run.guidance) for k, run in enumerate(state.runs)}
    queries = {k: query for k, loop in loops.items() if (query := advance(loop, None)) is not None}
    while queries:
        state.step = min(run.sampler.step for run in state.runs)
        yield from maybe_preview(job, state)
        outcomes = yield from side_by_side(
            job.profile, {(k, branch): evaluate(job, state, k, query, branch) for k, query in queries.items() for branch in query.branches}
        )
        for (k, branch), outcome in outcomes.items():  # only now: what was saved between the calls of a query asks for all of it again
            remember(state.runs[k], branch, outcome)
        answers = {k: tuple(to_velocity(outcomes[k, branch].velocity, q.x, q.t, path) for branch in q.branches) for k, q in queries.items()}
        queries = {k: query for k, answer in answers.items() if (query := advance(loops[k], answer)) is not None}
    state.step = state.steps


def advance(loop: Guided, answer: tuple[Tensor, ...] | None) -> Query | None:
    """The next query of a guided sampler, or None at its end."""
    try:
        return next(loop) if answer is None else loop.send(answer)
    except StopIteration:
        return None


def evaluate(job: Job, state: PipelineState, output: int, query: Query, branch: str) -> Evaluation:
    """One branch of guidance at a query's point: "bare" is without words and without picture."""
    assert state.modulations is not None
    run, node = state.runs[output], job.table.times.index(query.t)
    inputs = {"x": query.x, "modulation": state.modulations[node : node + 1], "context": state.contexts["null" if branch == "bare" else branch]}
    if state.condition is not None:
        condition = state.condition[output : output + 1]
        inputs["condition"] = torch.zeros_like(condition) if branch == "bare" else condition
    if job.lora is not None:
        return adapted({**inputs, INPUT: job.lora})
    if job.cache is None:
        return whole(inputs)
    return job.cache.evaluate(inputs, run.guidance.nfe, len(query.branches), run.memories.get(branch))


def adapted(inputs: Mapping[str, Tensor]) -> Evaluation:
    """The whole network with adapters."""
    return Outcome((yield Piece("denoise" + SUFFIX, inputs))["velocity"])


Key = TypeVar("Key", bound=Hashable)


def side_by_side(profile: str, evaluations: Mapping[Key, Evaluation]) -> Generator[tuple[Call, ...], Answers, dict[Key, Outcome]]:
    """Run evaluations to their ends; what they ask for at one time are calls that may run together."""
    outcomes: dict[Key, Outcome] = {}
    pieces = {key: next(evaluation) for key, evaluation in evaluations.items()}
    while pieces:
        outputs = yield tuple(Call(piece.program, profile, piece.inputs) for piece in pieces.values())
        answers = dict(zip(pieces, outputs, strict=True))
        pieces = {}
        for key, answer in answers.items():
            try:
                pieces[key] = evaluations[key].send(answer)
            except StopIteration as done:
                outcomes[key] = done.value
    return outcomes


def remember(run: Run, branch: str, outcome: Outcome) -> None:
    """Keep what the branch's next evaluation needs, and count what was skipped."""
    others = {name: memory for name, memory in run.memories.items() if name != branch}
    run.memories = others if outcome.memory is None else {**others, branch: outcome.memory}
    run.cached += outcome.cached


def maybe_preview(job: Job, state: PipelineState) -> Generator[tuple[Call, ...], Answers, None]:
    """Every so many steps, decode the data that the last velocities point to."""
    every = job.request.preview_every
    if not every or not state.step or state.step % every:
        return
    path = PATHS[job.settings.path]
    newest = [(run.sampler.newest, job.table.times[run.sampler.step - 1]) for run in state.runs]
    data = torch.cat([velocity_to_x1(seen[1], seen[0], t, path) for seen, t in newest if seen is not None])
    video = yield from decode(job, data)
    state.preview = to_pixels(video[:, :, : job.request.frames])


def decode(job: Job, z: Tensor) -> Generator[tuple[Call, ...], Answers, Tensor]:
    """Latents [count, C, F, H, W] -> video [count, 3, T, H, W], in temporal tiles, which may run at once, and whose overlap is blended.

    Temporal tiling of Polyak et al. 2024, section 3.1.1.
    """
    size, begins = tiles_of(job.settings, z.shape[2])
    outputs = yield tuple(Call("decode", job.profile, {"latent": z[:, :, begin : begin + size].contiguous()}) for begin in begins)
    return blend_tiles([out["video"] for out in outputs], begins, job.settings.temporal_stride)


def profile_of(request: Request) -> str:
    """Of the programs whose sizes a request chooses."""
    return "image" if request.frames == 1 else "video"


def tiles_of(settings: ModelSettings, length: int) -> tuple[int, list[int]]:
    """Latent frames of a tile, and where each begins, for so many in all."""
    size = min(settings.tile_frames, length)
    return size, [min(begin, length - size) for begin in tile_starts(length, size, min(settings.tile_overlap, size - 1))]


def blend_tiles(tiles: Sequence[Tensor], begins: Sequence[int], stride: int) -> Tensor:
    """Join decoded tiles [count, 3, T, H, W] that begin at latent frames `begins`; weights of the later one rise over the overlap."""
    video = tiles[0]
    for tile, begin in zip(tiles[1:], begins[1:], strict=True):
        overlap = video.shape[2] - begin * stride
        w = blend_ramp(overlap)[:, None, None]
        mixed = (1 - w) * video[:, :, begin * stride :] + w * tile[:, :, :overlap]
        video = torch.cat([video[:, :, : begin * stride], mixed, tile[:, :, overlap:]], dim=2)
    return video


def to_pixels(video: Tensor) -> npt.NDArray[np.uint8]:
    """[count, 3, T, H, W] in [-1, 1] -> uint8 [count, T, H, W, 3]. Raises InternalError for NaN or infinity."""
    if not bool(torch.isfinite(video).all()):
        raise InternalError("the decoder gave values that are not finite; try another seed, a lower scale or float32")
    scaled = ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return np.ascontiguousarray(scaled.permute(0, 2, 3, 4, 1).numpy())


def from_pixels(picture: npt.NDArray[np.uint8]) -> Tensor:
    """uint8 [H, W, 3] -> [1, 3, 1, H, W] in [-1, 1]."""
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None, :, None].float() / 127.5 - 1
