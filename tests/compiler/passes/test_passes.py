from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from reelstep.compiler import passes
from reelstep.compiler.capture import capture
from reelstep.compiler.graphs import ops_of
from reelstep.compiler.passes import PASSES, apply_passes
from reelstep.compiler.program import Profile, Program, TensorSpec
from reelstep.errors import CompileError

PROFILE = Profile("n4", {}, 4)


class Rotate(nn.Module):
    """In-place, with every kind of `empty`, a cast, a dead branch and a weight that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.unread = nn.Linear(7, 7)

    def forward(self, x: Tensor) -> Tensor:
        _ = x.cos()
        out = torch.empty_like(x)
        out[:, ::2] = x[:, 1::2]
        out[:, 1::2] = -x[:, ::2]
        fresh = torch.empty(x.shape[0], 4)
        fresh[:] = out
        new = x.new_empty(x.shape[0], 4)
        new.copy_(fresh)
        return new.to(torch.float32).add_(1)


def captured() -> ExportedProgram:
    edge = TensorSpec("x", "float32", ("B", 4))
    return capture(Program("p", Rotate(), (edge,), (TensorSpec("y", "float32", ("B", 4)),), (PROFILE,)), PROFILE)


def test_every_pass_changes_what_it_is_for_and_the_result_is_the_module() -> None:
    exported, applied = apply_passes(captured())
    assert {"functionalise", "define_empty", "drop_unused_weights"} <= set(applied)
    assert not [op for op in ops_of(exported) if "empty" in op or "assert" in op or "cos" in op]
    assert not exported.state_dict
    for rows in (1, 3):
        x = torch.randn(rows, 4)
        assert torch.equal(exported.module()(x), Rotate()(x))


def test_a_pass_that_breaks_the_graph_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(exported: ExportedProgram) -> ExportedProgram:
        output = exported.graph.output_node()
        value = next(node for node in exported.graph.nodes if node.target is torch.ops.aten.slice.Tensor)  # [B, 2] instead of [B, 4]
        output.args = ((value,),)
        return exported

    monkeypatch.setattr(passes, "PASSES", {"functionalise": PASSES["functionalise"], "wrong": wrong})
    with pytest.raises(CompileError, match="'wrong'"):
        apply_passes(captured())


def test_a_graph_that_still_has_undefined_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "PASSES", {"functionalise": PASSES["functionalise"]})
    with pytest.raises(CompileError, match="still holds"):
        apply_passes(captured())
