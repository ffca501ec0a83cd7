"""Animate a still sticker as words say (Yan et al. 2024, arXiv:2402.06088): its latent is repeated over frames and joined on channels."""

from __future__ import annotations

from reelstep.engine.media import fit_picture
from reelstep.engine.pipelines.latent import Job, Pipeline, from_pixels, generate
from reelstep.engine.pipelines.state import PipelineState


def animate_sticker(job: Job, state: PipelineState) -> Pipeline:
    """A video whose middle frame is the picture. The picture is fitted to the model's size; transparent parts become white."""
    image = job.request.image
    assert image is not None, "animate_sticker needs a picture; the edge refuses requests without one"
    return generate(job, state, picture=from_pixels(fit_picture(image, job.request.width, job.request.height)))
