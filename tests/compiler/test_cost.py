from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, export
from torch.utils.flop_counter import FlopCounterMode

from reelstep.compiler.bundle import Bundle
from reelstep.compiler.capture import capture
from reelstep.compiler.cost import (
    Op,
    Transformer,
    all_reduce_bytes,
    graph_flops,
    graph_ops,
    graph_parameters,
    module_flops,
    ring_bytes,
    transformer_of,
    ulysses_bytes,
)
from reelstep.compiler.graphs import ops_of
from reelstep.compiler.passes import apply_passes
from reelstep.compiler.program import Profile, Program
from reelstep.engine.models.movie_gen import MovieGenConfig, MovieGenTransformer, denoise_program
from reelstep.errors import CompileError
from reelstep.kernels import OPS
from reelstep.kernels.attention import attention
from reelstep.kernels.gated_residual import gated_residual
from reelstep.kernels.qk_norm_rope import qk_norm_rope
from reelstep.kernels.rms_modulate import rms_modulate
from reelstep.parallel.mesh import Mesh


def by_hand(rows: int, length: int) -> int:
    """The toy: qkv 8x24, two heads of 4 (scores and sum), convolution 8x8x3 over `length` tokens; 2 FLOPs per multiply-add."""
    return rows * 2 * (length * 8 * 24 + 2 * (2 * length * length * 4) + length * 8 * 8 * 3)


def test_flops_of_a_graph_are_those_counted_by_hand(bundle: Bundle) -> None:
    for profile, length in (("l4", 4), ("l3", 3)):
        for rows in (1, 5):
            assert graph_flops(bundle.program("denoise", profile), rows) == by_hand(rows, length)


def test_parameters_are_those_that_the_graph_reads(bundle: Bundle) -> None:
    assert graph_parameters(bundle.program("denoise", "l4")) == 11 * 8 + 24 * 9 + 8 * (8 * 3 + 1)
    assert graph_parameters(bundle.program("lookup", "l4")) == 11 * 8


def test_a_module_on_the_meta_device_costs_the_same(programs: tuple[Program, ...]) -> None:
    with torch.device("meta"):
        toy = type(programs[0].module)()
        inputs = torch.zeros(5, 4, dtype=torch.int64), torch.zeros(5)
    assert module_flops(toy, *inputs) == by_hand(5, 4)


CONFIG = MovieGenConfig(
    layers=2, width=64, ffn=160, heads=4, latent_channels=8, condition_channels=0, patch=(1, 2, 2), positions=(4, 8, 8), text_widths=(32,),
    time_frequencies=16, time_scale=1000.0, qk_norm=True,
)  # fmt: skip
TEXT_TOKENS, SIZES = 24, {"F": 4, "H": 8, "W": 8}
TOKENS = 64


@pytest.fixture(scope="module")
def denoiser() -> MovieGenTransformer:
    with torch.device("meta"):
        return MovieGenTransformer(CONFIG)


def captured(denoiser: MovieGenTransformer) -> ExportedProgram:
    program = denoise_program(denoiser, TEXT_TOKENS, (Profile("video", SIZES, 4),))
    return capture(program, program.profiles[0])


@pytest.fixture(scope="module")
def graph(denoiser: MovieGenTransformer) -> ExportedProgram:
    return captured(denoiser)


def by_formula(layers: int, d: int, f: int, tokens: int, text: int, edges: int) -> int:
    """Matrices and scores of self-attention, of attention to text, and of SwiGLU, then the first and last product."""
    own = 8 * d * d * tokens + 4 * tokens * tokens * d
    cross = 4 * d * d * tokens + 4 * d * d * text + 4 * tokens * text * d
    return layers * (own + cross + 6 * d * f * tokens) + 2 * tokens * edges * d


def test_a_transformers_sizes_are_read_from_its_graph(graph: ExportedProgram) -> None:
    expected = Transformer(2, 64, 4, 160, gated=True, tokens=TOKENS, text_tokens=TEXT_TOKENS, values_in=32, values_out=32, qk_norm=True)
    assert transformer_of(graph) == expected


def test_flops_agree_with_torchs_counter_with_the_graph_and_with_the_formula(graph: ExportedProgram, denoiser: MovieGenTransformer) -> None:
    found = transformer_of(graph)
    x, modulation, context = torch.zeros(3, 8, 4, 8, 8), torch.zeros(3, 7, 64), torch.zeros(3, TEXT_TOKENS, 64)
    inputs = (x.to("meta"), modulation.to("meta"), None, context.to("meta"))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        denoiser(*inputs)
    assert found.flops(3) == graph_flops(graph, 3) == counter.get_total_flops() == 3 * by_formula(2, 64, 160, TOKENS, TEXT_TOKENS, 64)


