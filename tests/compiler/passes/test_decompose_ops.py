"""A graph with ops of ours becomes one of torch's own operators with the same numbers; those that are to be kept stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from reelstep.compiler.backends import BACKENDS
from reelstep.compiler.capture import capture
from reelstep.compiler.graphs import ops_of
from reelstep.compiler.passes import apply_passes
from reelstep.compiler.passes.decompose_ops import decompose_ops
from reelstep.compiler.program import Profile, Program, TensorSpec
from reelstep.errors import NotFound
from reelstep.kernels import OPS
from reelstep.kernels.attention import attention
from reelstep.kernels.gated_residual import gated_residual
from reelstep.kernels.patchify import patchify
from reelstep.kernels.qk_norm_rope import qk_norm_rope, rotary_3d
from reelstep.kernels.rms_modulate import rms_modulate
from reelstep.kernels.swiglu import swiglu
from reelstep.kernels.unpatchify import unpatchify

PROFILE = Profile("p", {}, 4)
OURS = {"attention", "gated_residual", "patchify", "qk_norm_rope", "rms_modulate", "swiglu", "unpatchify"}


class Block(nn.Module):
    """A transformer block between patches, of width 16 and 2 heads, written with the ops."""

    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        cos, sin = rotary_3d((2, 2, 2), 8)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        self.norm = nn.Parameter(torch.randn(16))
        self.q_norm, self.k_norm = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.modulation, self.qkv, self.ffn = nn.Linear(3, 48), nn.Linear(16, 48), nn.Linear(16, 32)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        tokens = patchify(x, (1, 2, 2))
        shift, scale, gate = self.modulation(t).chunk(3, -1)
        y = rms_modulate(tokens, scale, shift, self.norm)
        q, k, v = self.qkv(y).unflatten(-1, (3, 2, 8)).unbind(2)
        q, k = qk_norm_rope(q, k, self.q_norm, self.k_norm, self.cos, self.sin)
        y, _ = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        tokens = gated_residual(tokens, gate, y.transpose(1, 2).flatten(2))
        return unpatchify(tokens + swiglu(*self.ffn(tokens).chunk(2, -1)), (2, 2, 2), (1, 2, 2))

    def in_torch(self, x: Tensor, t: Tensor) -> Tensor:
        """The same from torch's own modules, in float64."""
        tokens = x.unfold(3, 2, 2).unfold(4, 2, 2).permute(0, 2, 3, 4, 1, 5, 6).reshape(x.shape[0], 8, 16)
        shift, scale, gate = (part[:, None] for part in self.modulation(t).chunk(3, -1))
        y = nn.functional.rms_norm(tokens, (16,), self.norm, 1e-6) * (1 + scale) + shift
        q, k, v = self.qkv(y).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        turn = torch.complex(self.cos, self.sin)
        q, k = (nn.functional.rms_norm(z, (8,), w, 1e-6) for z, w in ((q, self.q_norm), (k, self.k_norm)))
        q, k = (torch.view_as_real(torch.view_as_complex(z.unflatten(-1, (4, 2)).contiguous()) * turn).flatten(-2) for z in (q, k))
        y = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        tokens = tokens + gate * y
        a, b = self.ffn(tokens).chunk(2, -1)
        tokens = tokens + a * a.sigmoid() * b
        return nn.functional.fold(
            tokens.reshape(-1, 2, 4, 16).flatten(0, 1).mT, (4, 4), 2, stride=2
        ).reshape(-1, 2, 4, 4, 4).transpose(1, 2)  # fmt: skip


@pytest.fixture(scope="module")
def block() -> Block:
    torch.manual_seed(0)
    return Block()


def captured(block: Block) -> ExportedProgram:
    video = ("B", 4, 2, 4, 4)
    edges = (TensorSpec("x", "float32", video), TensorSpec("t", "float32", ("B", 3)))
    return capture(Program("p", block, edges, (TensorSpec("y", "float32", video),), (PROFILE,)), PROFILE)


def test_nothing_of_ours_is_left_and_the_numbers_are_those_of_torch(block: Block) -> None:
    exported = captured(block)
    assert {op.split(".")[1] for op in ops_of(exported) if op.startswith("reelstep")} == OURS
    exported, applied = apply_passes(exported)
    assert "decompose_ops" in applied
    assert {op.split(".")[0] for op in ops_of(exported)} == {"aten"}
    for rows in (1, 3):
        x, t = torch.randn(rows, 4, 2, 4, 4), torch.randn(rows, 3)
        exact = Block().double()
        exact.load_state_dict(block.state_dict())
        assert torch.allclose(exported.module()(x, t).double(), exact.in_torch(x.double(), t.double()), rtol=1e-5, atol=1e-5)


def test_backends_meet_the_operators_that_they_have_whole(block: Block) -> None:
    ops = ops_of(apply_passes(captured(block))[0])
    assert ops["aten.scaled_dot_product_attention.default"] == 1
    assert ops["aten.rms_norm.default"] == 3
    assert not [op for op in ops if "logsumexp" in op or "matmul" in op or "_to_copy" in op], "lse, which nothing reads, was computed"


def test_norms_of_heads_become_torchs_and_nothing_stands_between_them_and_attention() -> None:
    class Norms(nn.Module):
        def forward(self, q: Tensor, weight: Tensor) -> Tensor:
            q, k = qk_norm_rope(q, q, weight[0], weight[0])
            return q - k

    edges = (TensorSpec("q", "float32", ("B", 5, 2, 8)), TensorSpec("weight", "float32", ("B", 8)))
    exported, _ = apply_passes(capture(Program("p", Norms(), edges, (TensorSpec("y", "float32", ("B", 5, 2, 8)),), (PROFILE,)), PROFILE))
    assert ops_of(exported) == {"aten.rms_norm.default": 2, "aten.select.int": 2, "aten.sub.Tensor": 1}


def test_what_is_kept_stays_one_node(block: Block) -> None:
    exported, _ = apply_passes(captured(block), keep=("rms_modulate", "attention"))
    left = {op for op in ops_of(exported) if op.startswith("reelstep")}
    assert left == {"reelstep.rms_modulate.default", "reelstep.attention.default"}
    x, t = torch.randn(2, 4, 2, 4, 4), torch.randn(2, 3)
    assert torch.allclose(exported.module()(x, t), block(x, t), rtol=1e-5, atol=1e-5)


def test_an_op_that_is_not_ours_cannot_be_kept(block: Block) -> None:
    with pytest.raises(NotFound, match=r"unknown op 'rms_modulte'; known: attention, .*rms_modulate"):
        decompose_ops(captured(block), keep=("rms_modulte",))


def test_only_a_backend_that_runs_kernels_keeps_ops() -> None:
    for name in ("openvino", "inductor", "eager", "null"):
        assert BACKENDS[name].keeps("x86_64+avx512_bf16") == frozenset()
        assert BACKENDS[name].keeps("sm90") == (frozenset(OPS) if name == "inductor" else frozenset())
