"""An op's function, where a derivative is wanted: against finite differences, backwards and forwards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from reelstep.kernels.gated_residual import gated_residual
from reelstep.kernels.gelu_tanh import gelu_tanh
from reelstep.kernels.op import differentiated
from reelstep.kernels.patchify import patchify
from reelstep.kernels.rms_modulate import rms_modulate
from reelstep.kernels.swiglu import swiglu
from reelstep.kernels.unpatchify import unpatchify

FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "rms_modulate": (rms_modulate, ((2, 3, 4), (2, 4), (2, 4), (4,))),
    "gated_residual": (gated_residual, ((2, 3, 4), (2, 4), (2, 3, 4))),
    "swiglu": (swiglu, ((2, 3), (2, 3))),
    "gelu_tanh": (gelu_tanh, ((2, 3),)),
    "patchify": (partial(patchify, patch=(1, 2, 2)), ((1, 2, 1, 2, 4),)),
    "unpatchify": (partial(unpatchify, grid=(1, 1, 2), patch=(1, 2, 2)), ((1, 2, 8),)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own use, where it differentiates forwards
@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_are_those_of_finite_differences(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(0)
    arguments = tuple(torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    assert torch.autograd.gradcheck(function, arguments, check_forward_ad=name != "rms_modulate")  # torch's fused norm has no forward derivative


def test_without_a_derivative_the_op_runs() -> None:
    x = torch.randn(2, 3, requires_grad=True)
    assert differentiated(([x],))
    assert not differentiated(([x.detach()], None, 1.0))
    with torch.no_grad():
        assert not differentiated((x,))
        graph = torch.export.export(Middle(), (x, x), strict=False).graph
    assert [str(node.target) for node in graph.nodes if node.op == "call_function"] == ["reelstep.swiglu.default"]


class Middle(torch.nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return swiglu(a, b)