def test_a_graph_that_keeps_our_ops_has_the_sizes_and_the_flops_of_one_that_has_their_formulas(denoiser: MovieGenTransformer, graph: ExportedProgram) -> None:
    kept, formulas = (apply_passes(captured(denoiser), keep=keep)[0] for keep in (OPS, ()))
    assert {"reelstep.attention.default", "reelstep.qk_norm_rope.default"} <= {*ops_of(kept)}
    assert transformer_of(kept) == transformer_of(formulas) == transformer_of(graph)
    assert graph_flops(kept, 3) == graph_flops(formulas, 3) == 3 * by_formula(2, 64, 160, TOKENS, TEXT_TOKENS, 64)


def test_an_op_of_several_tensors_moves_all_of_them_and_who_reads_one_moves_that_one() -> None:
    class Normed(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            q, k = qk_norm_rope(q, k, None, None)
            out, lse = attention(q.transpose(1, 2), k.transpose(1, 2), k.transpose(1, 2))
            return out.exp(), lse

    exported = export(Normed(), (torch.zeros(1, 4, 2, 8), torch.zeros(1, 3, 2, 8)), strict=False)
    queries, keys, lse = 4 * 2 * 8, 3 * 2 * 8, 4 * 2
    ops = sorted((op.kind, op.elements, op.count) for op in graph_ops(exported))
    assert ops == [("attention", 2 * queries + 2 * keys + lse, 1), ("pointwise", 2 * queries, 1), ("pointwise", 2 * (queries + keys), 1)]


@pytest.mark.parametrize(("tokens", "flops"), [(73_728, 1.0249e16), (55_296, 6.487e15), (36_864, 3.525e15), (8_192, 5.121e14), (2_304, 1.334e14)])
def test_movie_gens_30_billion_cost_what_the_formula_gives(tokens: int, flops: float) -> None:
    big = Transformer(48, 6144, 48, 16384, gated=True, tokens=tokens, text_tokens=1024, values_in=64, values_out=64, qk_norm=False)
    assert big.flops() == by_formula(48, 6144, 16384, tokens, 1024, 128)
    assert big.flops() == pytest.approx(flops, rel=5e-4)  # as many digits as are given
    assert big.block_parameters == 48 * (604_028_928 - 8 * 6144)  # of a block, less its norms and modulation


def test_wans_blocks_cost_what_torch_counts_in_another_implementation() -> None:
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")

    def counted(layers: int) -> int:
        with torch.device("meta"):
            network = wan.WanTransformer3DModel(
                patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=16, in_channels=8, out_channels=8, text_dim=32, freq_dim=16,
                ffn_dim=160, num_layers=layers,
            )  # fmt: skip
            inputs = torch.zeros(1, 8, 4, 8, 8), torch.zeros(1), torch.zeros(1, TEXT_TOKENS, 32)
        return module_flops(network, *inputs)

    one = Transformer(1, 64, 4, 160, gated=False, tokens=TOKENS, text_tokens=TEXT_TOKENS, values_in=32, values_out=32, qk_norm=True)
    assert counted(3) - counted(2) == replace(one, layers=2).flops() - one.flops()


def test_bytes_on_one_device_are_those_of_the_graph() -> None:
    graph, _ = apply_passes(captured(MovieGenTransformer(CONFIG)))

    def elements(ops: tuple[Op, ...], kind: str) -> float:
        return sum(op.elements * op.count for op in ops if op.kind == kind)

    for rows in (1, 3):
        closed, counted = transformer_of(graph).ops(rows), graph_ops(graph, rows)
        for kind in ("product", "attention"):
            assert elements(closed, kind) == elements(counted, kind)
        # weights of norms, modulation and position tables, and the copies into patches and back: more than noise at this size only
        assert elements(closed, "pointwise") == pytest.approx(elements(counted, "pointwise"), rel=0.15)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = (x * 2).relu()
        return h + self.linear(h.transpose(1, 2)).sigmoid().transpose(1, 2)


def test_what_lies_between_products_is_one_pass_over_memory() -> None:
    exported = export(Residual().eval(), (torch.zeros(2, 8, 8),), strict=False)
    ops = {op.kind: op for op in graph_ops(exported)}
    assert ops["product"] == Op("product", 2 * 2 * 8**3, 2 * 2 * 64 + 64)
    passes = sorted(op.elements for op in graph_ops(exported) if op.kind == "pointwise" for _ in range(op.count))
    assert passes == [2 * 128, 3 * 128]  # reads x, writes h; reads h and the product, writes the sum


def test_an_op_that_is_kept_is_a_pass_of_its_own() -> None:
    class Stream(nn.Module):
        def forward(self, x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            return rms_modulate(gated_residual(x, gate, y) + x, scale, shift)

    def passes(keep: Iterable[str]) -> list[float]:
        exported = export(Stream(), (*(torch.zeros(1, 4, 8) for _ in range(2)), *(torch.zeros(1, 8) for _ in range(3))), strict=False)
        return sorted(op.elements for op in graph_ops(apply_passes(exported, keep)[0]) for _ in range(op.count))

    assert passes(()) == [3 * 32 + 3 * 8]  # reads x, y and the vectors, writes the result
    assert passes(OPS) == [2 * 32 + 2 * 8, 3 * 32, 3 * 32 + 8]


def test_a_graph_that_is_no_transformer_is_refused() -> None:
    with pytest.raises(CompileError, match="no attention"):
        transformer_of(export(Residual().eval(), (torch.zeros(2, 8, 8),), strict=False))


def test_ranks_share_the_work_and_repeat_only_the_text() -> None:
    network = Transformer(3, 64, 4, 160, gated=False, tokens=96, text_tokens=24, values_in=16, values_out=16, qk_norm=True)
    one = network.flops()
    text, edges = 3 * 4 * 64 * 64 * 24, 2 * 96 * 32 * 64
    for mesh in map(Mesh.parse, ("cp=4", "cp=4,ring=4", "cp=4,ring=2", "tp=4", "cp=2,tp=2")):
        shared = sum(op.flops * op.count for op in network.ops(1, mesh))
        assert shared == pytest.approx((one - text - edges) / 4 + text / mesh.tp + edges / mesh.cp)


def test_ulysses_moves_what_changes_its_owner() -> None:
    ranks, tokens, heads, head_dim = 4, 24, 8, 5
    before = np.repeat(np.arange(ranks), tokens // ranks)[:, None, None]  # of a token
    after = np.repeat(np.arange(ranks), heads // ranks)[None, :, None]  # of a head
    moves = np.broadcast_to((before != after) & (before == 0), (tokens, heads, head_dim)).sum()  # sent by rank 0
    assert ulysses_bytes(tokens, heads * head_dim, 2, ranks) == 4 * 2 * moves


def test_a_ring_passes_every_block_to_every_rank() -> None:
    ranks, tokens, width = 4, 24, 40
    holds, seen, sent = list(range(ranks)), {0}, 0  # whose block each has; what rank 0 has had
    while len(seen) < ranks:
        holds = [holds[rank - 1] for rank in range(ranks)]
        seen.add(holds[0])
        sent += tokens // ranks * width * 2
    assert ring_bytes(tokens, width, 2, ranks) == 2 * sent


def test_an_all_reduce_sends_what_the_ring_algorithm_sends() -> None:
    ranks, chunk = 5, 7
    held = np.random.default_rng(0).standard_normal((ranks, ranks, chunk))  # rank, chunk
    total, sent = held.sum(0), 0
    for phase in range(2):  # reduce-scatter, then all-gather
        for step in range(ranks - 1):
            moving = [(rank, (rank - step + phase) % ranks, held[rank, (rank - step + phase) % ranks].copy()) for rank in range(ranks)]
            for rank, index, values in moving:
                target = (rank + 1) % ranks
                held[target, index] = values if phase else held[target, index] + values
            sent += chunk
    np.testing.assert_allclose(held, np.broadcast_to(total, held.shape), atol=1e-12)
    assert all_reduce_bytes(4 * ranks * chunk, ranks) == 4 * sent


def test_communication_of_a_call_is_that_of_its_attentions_and_branches() -> None:
    network = Transformer(3, 64, 4, 160, gated=False, tokens=96, text_tokens=24, values_in=16, values_out=16, qk_norm=False)
    sent = {t.axis: t for t in network.transfers(2, Mesh.parse("cp=6,ring=3,tp=2"), 2)}
    assert sent["ulysses"].bytes == 3 * 4 * (2 * 96 / 3) * (64 / 2) * 2 * 1 / 4
    assert sent["ring"].bytes == 3 * 2 * 2 * (2 * 96 / 3) * (64 / 4) * 2
    assert sent["tp"].bytes == 3 * 3 * 2 * (2 * 96 / 6 * 64 * 2) / 2  # self-attention, attention to text, feed-forward
    assert network.transfers(2, Mesh.parse(""), 2) == ()
    assert {t.axis for t in network.transfers(1, Mesh.parse("cfg=2"), 2)} == {"state"}
    assert sum(t.bytes for t in replace(network, text_tokens=0).transfers(2, Mesh.parse("tp=2"), 2) if t.axis == "tp") == 3 * 2 * (2 * 96 * 64 * 2)
