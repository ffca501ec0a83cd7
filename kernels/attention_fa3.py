"""FlashAttention-3 on Hopper, where its package is installed. Shah et al. 2024, arXiv:2407.08608.

Its call for caches is the one of its calls that returns lse in every release, takes key lengths, and needs no cache to be new.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from reelstep.kernels.attention_choice import Implementation

PACKAGE = "flash_attn_interface"


@cache
def lacks() -> str | None:
    """Why it cannot be called. Asked once: every call of `attention` would search all of sys.path for a package that is not there."""
    if find_spec(PACKAGE) is None:
        return f"package {PACKAGE} is not installed"
    try:
        import_module(PACKAGE)
    except (ImportError, OSError) as error:  # one that was built for another torch
        return f"package {PACKAGE} cannot be imported: {error}"
    return None


def refuses(q: Tensor, lengths: Tensor | None) -> str | None:
    if why := lacks():
        return why
    if not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] != 9:
        return "it runs on Hopper (sm90) alone"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"head dim {q.shape[-1]} is not a multiple of 8 up to 256"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    q_BLNK, k_BSNK, v_BSNK = (x if x.stride(-1) == 1 else x.contiguous() for x in (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)))
    lengths = None if lengths is None else lengths.contiguous()
    out, lse, *_ = import_module(PACKAGE).flash_attn_with_kvcache(
        q_BLNK, k_BSNK, v_BSNK, cache_seqlens=lengths, softmax_scale=scale, causal=False, return_softmax_lse=True
    )
    return out.contiguous().transpose(1, 2), lse.contiguous()


IMPLEMENTATION = Implementation("fa3", refuses, run)
