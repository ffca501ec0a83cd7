"""How near do the kernels that memory bounds come to a copy's rate?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from reelstep.benchmarks.gpu_check.bench import Bench, Finding, tried
from reelstep.kernels import OPS
from reelstep.kernels.op import tensors_of
from reelstep.kernels.qk_norm_rope import rotary_3d


def memory_bound(bench: Bench) -> Iterator[Finding]:
    """Bytes: each argument read once, each output written once."""

    def measured(name: str, arguments: tuple[Any, ...], note: str) -> Finding:
        op = OPS[name].overload
        bytes_ = sum(x.nbytes for x in (*tensors_of(arguments), *tensors_of(op(*arguments))))
        return bench.moved(name, bench.seconds(partial(op, *arguments)), bytes_, note=note)

    for example in large_examples(bench):
        yield tried(example[0], partial(measured, *example))


def large_examples(bench: Bench) -> Iterator[tuple[str, tuple[Any, ...], str]]:
    """Every op but attention, with arguments at the model's shapes, made one op at a time."""
    sizes, randn = bench.sizes, bench.randn
    config, length, d, k = sizes.config, sizes.tokens, sizes.config.width, sizes.head
    (f, h, w), patch = sizes.latent, list(config.patch)
    grid = [size // p for size, p in zip(sizes.latent, patch, strict=True)]
    tokens = f"[1, {length}, {d}]"
    yield "rms_modulate", (randn(1, length, d), randn(1, d), randn(1, d), randn(d), 1e-6, False), tokens
    yield "gated_residual", (randn(1, length, d), randn(1, d), randn(1, length, d)), tokens
    turn = tuple(x.to(bench.device) for x in rotary_3d((grid[0], grid[1], grid[2]), k))
    heads = (1, length, config.heads, k)
    yield "qk_norm_rope", (randn(*heads), randn(*heads), randn(k), randn(k), *turn, 1e-6), str(list(heads))
    yield "swiglu", (randn(1, length, config.ffn), randn(1, length, config.ffn)), f"[1, {length}, {config.ffn}]"
    yield "gelu_tanh", (randn(1, length, config.ffn),), f"[1, {length}, {config.ffn}]"
    yield "fp8_norm_quantise", (randn(1, length, d), randn(1, d), randn(1, d), randn(d), 1e-6, False), tokens
    parts = [part for _ in range(2) for part in (randn(1, config.heads, length, k), randn(1, config.heads, length, dtype=torch.float32))]
    yield "lse_merge", tuple(parts), f"[1, {config.heads}, {length}, {k}]"
    latent = (sizes.clips, config.latent_channels, f, h, w)
    yield "patchify", (randn(*latent), patch, False), str(list(latent))
    values = config.latent_channels * math.prod(patch)
    yield "unpatchify", (randn(sizes.clips, length, values), grid, patch, False), f"[{sizes.clips}, {length}, {values}]"
    x = [randn(*latent, dtype=torch.float32) for _ in range(6)]
    yield "solver_step", (x[0], x[1], x[2], x[3:], 7.5, 0.5, [0.1, -0.2, 0.3, 0.4]), f"{list(latent)}, float32"
