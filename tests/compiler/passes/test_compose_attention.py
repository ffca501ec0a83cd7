"""Torch's attention becomes the op where a backend keeps it, and torch's again where another loads the graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from reelstep.compiler.capture import capture, quiet_torch
from reelstep.compiler.graphs import ops_of
from reelstep.compiler.part import Part
from reelstep.compiler.passes import apply_passes
from reelstep.compiler.passes.decompose_ops import decompose_ops
from reelstep.compiler.program import Profile, Program, TensorSpec
from reelstep.compiler.sharded import plan_ranks
from reelstep.engine.models.movie_gen import CONFIG_30B, MovieGenTransformer, denoise_program
from reelstep.kernels import OPS
from reelstep.parallel.mesh import Mesh

PROFILE = Profile("p", {}, 4)
TORCHS, OURS = "aten.scaled_dot_product_attention.default", "reelstep.attention.default"

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Heads(nn.Module):
    """Self-attention of 2 heads to x [B, 5, 2 K], joined by `flatten` as models do."""

    def __init__(self, attend: Attend, width: int) -> None:
        super().__init__()
        self.attend = attend
        self.qkv, self.out = nn.Linear(2 * width, 6 * width, bias=False), nn.Linear(2 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


def captured(attend: Attend, width: int = 8, device: str = "cpu") -> tuple[Heads, ExportedProgram]:
    torch.manual_seed(0)
    with torch.device(device):
        module = Heads(attend, width)
    program = Program("p", module, (TensorSpec("x", "float32", ("B", 5, 2 * width)),), (TensorSpec("y", "float32", ("B", 5, 3)),), (PROFILE,))
    return module, capture(program, PROFILE)


@pytest.mark.parametrize("scale", [None, 0.5])
@torch.no_grad()
def test_the_op_takes_its_place_and_gives_the_softmax(scale: float | None) -> None:
    module, graph = captured(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=scale))
    exported, applied = apply_passes(graph, keep=("attention",))
    assert "compose_attention" in applied
    ops = ops_of(exported)
    assert (ops[OURS], TORCHS in ops) == (1, False)
    exact = deepcopy(module).double()
    exact.attend = lambda q, k, v: ((8**-0.5 if scale is None else scale) * q @ k.mT).softmax(-1) @ v
    for rows in (1, 3):
        x = torch.randn(rows, 5, 16)
        assert torch.allclose(exported.module()(x).double(), exact(x.double()), rtol=1e-5, atol=1e-6)


def test_a_backend_that_keeps_no_attention_sees_torchs_and_so_does_one_that_loads_what_another_kept() -> None:
    plain, applied = apply_passes(captured(F.scaled_dot_product_attention)[1], keep=("rms_modulate",))
    kept, _ = apply_passes(captured(F.scaled_dot_product_attention)[1], keep=("attention",))
    assert "compose_attention" not in applied
    with quiet_torch():
        again = decompose_ops(kept)
    assert ops_of(again) == ops_of(plain), "lse, which nothing reads, was computed"


REFUSED: dict[str, tuple[Attend, int]] = {
    "a mask": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, q.new_zeros(5, 5)), 8),
    "a mask by name": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=q.new_zeros(5, 5)), 8),
    "a causal one": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), 8),
    "fewer heads of keys": (lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True), 8),
    "one head of keys for all": (lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1]), 8),
    "values of another width": (lambda q, k, v: F.pad(F.scaled_dot_product_attention(q, k, v[..., :4]), (0, 4)), 8),
    "a scale of nothing": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.0), 8),
    "heads wider than a kernel takes": (F.scaled_dot_product_attention, 264),
    "three dims": (lambda q, k, v: F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0])[:, None].expand(-1, 2, -1, -1), 8),
}


@pytest.mark.parametrize("what", REFUSED)
def test_torchs_stays_where_ours_cannot_run(what: str) -> None:
    _, graph = captured(*REFUSED[what])
    ops = ops_of(apply_passes(graph, keep=OPS)[0])
    assert (ops[TORCHS], OURS in ops) == (1, False)


def test_heads_are_joined_without_the_copy_that_torchs_layout_needs_on_the_meta_device() -> None:
    def counted(*keep: str) -> Counter[str]:
        _, graph = captured(F.scaled_dot_product_attention, device="meta")
        return Counter(ops_of(apply_passes(graph, keep)[0]))

    kept, plain = counted("attention"), counted()
    assert plain["aten.clone.default"] == kept["aten.clone.default"] + 1


def build_small() -> MovieGenTransformer:
    config = replace(CONFIG_30B, layers=1, width=64, ffn=96, heads=4, latent_channels=3, positions=(4, 4, 4), text_widths=(5,), time_frequencies=16)
    return MovieGenTransformer(config)


def denoise_small(module: MovieGenTransformer) -> tuple[Program, ...]:
    return (denoise_program(module, 8, [Profile("p", {"F": 2, "H": 4, "W": 4}, 2)]),)


@pytest.mark.parametrize(("mesh", "ours", "rings"), [("cp=2", 2, 0), ("cp=2,ring=2", 1, 1), ("tp=2", 2, 0)])
def test_ranks_keep_the_op_for_the_attention_that_is_left_to_each_of_them(mesh: str, ours: int, rings: int) -> None:
    shared = Part(f"{__name__}:build_small", f"{__name__}:denoise_small", rules="movie-gen", prefix="")
    for group in plan_ranks([shared], Mesh.parse(mesh), "float32", keep=OPS):
        ops = Counter(group.programs[0].ops)
        assert (ops[OURS], ops["reelstep.ring_attention.default"], ops[TORCHS]) == (ours, rings, 0)
