"""NVFP4: numbers of 4 bits, a scale for each 16 of them, and one for the tensor, as NVIDIA's Blackwell multiplies them.

    value = e2m1 * e4m3 * float32

E2M1 has 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives (Rouhani et al. 2023, arXiv:2310.10537). The tensor's scale makes the largest block's own scale
the largest that E4M3 has, 448 (NVIDIA 2025, arXiv:2509.25149). Blocks run along the last dim, which products sum over; the first of two neighbours lies
in a byte's low half. So ModelOpt's checkpoints hold it, and torch reads such bytes as `float4_e2m1fn_x2`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reelstep.kernels.fp8_norm_quantise import LARGEST as LARGEST_E4M3

BLOCK = 16
LARGEST = 6.0
SMALLEST_E4M3 = 2.0**-9
"""Above zero: a block of smaller numbers takes this scale, as none can be divided by 0."""
REACH = LARGEST * LARGEST_E4M3
"""Of a tensor: its largest magnitude over its scale."""
NEGATIVE = 8
"""The bit of a code that is its sign."""


def block_scales(x: Tensor, scale: float | Tensor) -> Tensor:
    """x [..., K] -> [..., K / 16] in E4M3, so that a block's largest magnitude becomes about 6; what is above the tensor's range is clipped."""
    largest: Tensor = x.unflatten(-1, (-1, BLOCK)).abs().amax(-1)
    return (largest / (LARGEST * scale)).clamp(SMALLEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)


def codes_of(x: Tensor, scales: Tensor, scale: float | Tensor) -> Tensor:
    """x [..., K] -> the nearest of the 16 codes [..., K] in uint8, of two as near the even one."""
    scaled = (x.unflatten(-1, (-1, BLOCK)) / (scales.float() * scale).unsqueeze(-1)).flatten(-2)
    size = scaled.abs().clamp(max=LARGEST)
    # from 0 a code is worth 0.5, from 2 it is 1, from 4 it is 2; `round` takes the even one of two, and a code's parity is that of its integer here
    code = torch.where(size < 2, (2 * size).round(), torch.where(size < 4, size.round() + 2, (size / 2).round() + 4))
    return code.to(torch.uint8) + NEGATIVE * torch.signbit(scaled).to(torch.uint8)


def values_of(codes: Tensor, scales: Tensor, scale: float | Tensor) -> Tensor:
    """Codes [..., K] and what they are scaled by -> float32 [..., K]."""
    code = (codes % NEGATIVE).float()
    size = torch.where(code < 4, code / 2, torch.where(code < 6, code - 2, 2 * code - 8))
    values = torch.where(codes < NEGATIVE, size, -size)
    exact: Tensor = (values.unflatten(-1, (-1, BLOCK)) * (scales.float() * scale).unsqueeze(-1)).flatten(-2)
    return exact


def pack(codes: Tensor) -> Tensor:
    """[..., K] -> [..., K / 2], two in a byte."""
    return codes[..., ::2] + 16 * codes[..., 1::2]


def unpack(packed: Tensor) -> Tensor:
    """The reverse of `pack`."""
    return torch.stack([packed % 16, packed // 16], -1).flatten(-2)


def through_nvfp4(x: Tensor, scale: float | Tensor) -> Tensor:
    """x [..., K] as NVFP4 holds it, in float32: what a product of such numbers reads."""
    scales = block_scales(x, scale)
    return values_of(codes_of(x, scales, scale), scales, scale)
