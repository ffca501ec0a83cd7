"""Text to image: a video of one frame."""

from __future__ import annotations

from reelstep.engine.pipelines.latent import Job, Pipeline, generate
from reelstep.engine.pipelines.state import PipelineState


def text_to_image(job: Job, state: PipelineState) -> Pipeline:
    """A picture from words."""
    assert job.request.frames == 1, f"an image has one frame, not {job.request.frames}"
    return generate(job, state, picture=None)
