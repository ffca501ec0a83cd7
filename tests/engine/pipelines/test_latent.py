"""Pipelines as generators: resuming, tiling, profiles."""

import copy

import numpy as np
import pytest
import torch

from reelstep.engine.pipelines import PIPELINES
from reelstep.engine.pipelines.latent import Job, blend_tiles, decode
from reelstep.engine.pipelines.state import PipelineState
from reelstep.engine.samplers.guidance import GUIDANCE
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.schedules import SCHEDULES
from reelstep.engine.samplers.step_cache import STEP_CACHES
from reelstep.engine.samplers.tables import SOLVERS


def run(pipeline, programs, saves=None, state=None):
    """Drive a pipeline on closed-form programs; after every answer, keep a deep copy of its state."""
    answers = None
    seen = []
    while True:
        try:
            calls = next(pipeline) if answers is None else pipeline.send(answers)
        except StopIteration as done:
            return done.value, seen
        seen += [call.key for call in calls]
        if saves is not None:
            saves.append(copy.deepcopy(state))
        answers = tuple(programs[call.key](call.inputs) for call in calls)


def job_for(request, settings):
    table = SOLVERS[request.solver].build(SCHEDULES[request.schedule](request.steps), PATHS[settings.path])
    guidance = GUIDANCE[request.guidance]
    cache = STEP_CACHES[request.step_cache].build(table.n, guidance.measures, request.step_cache_options) if request.step_cache else None
    return Job(request, settings, table, guidance.build(request.scale, PATHS[settings.path], request.guidance_options), cache)


@pytest.mark.parametrize("task", list(PIPELINES))
def test_a_pipeline_resumed_from_any_saved_state_continues_bit_for_bit(task, closed_form, request_for):
    settings, programs, _ = closed_form
    picture = np.random.default_rng(0).integers(0, 255, (20, 10, 4)).astype(np.uint8) if task == "animate_sticker" else None
    request = request_for(task=task, frames=1 if task == "text_to_image" else 8, scale=1.5, steps=3, count=2, image=picture, solver="midpoint")
    job, state, saves = job_for(request, settings), PipelineState(), []
    whole, _ = run(PIPELINES[task](job, state), programs, saves, state)
    assert len(saves) > 6
    for saved in saves:
        again, _ = run(PIPELINES[task](job, saved), programs)
        assert np.array_equal(again.frames, whole.frames)
        assert [vars(run.guidance) for run in saved.runs] == [vars(run.guidance) for run in state.runs]


def counts(state):
    return [(each.guidance.nfe, each.forwards, each.cached) for each in state.runs]


@pytest.mark.parametrize("step_cache", list(STEP_CACHES))
@pytest.mark.parametrize("guidance", list(GUIDANCE))
def test_a_run_with_a_step_cache_resumed_between_any_two_calls_continues_bit_for_bit(step_cache, guidance, closed_form, request_for):
    settings, programs, _ = closed_form
    scale = 1.0 if guidance == "none" else 3.0
    request = request_for(steps=5, scale=scale, guidance=guidance, count=2, step_cache=step_cache, step_cache_options={"threshold": 0.9})
    job, state, saves = job_for(request, settings), PipelineState(), []
    whole, seen = run(PIPELINES["text_to_video"](job, state), programs, saves, state)
    assert {name for name, _ in seen} >= {"denoise", "denoise_embed", "denoise_first", "denoise_rest"}
    assert all(each.cached > 0 for each in state.runs) or GUIDANCE[guidance].measures, "it does skip"
    for saved in saves:
        again, _ = run(PIPELINES["text_to_video"](job, saved), programs)
        assert np.array_equal(again.frames, whole.frames)
        assert counts(saved) == counts(state)


