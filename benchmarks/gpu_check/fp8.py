"""How much faster are linear layers in E4M3 than in bfloat16, and how far off?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from reelstep.benchmarks.gpu_check.bench import Bench, Finding
from reelstep.benchmarks.gpu_check.bounds import relative
from reelstep.kernels import OPS

FP8_PRODUCT = 0.045
"""Relative error allowed to a product of two E4M3 matrices: each rounds by 2**-4 at most and by 0.026 on average, and the two are independent. One of
matrices that were cut off in place of rounded has 0.057."""
E4M3_FROM = (8, 9)
"""The compute capability that products in E4M3 need."""


def fp8_layers(bench: Bench) -> Iterator[Finding]:
    """The layers of a block in E4M3, as a quantised engine has them, beside bfloat16 ones; the norm that quantises is in neither time."""
    from reelstep.compiler.passes.quantise import e4m3_linear, quantise_weight  # here: the passes take a while to import

    if why := without_e4m3(bench):
        yield Finding("E4M3 linear layers", note=why)
        return
    d, ffn, length = bench.sizes.config.width, bench.sizes.config.ffn, bench.sizes.tokens
    quantise = OPS["fp8_norm_quantise"].overload
    for inner, outer in ((d, d), (d, ffn), (ffn, d)):
        x, w = bench.randn(1, length, inner), bench.randn(outer, inner) / math.sqrt(inner)
        rows, (values, steps) = quantise(x, None, None, None, 1e-6, False), quantise_weight(w, "fp8")
        scaled = partial(e4m3_linear, rows, values, steps, torch.bfloat16)
        dense = F.rms_norm(x[0].float(), (inner,), None, 1e-6).to(x.dtype)
        few, flops = min(256, length), 2 * length * inner * outer
        error = relative(scaled()[0, :few], dense[:few].double() @ w.double().t())
        plain = bench.seconds(partial(F.linear, dense, w))
        quick = bench.seconds(scaled)
        yield bench.computed(f"bfloat16 linear {inner} -> {outer}", plain, flops)
        row = bench.computed(f"E4M3 linear {inner} -> {outer}", quick, flops, note=f"{plain / quick:.2f} times as fast as bfloat16")
        yield replace(row, error=error, allowed=FP8_PRODUCT, right=error <= FP8_PRODUCT)


def without_e4m3(bench: Bench) -> str:
    """Why its products do not run here; empty where they do."""
    if bench.device.type != "cuda" or (found := torch.cuda.get_device_capability(bench.device)) >= E4M3_FROM:
        return ""
    return f"not run: products in E4M3 need sm{E4M3_FROM[0]}{E4M3_FROM[1]}, and this is sm{found[0]}{found[1]}"
