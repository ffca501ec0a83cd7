"""Matrix products in bfloat16, where this CPU has instructions for them."""

from __future__ import annotations

import torch

from reelstep.compiler.skus import SKUS


def half_products(wanted: bool = True) -> torch.autocast:
    """Autocast to bfloat16; on a CPU without such products it does nothing, since PyTorch's substitute for them is many times slower than float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=wanted and SKUS["cpu"].bf16)


def products() -> str:
    """What `half_products` makes here, for the record of what was trained with it."""
    return "bfloat16 products" if SKUS["cpu"].bf16 else "float32"
