"""pytest-benchmark timings of the small things that every request pays for: `pytest benchmarks --benchmark-only`.

Each is checked for its result as well, so a fast wrong answer fails.
"""

from __future__ import annotations

import math

import pytest
import torch

from reelstep.engine.samplers.guidance import GUIDANCE, GuidanceState, guided
from reelstep.engine.samplers.ns import drive, sample, start
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.schedules import SCHEDULES
from reelstep.engine.samplers.tables import SOLVERS
from reelstep.engine.scheduler import Scheduler

KEY = ("model", "denoise", "video")
STEPS = 16


def scheduled(requests: int) -> int:
    """Push a call of each request and take all batches."""
    scheduler = Scheduler({KEY: 16})
    for i in range(requests):
        scheduler.push(f"{i}", 0, KEY, 1, 0, math.inf, 0.0)
    taken = 0
    while batch := scheduler.next_batch(0.0):
        taken += len(batch)
    return taken


@pytest.mark.parametrize("requests", [1, 16, 256])
def test_scheduling_calls(benchmark, requests: int) -> None:  # type: ignore[no-untyped-def]
    assert benchmark(scheduled, requests) == requests


@pytest.mark.parametrize("solver", list(SOLVERS))
def test_sampler_and_guidance_without_a_network(benchmark, solver: str) -> None:  # type: ignore[no-untyped-def]
    table = SOLVERS[solver].build(SCHEDULES["linear"](STEPS), PATHS["condot"])
    noise = torch.ones(1, 16, 4, 8, 8)
    zero = (torch.zeros_like(noise), torch.zeros_like(noise))

    rule = GUIDANCE["cfg"].build(3.0, PATHS["condot"], {})

    def run() -> torch.Tensor:
        return drive(guided(sample(table, start(table, noise), lambda step: noise), rule, GuidanceState()), lambda x, t, branches: zero)

    out = benchmark(run)
    assert torch.isfinite(out).all()
    if table.a == (1.0,) * table.n and not table.noise:
        assert torch.equal(out, noise), "nothing moves where the velocity is zero"
