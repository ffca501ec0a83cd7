"""What a device can do: the rates of a copy and of a large matrix product, of which every other rate is a share."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from reelstep.benchmarks.gpu_check.bench import Bench, Finding


def ceilings(bench: Bench) -> Iterator[Finding]:
    """What shares are of."""
    x = bench.randn(bench.sizes.tokens, bench.sizes.config.width)
    y = torch.empty_like(x)
    seconds = bench.seconds(lambda: y.copy_(x))
    bench.copy_bytes_per_s = 2 * x.nbytes / seconds
    yield bench.moved(f"copy of {x.nbytes / 1e6:.0f} MB", seconds, 2 * x.nbytes, None)
    n = bench.sizes.matmul
    a, b = bench.randn(n, n), bench.randn(n, n)
    seconds = bench.seconds(lambda: a @ b)
    bench.matmul_flops_per_s = 2 * n**3 / seconds
    yield bench.computed(f"bfloat16 product of side {n}", seconds, 2 * n**3, note=peak_note(bench))


def peak_note(bench: Bench) -> str:
    """The measured rates beside a data sheet's, where the device is in the table."""
    if bench.device.type != "cuda" or bench.copy_bytes_per_s is None or bench.matmul_flops_per_s is None:
        return ""
    if (sku := bench.sku) is None:
        return "no data sheet of this device in the table of SKUs"
    memory = "" if sku.bandwidth_bytes_per_s is None else f"{bench.copy_bytes_per_s / sku.bandwidth_bytes_per_s:.1%} of the bandwidth and "
    return f"{memory}{bench.matmul_flops_per_s / sku.peak_flops['bfloat16']:.1%} of the bfloat16 peak of {sku.name}'s data sheet"
