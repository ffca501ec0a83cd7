"""One file per question. Each prints a table and writes its rows, with the conditions they were measured under, as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from reelstep.registry import Registry

BENCHMARKS: Registry[Callable[[Sequence[str]], None]] = Registry(
    "benchmark",
    {
        "engine": "reelstep.benchmarks.engine:main",
        "quantised": "reelstep.benchmarks.quantised:main",
        "startup": "reelstep.benchmarks.startup:main",
        "sticker": "reelstep.benchmarks.sticker:main",
        "concurrency": "reelstep.benchmarks.concurrency:main",
        "overhead": "reelstep.benchmarks.overhead:main",
        "replicas": "reelstep.benchmarks.replicas:main",
        "animation": "reelstep.benchmarks.animation:main",
        "steps": "reelstep.benchmarks.steps:main",
        "flash": "reelstep.benchmarks.flash:main",
        "frechet": "reelstep.benchmarks.frechet:main",
        "context_parallel": "reelstep.benchmarks.context_parallel:main",
        "piecewise": "reelstep.benchmarks.piecewise:main",
        "planner": "reelstep.benchmarks.planner:main",
        "gpu_check": "reelstep.benchmarks.gpu_check.__main__:main",
        "simulate": "reelstep.benchmarks.simulate:main",
        "deadlines": "reelstep.benchmarks.deadlines:main",
        "lora": "reelstep.benchmarks.lora:main",
    },
)
"""Entry point of each benchmark: it takes the command line after its name."""
