"""Muon for networks that have convolutions: PyTorch's takes matrices only, so it is handed matrix views of their kernels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def matrix(kernel: Tensor) -> Tensor:
    """[out, in] as it is; a convolution's [out, in, h, w] as [out, h w in], without a copy where it lies channels-last."""
    return kernel if kernel.ndim == 2 else kernel.permute(0, 2, 3, 1).reshape(kernel.shape[0], -1)


class Matrices:
    """Parameters that share memory with `kernels`, for an optimizer to step. Call `take_gradients` between backward and step."""

    def __init__(self, kernels: Iterable[nn.Parameter]) -> None:
        self.kernels = list(kernels)
        self.parameters = [nn.Parameter(matrix(kernel.data)) for kernel in self.kernels]
        for kernel, view in zip(self.kernels, self.parameters, strict=True):
            assert view.data_ptr() == kernel.data_ptr(), "a kernel that is not channels-last would be copied, and the copy trained"

    def take_gradients(self) -> None:
        for kernel, view in zip(self.kernels, self.parameters, strict=True):
            assert kernel.grad is not None
            view.grad = matrix(kernel.grad)


def muon(matrices: list[nn.Parameter], weight_decay: float) -> torch.optim.Muon:
    """Its rate is on AdamW's scale (Liu et al. 2025, arXiv:2502.16982); set `lr` of its groups before each step."""
    return torch.optim.Muon(matrices, lr=1.0, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw")
