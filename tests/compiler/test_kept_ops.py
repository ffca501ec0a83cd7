"""Ops that a backend keeps stand whole in its bundle's graphs; another backend that loads the bundle gets their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelstep.compiler.backends import null
from reelstep.compiler.load import load
from reelstep.compiler.program import Profile, Program, TensorSpec
from reelstep.kernels.gelu_tanh import gelu_tanh


class Act(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return gelu_tanh(self.linear(x))


@pytest.mark.parametrize("kept", [frozenset(), frozenset({"gelu_tanh"})])
def test_a_kept_op_is_one_node_and_runs_as_its_formula_elsewhere(kept, compile_toy, monkeypatch, tmp_path):
    monkeypatch.setattr(type(null.BACKEND), "keeps", lambda self, arch: kept)
    torch.manual_seed(0)
    act, edge = Act(), TensorSpec("x", "float32", ("B", 6))
    program = Program("act", act, (edge,), (TensorSpec("y", "float32", ("B", 6)),), (Profile("any", {}, 5),))
    bundle = compile_toy(tmp_path / "act.reel", (program,), backend="null")
    assert [op for op in bundle.plan.program("act", "any").ops if op.startswith("reelstep")] == [f"reelstep.{name}.default" for name in kept]
    x = torch.randn(3, 6)
    found = load(bundle, None, backend="eager", precision="float32")["act", "any"]({"x": x})["y"]
    with torch.no_grad():
        assert torch.allclose(found, F.gelu(act.linear(x), approximate="tanh"), rtol=1e-6, atol=1e-6)
