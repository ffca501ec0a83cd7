"""How near does the 30B transformer come to the peak: one block, and where memory allows all of them, on random weights?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from reelstep.benchmarks.gpu_check.bench import Bench, Finding
from reelstep.compiler.cost import module_flops
from reelstep.engine.models.movie_gen import Block, MovieGenTransformer

BLOCK_AIM = 0.60
"""MFU of a block."""


def on_device(module: nn.Module, bench: Bench) -> nn.Module:
    """A module of the meta device with random weights in bfloat16."""
    module = module.to(torch.bfloat16).to_empty(device=bench.device).eval().requires_grad_(False)
    for weight in (*module.parameters(), *module.buffers()):
        weight.normal_(0.0, 0.02, generator=bench.generator)
    return module


def block_inputs(bench: Bench, meta: bool = False) -> tuple[Tensor, ...]:
    """Of `Block`: tokens, positions, modulation, context."""
    sizes, d = bench.sizes, bench.sizes.config.width
    shapes = ((1, sizes.tokens, d), (sizes.tokens, d), (1, 6, d), (1, sizes.text, d))
    return tuple(torch.empty(shape, device="meta") if meta else bench.randn(*shape) for shape in shapes)


def with_mfu(bench: Bench, row: Finding) -> Finding:
    """The share is of the peak in the device's data sheet, as MFU is; of the measured product where the table has none."""
    if (sku := bench.sku) is None or row.rate is None:
        return replace(row, note=f"share of the measured product; {row.note}")
    peak = sku.peak_flops["bfloat16"]
    of_measured = "" if row.share is None else f", {row.share:.1%} of the measured product"
    return replace(row, share=row.rate * 1e12 / peak, note=f"MFU, of the data sheet's {peak / 1e12:.0f} TFLOP/s{of_measured}; {row.note}")


def one_block(bench: Bench) -> Iterator[Finding]:
    with torch.device("meta"):
        module: nn.Module = Block(bench.sizes.config)
    flops = module_flops(module, *block_inputs(bench, meta=True))
    module, inputs = on_device(module, bench), block_inputs(bench)
    row = bench.computed("one block, op by op", bench.seconds(lambda: module(*inputs), 3.0, warmup=1), flops, BLOCK_AIM, f"{bench.sizes.tokens} tokens")
    yield replace(with_mfu(bench, row), right=bool(module(*inputs).isfinite().all()))


def whole_forward(bench: Bench) -> Iterator[Finding]:
    """All blocks on random weights, once to warm up and once timed; or what is missing for it."""
    sizes, config = bench.sizes, bench.sizes.config
    with torch.device("meta"):
        module: nn.Module = MovieGenTransformer(config)
        inputs = [torch.empty(1, config.latent_channels, *sizes.latent), torch.empty(1, 7, config.width), None, torch.empty(1, sizes.text, config.width)]
    weights = 2 * sum(p.numel() for p in module.parameters())
    need = weights + 2 * sizes.tokens * (3 * config.ffn + 4 * config.width)  # of a block: three tensors of the feed-forward's width, four of the model's
    if bench.device.type == "cuda" and need > (free := torch.cuda.mem_get_info(bench.device)[0]):
        yield Finding("whole forward", note=f"not run: it needs about {need / 1e9:.0f} GB and {free / 1e9:.0f} GB are free")
        return
    flops = module_flops(module, *inputs)  # type: ignore[arg-type]  # a model without condition latents is given None
    module = on_device(module, bench)
    given = [None if x is None else bench.randn(*x.shape) for x in inputs]
    began = time.perf_counter()
    finite = bool(module(*given).isfinite().all())
    first = time.perf_counter() - began
    row = bench.computed("whole forward, op by op", bench.each(lambda: module(*given), 1)[0], flops, note=f"{config.layers} blocks, first call {first:.1f} s")
    yield replace(with_mfu(bench, row), right=finite)
