"""PyTorch's own attentions that give lse: cuDNN and FlashAttention-2 for half precision on a GPU, the memory-efficient one for float32, a flash one on a CPU.

Dao 2023, arXiv:2307.08691.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reelstep.kernels.attention import as_tokens, counted
from reelstep.kernels.attention_choice import Implementation
from reelstep.kernels.jit import unit_rows

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
ALIGNED = 16  # bytes


def refuses(q: Tensor, lengths: Tensor | None) -> str | None:
    if q.device.type not in ("cpu", "cuda"):
        return f"there is none for {q.device.type}"
    if q.device.type == "cpu":
        return None
    if lengths is not None:
        return "on a GPU it takes no key lengths"
    if q.dtype not in (*HALF, torch.float32):
        return f"on a GPU it takes float16, bfloat16 and float32, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"head dim {q.shape[-1]} is not a multiple of 8 up to 256"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = unit_rows(q), unit_rows(k), unit_rows(v)  # called directly, some of them read rows as if in one piece and do not check
    if q.device.type == "cpu":
        return _on_cpu(q, k, v, lengths, scale)
    q, k, v = aligned(q), aligned(k), aligned(v)
    if q.dtype == torch.float32:
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)[:2]
    elif _cudnn_is_better(q, k):
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)[:2]
    else:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    b, n, length, _ = q.shape
    # One of them pads the queries to a multiple of 32, one has a last dim of 1.
    return as_tokens(out), lse.reshape(b, n, -1)[..., :length].contiguous()


def aligned(x: Tensor) -> Tensor:
    """x itself if each of its rows begins where loads of 16 bytes may, which a GPU's kernels use without looking; else a copy."""
    at = (x.data_ptr(), *(stride * x.element_size() for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1))
    return x if all(place % ALIGNED == 0 for place in at) else x.clone(memory_format=torch.contiguous_format)


def _cudnn_is_better(q: Tensor, k: Tensor) -> bool:
    """From Hopper on, where FlashAttention-2 reaches about half of the tensor cores' rate. Torch itself gives it no lone query and no lone key."""
    allowed = q.shape[-1] <= 128 and min(q.shape[2], k.shape[2]) > 1 and torch.backends.cuda.cudnn_sdp_enabled()
    return allowed and torch.cuda.get_device_capability(q.device) >= (9, 0)


def _on_cpu(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    mask = None
    if lengths is not None:
        mask = q.new_zeros(q.shape[0], 1, 1, k.shape[2]).masked_fill(~counted(lengths, k.shape[2]), -torch.inf).expand(-1, -1, q.shape[2], -1)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
    if lengths is not None:
        none = (lengths <= 0)[:, None, None]  # a softmax of nothing
        out, lse = out.masked_fill(none[..., None], 0), lse.masked_fill(none, -torch.inf)
    return as_tokens(out), lse.contiguous()


IMPLEMENTATION = Implementation("sdpa", refuses, run)
