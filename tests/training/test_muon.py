"""Matrix views of convolutions: what Muon steps is what the network reads."""

import pytest
import torch
from torch import nn

from reelstep.training.muon import Matrices, matrix, muon


def test_a_kernel_and_its_matrix_are_the_same_memory_and_give_the_same_product():
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 7, 3, bias=False).to(memory_format=torch.channels_last)
    view = Matrices([conv.weight]).parameters[0]
    patch = torch.randn(1, 5, 3, 3)
    assert torch.allclose(view @ patch.permute(0, 2, 3, 1).flatten(), conv(patch).flatten(), atol=1e-6)
    with torch.no_grad():
        view.zero_()
    assert not conv.weight.any()


def test_a_step_moves_the_kernel_along_the_orthogonalised_gradient():
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, bias=False).to(memory_format=torch.channels_last)
    before = conv.weight.detach().clone()
    matrices = Matrices([conv.weight])
    optimizer = muon(matrices.parameters, weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = 0.1
    conv(torch.randn(2, 4, 5, 5)).square().mean().backward()
    matrices.take_gradients()
    optimizer.step()
    moved = matrix(before - conv.weight.detach())
    spread = torch.linalg.svdvals(moved)
    assert float(spread.max() / spread.min()) < 2.0, "Newton-Schulz brings all singular values near one size"
    assert float((moved * matrix(conv.weight.grad)).sum()) > 0


def test_a_kernel_that_would_be_copied_is_refused():
    with pytest.raises(AssertionError, match="channels-last"):
        Matrices([nn.Conv2d(4, 4, 3).weight])
