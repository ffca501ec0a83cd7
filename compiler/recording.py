"""What an engine launches on a GPU, recorded as a CUDA graph: a replay is one launch, where a small network waits for launches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from reelstep.errors import InternalError

Made = TypeVar("Made")

log = logging.getLogger(__name__)


def record(launch: Callable[[], Made], stream: torch.cuda.Stream, where: str, memory: Any = None) -> tuple[torch.cuda.CUDAGraph, Made] | None:
    """What `launch` puts on a stream, as a graph that does it again on the same memory, and what it gave. memory: a pool to take from, else one of its own.

    To be called with `AT_WORK` held, after a launch that was not recorded: the first does work that a graph must not hold. None where it cannot be recorded,
    with a warning that names `where`.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # The first puts the thread back on its own stream where the second, which cannot end, does not; other threads go on as they are.
        with torch.cuda.stream(stream), torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
            made = launch()
    except (InternalError, RuntimeError) as error:
        log.warning("%s cannot be recorded as a CUDA graph, and runs without, its kernels launched one by one: %s", where, error.__context__ or error)
        return None
    return graph, made
