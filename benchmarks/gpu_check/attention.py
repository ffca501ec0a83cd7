"""How near does self-attention come to a matrix product's rate, by each implementation?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from reelstep.benchmarks.gpu_check.bench import Bench, Finding, tried
from reelstep.benchmarks.gpu_check.bounds import relative
from reelstep.kernels.attention_choice import ATTENTIONS

ATTENTION_AIM = 0.65
"""Share of the large product's rate."""
HALF_ATTENTION = 0.02
"""Relative error allowed to attention in half precision over many keys: a few roundings of 2**-8 of its probabilities and values."""


def attention_rates(bench: Bench) -> Iterator[Finding]:
    """Self-attention of one block by every implementation, its first queries against float32."""
    sizes = bench.sizes
    q, k, v = (bench.randn(1, sizes.tokens, sizes.config.heads, sizes.head).transpose(1, 2) for _ in range(3))
    scale, flops, few = sizes.head**-0.5, 4 * sizes.tokens**2 * sizes.config.width, min(32, sizes.tokens)
    truth, _ = ATTENTIONS["reference"].run(q[:, :, :few].float(), k.float(), v.float(), None, scale)
    runs: dict[str, Callable[[], Tensor]] = {"torch scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(q, k, v)}
    for name in ATTENTIONS:
        if why := "its scores would not fit the memory" if name == "reference" else ATTENTIONS[name].refuses(q, None):
            yield Finding(f"attention {name}", note=f"not run: {why}")
        else:
            runs[f"attention {name}"] = lambda run=ATTENTIONS[name].run: run(q, k, v, None, scale)[0]  # type: ignore[misc]

    def measured(name: str, run: Callable[[], Tensor]) -> Finding:
        error = relative(run()[:, :, :few], truth)
        row = bench.computed(name, bench.seconds(run, 2.0, warmup=1), flops, ATTENTION_AIM, f"{list(q.shape)}")
        return replace(row, error=error, allowed=HALF_ATTENTION, right=error <= HALF_ATTENTION)

    for named in runs.items():
        yield tried(named[0], partial(measured, *named))
