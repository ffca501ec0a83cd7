"""A small byte-level text encoder (in the manner of ByT5, Xue et al. 2021, arXiv:2105.13626), trained with its denoiser.

Any encoder that gives [B, L, D] can stand in its place. B batch, L bytes, D width, N heads, K head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

PAD, END, OFFSET = 0, 1, 3
VOCABULARY = 256 + OFFSET


@dataclass(frozen=True)
class ByteTextConfig:
    """Sizes of one encoder."""

    length: int  # bytes, the end mark included
    width: int
    layers: int
    heads: int


def tokenize(text: str, length: int) -> list[int]:
    """UTF-8 bytes + 3, an end mark, zeros up to `length`. An empty text is the null prompt. Longer texts are the caller's error."""
    data = text.lower().encode()
    assert len(data) < length, f"{len(data)} bytes do not fit in {length} with the end mark; validate() refuses them first"
    return [b + OFFSET for b in data] + [END] + [PAD] * (length - len(data) - 1)


class Layer(nn.Module):
    """Pre-norm transformer layer; padding is never attended to."""

    def __init__(self, config: ByteTextConfig) -> None:
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.norm1 = nn.RMSNorm(d, eps=1e-6)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.norm2 = nn.RMSNorm(d, eps=1e-6)
        self.up = nn.Linear(d, 4 * d, bias=False)
        self.down = nn.Linear(4 * d, d, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm1(x)), "B L (three N K) -> three B N L K", three=3, N=self.heads).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        x = x + self.out(rearrange(y, "B N L K -> B L (N K)"))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class ByteTextEncoder(nn.Module):
    """tokens [B, L] int64 -> [B, L, D]; padded places give zeros."""

    def __init__(self, config: ByteTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.position = nn.Parameter(torch.randn(config.length, config.width) * 0.02)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        real = (tokens != PAD).to(self.position.dtype)  # [B, L]
        bias = (real[:, None, None, :] - 1) * 1e4
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, bias)
        return self.norm(x) * real[:, :, None]
