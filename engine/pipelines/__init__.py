"""The table of pipelines: whole tasks, as generators of calls."""

from __future__ import annotations

from collections.abc import Callable

from reelstep.engine.pipelines.latent import Job, Pipeline
from reelstep.engine.pipelines.state import PipelineState
from reelstep.registry import Registry

PIPELINES: Registry[Callable[[Job, PipelineState], Pipeline]] = Registry(
    "task",
    {
        "text_to_image": "reelstep.engine.pipelines.text_to_image:text_to_image",
        "text_to_video": "reelstep.engine.pipelines.text_to_video:text_to_video",
        "animate_sticker": "reelstep.engine.pipelines.animate_sticker:animate_sticker",
    },
)
