from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.export import ExportedProgram

from reelstep.compiler import passes
from reelstep.compiler.capture import capture
from reelstep.compiler.cost import graph_flops
from reelstep.compiler.graphs import dump_graph, ops_of, refused
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


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Writing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1)


@pytest.mark.parametrize(("module", "what"), [(Counting(), "buffer 'calls'"), (Writing(), "input 'x'")])
def test_code_that_keeps_state_is_refused_with_its_line(module: nn.Module, what: str) -> None:
    edges = (TensorSpec("x", "float32", ("B", 4)),), (TensorSpec("y", "float32", ("B", 4)),)
    with pytest.raises(CompileError, match=rf"its code writes into its {what} at \S+test_passes\.py:\d+, `.*`; a program gives new tensors"):
        apply_passes(capture(Program("p", module, *edges, (PROFILE,)), PROFILE))


class Composed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensordot(torch.einsum("bld,bmd->blm", x, x) @ x, self.weight, dims=1)


def test_products_that_are_written_as_equations_become_some_that_are_counted() -> None:
    edges = (TensorSpec("x", "float32", ("B", 6, 4)),), (TensorSpec("y", "float32", ("B", 6, 3)),)
    module = Composed()
    exported, _ = apply_passes(capture(Program("p", module, *edges, (PROFILE,)), PROFILE))
    assert refused(json.loads(dump_graph(exported))) is None
    assert graph_flops(exported) == 2 * (6 * 4 * 6 + 6 * 6 * 4 + 6 * 4 * 3)
    x = torch.randn(3, 6, 4)
    assert torch.allclose(exported.module()(x), module(x), atol=1e-5)


def test_a_graph_that_still_has_undefined_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "PASSES", {"functionalise": PASSES["functionalise"]})
    with pytest.raises(CompileError, match="still holds"):
        apply_passes(captured())


def by_einops(x: Tensor) -> Tensor:
    return rearrange(x, "B L (N K) -> B N L K", K=8)


def by_transpose(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 8)).transpose(-2, 1)


class Heads(nn.Module):
    """Attention whose queries are normed after the heads were moved; its keys' moved heads serve a second reader."""

    def __init__(self, split: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.split = split
        self.q_norm, self.k_norm, self.v_norm = (nn.RMSNorm(8, eps=1e-6) for _ in range(3))
        torch.nn.init.normal_(self.q_norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        q_BNLK, k_BNLK, v_BNLK = (self.split(x + i) for i in range(3))
        moved = self.v_norm(v_BNLK)
        y = F.scaled_dot_product_attention(self.q_norm(q_BNLK), self.k_norm(k_BNLK), moved) + k_BNLK + moved
        return rearrange(y, "B N L K -> B L (N K)")


@pytest.mark.parametrize("split", [by_einops, by_transpose])
def test_norms_of_queries_go_before_the_move_of_heads_and_others_stay(split: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    program = Program("p", Heads(split), (TensorSpec("x", "float32", ("B", 5, 16)),), (TensorSpec("y", "float32", ("B", 5, 16)),), (PROFILE,))
    exported, applied = apply_passes(capture(program, PROFILE))
    assert "norm_before_transpose" in applied
    norms = [node for node in exported.graph.nodes if node.target is torch.ops.aten.rms_norm.default]
    first = {str(node.args[2]).split("_norm")[0][-1]: tuple(node.meta["val"].shape)[1:] for node in norms}
    assert first == {"q": (5, 2, 8), "k": (2, 5, 8), "v": (2, 5, 8)}, "keys and values have other readers"
    x = torch.randn(3, 5, 16)
    assert torch.allclose(exported.module()(x), program.module(x), rtol=1e-6, atol=1e-6)