@pytest.mark.parametrize("step_cache", list(STEP_CACHES))
def test_every_branch_of_every_output_has_a_memory_of_its_own_and_the_last_evaluation_frees_it(step_cache, closed_form, request_for):
    settings, programs, _ = closed_form
    request = request_for(steps=6, scale=2.0, count=2, step_cache=step_cache, step_cache_options={"threshold": 0.3, "last": 2})
    state, saves = PipelineState(), []
    run(PIPELINES["text_to_video"](job_for(request, settings), state), programs, saves, state)
    kept = [[{name: memory.residual for name, memory in each.memories.items()} for each in saved.runs] for saved in saves]
    first = next(runs for runs in kept if runs and all(runs))
    assert [set(memories) for memories in first] == [{"text", "null"}] * 2
    residuals = [residual for memories in first for residual in memories.values()]
    assert all(not torch.equal(a, b) for k, a in enumerate(residuals) for b in residuals[:k])
    assert kept[-1] == [{}, {}]


def test_an_image_uses_the_image_profile_and_a_video_the_video_profile(closed_form, request_for):
    settings, programs, _ = closed_form
    for task, frames, profile in (("text_to_image", 1, "image"), ("text_to_video", 8, "video")):
        media, seen = run(PIPELINES[task](job_for(request_for(task=task, frames=frames), settings), PipelineState()), programs)
        assert media.frames.shape[1] == frames
        assert {key for key in seen if key[0] in ("denoise", "decode")} == {("denoise", profile), ("decode", profile)}


def test_text_picture_and_time_are_embedded_once(closed_form, request_for):
    settings, programs, _ = closed_form
    picture = np.zeros((16, 16, 3), np.uint8)
    _, seen = run(PIPELINES["animate_sticker"](job_for(request_for(task="animate_sticker", image=picture, steps=7), settings), PipelineState()), programs)
    assert [seen.count((name, profile)) for name, profile in (("encode_text", "any"), ("embed_time", "any"), ("encode_image", "image"))] == [1, 1, 1]
    assert seen.count(("denoise", "video")) == 7


def test_on_straight_lines_every_preview_shows_the_result(closed_form, request_for):
    settings, programs, _ = closed_form
    for solver in ("euler", "midpoint"):
        state, saves = PipelineState(), []
        request = request_for(solver=solver, steps=4, preview_every=1)
        media, _ = run(PIPELINES["text_to_video"](job_for(request, settings), state), programs, saves, state)
        previews = [(s.step, s.preview) for s in saves if s.preview is not None]
        assert {step for step, _ in previews} >= set(range(1, state.steps)), "one after every step but the last"
        assert all(np.abs(p.astype(int) - media.frames).max() <= 1 for _, p in previews), "not the noisy state on the way"


def test_the_picture_conditions_the_result(closed_form, request_for):
    settings, programs, (target, _) = closed_form
    picture = np.full((16, 16, 3), 255, np.uint8)
    media, _ = run(PIPELINES["animate_sticker"](job_for(request_for(task="animate_sticker", image=picture), settings), PipelineState()), programs)
    assert abs(int(media.frames[0, 0, 0, 0, 0]) - round((target + 0.1 + 1) * 127.5)) <= 1


def test_a_decoder_that_gives_a_constant_blends_to_the_constant():
    tiles = [torch.full((1, 3, 8, 2, 2), 0.3) for _ in range(3)]
    video = blend_tiles(tiles, [0, 2, 4], stride=2)
    assert video.shape[2] == 16
    assert torch.allclose(video, torch.full_like(video, 0.3), atol=1e-7)


def test_the_later_tile_gains_weight_over_the_overlap():
    video = blend_tiles([torch.zeros(1, 3, 8, 1, 1), torch.ones(1, 3, 8, 1, 1)], [0, 2], stride=2)[0, 0, :, 0, 0]
    assert torch.allclose(video, torch.tensor([0, 0, 0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1, 1, 1]))


def test_a_tiled_decode_of_a_local_decoder_equals_the_whole(closed_form, request_for):
    settings, programs, _ = closed_form
    z = torch.randn(2, 3, 7, 2, 2)
    job = job_for(request_for(), settings)
    (tiled, seen) = run(decode(job, z), programs)
    assert len(seen) == 6  # tiles of 2, overlap 1, over 7
    assert len(next(decode(job, z))) == 6, "at once, for an executor that can"
    assert torch.allclose(tiled, programs["decode", "video"]({"latent": z})["video"], atol=1e-6)
