"""Text to video."""

from __future__ import annotations

from reelstep.engine.pipelines.latent import Job, Pipeline, generate
from reelstep.engine.pipelines.state import PipelineState


def text_to_video(job: Job, state: PipelineState) -> Pipeline:
    """A video from words."""
    return generate(job, state, picture=None)
