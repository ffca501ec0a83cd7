"""Attention in 8 bits, beside the same arithmetic in integers and float64."""

import numpy as np
import openvino as ov
import pytest
import torch
from torch import nn

from reelstep.compiler.backends import BACKENDS
from reelstep.compiler.backends.openvino.convert import for_batch, lower
from reelstep.compiler.capture import capture
from reelstep.compiler.graphs import dump_graph, load_graph, weights_of
from reelstep.compiler.passes import apply_passes
from reelstep.compiler.passes.quantise import ATTENTION, Grid, Watching, attentions, part_of, quantisable, quantise
from reelstep.compiler.program import Profile, Program, TensorSpec
from reelstep.compiler.signature import Signature
from reelstep.compiler.skus import SKUS

HEADS, WIDTH, TOKENS, SCALE = 4, 64, 48, 1.0
NAME = "attention into out.weight"
SCALES = {"plain": (WIDTH // HEADS) ** -0.5, "scaled": SCALE}


class Attention(nn.Module):
    """kind: what is not plain in it. Heads that were normed lie apart, so those that attention gives are copied as they are joined: by `_unsafe_view`."""

    def __init__(self, kind="plain"):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.kind = kind

    def forward(self, x):
        x = self.first(x)
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.kind == "normed":
            q = nn.functional.rms_norm(q, q.shape[-1:])
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.kind == "masked", scale=SCALE if self.kind == "scaled" else None)
        y = y.transpose(1, 2).flatten(2)
        if self.kind == "read twice":
            return self.last(x + self.out(y) + y)
        return self.last(x + (self.out(y.relu()) if self.kind == "changed" else self.out(y)))


def captured(kind="plain"):
    torch.manual_seed(0)
    edge = ("B", TOKENS, WIDTH)
    module = Attention(kind).eval()
    program = Program("p", module, (TensorSpec("x", "float32", edge),), (TensorSpec("y", "float32", edge),), (Profile("q", {}, 4),))
    exported, _ = apply_passes(capture(program, program.profiles[0]))
    return module, exported, Signature.of(program, program.profiles[0])


@torch.no_grad()
def grids_of(exported, x):
    watching = Watching(exported.module(), quantisable(exported, "int8"))
    watching.run(x)
    return {name: Grid.of(*covering) for name, covering in watching.ranges.items()}


def x_of(rows):
    return 2 * torch.randn(rows, TOKENS, WIDTH, generator=torch.Generator().manual_seed(rows))


def integers(x, grid):
    """float64 of what a grid makes of float64 numbers, less its zero point."""
    return np.clip(np.round(x / np.float64(np.float32(grid.step))) + grid.zero, -128, 127) - grid.zero


@pytest.mark.parametrize("kind", ["masked", "read twice", "changed"])
def test_attention_that_is_not_plain_is_left_out(kind):
    assert attentions(captured(kind)[1]) == {}


def test_only_int8_takes_attention_and_calls_it_by_the_layer_that_reads_it():
    exported = captured()[1]
    assert list(attentions(exported).values()) == [NAME]
    assert NAME in quantisable(exported, "int8").values()
    for scheme in ("int8-weights", "fp8", "nvfp4"):
        assert NAME not in quantisable(exported, scheme).values()


@pytest.mark.parametrize("kind", SCALES)
def test_ranges_are_those_of_its_operands_symmetric_and_of_its_shares(kind):
    module, exported, _ = captured(kind)
    x = x_of(2)
    watching = Watching(exported.module(), attentions(exported))
    with torch.no_grad():
        watching.run(x)
        x = module.first(x)
        q, k, v = (layer(x).double().unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (module.q, module.k, module.v))
    for part, exact in (("q", q), ("k", k), ("v", v)):
        most = float(exact.abs().max())
        assert watching.ranges[part_of(NAME, part)] == pytest.approx((-most, most), rel=1e-5)
    shares = (q @ k.mT * SCALES[kind]).softmax(-1)
    assert watching.ranges[part_of(NAME, "shares")] == pytest.approx((float(shares.min()), float(shares.max())), rel=1e-5)


@pytest.mark.parametrize("kind", SCALES)
def test_it_computes_what_integers_do(kind):
    module, exported, signature = captured(kind)
    x = x_of(3)
    grids = grids_of(exported, x)
    y = quantise(exported, signature, "int8", [NAME], grids).module()(x).detach().double()

    wide = module.double()
    with torch.no_grad():
        x = wide.first(x.double())
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2).numpy() for layer in (wide.q, wide.k, wide.v))
    gq, gk, gv, gs = (grids[part_of(NAME, part)] for part in ("q", "k", "v", "shares"))
    scores = integers(q, gq) @ np.swapaxes(integers(k, gk), -1, -2) * gq.step * gk.step * SCALES[kind]
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    heads = integers(shares, gs) @ integers(v, gv) * gs.step * gv.step
    with torch.no_grad():
        exact = wide.last(x + wide.out(torch.from_numpy(heads).transpose(1, 2).flatten(2)))
    off = (y - exact).abs().numpy()
    assert np.median(off) < 1e-6 * exact.abs().max(), "float32 sums"
    assert off.max() < 2e-2 * exact.abs().max(), "where a number lies in the middle of a step, float32 may take the other one"


@pytest.mark.parametrize("kind", ["plain", "scaled", "normed"])
def test_only_the_chosen_attention_changes(kind):
    _, exported, signature = captured(kind)
    x = x_of(2)
    grids = grids_of(exported, x)
    linear_alone = quantise(exported, signature, "int8", ["q.weight"], grids)
    assert [node.target for node in linear_alone.graph.nodes].count(ATTENTION) == 1
    both = quantise(exported, signature, "int8", ["q.weight", NAME], grids)
    assert [node.target for node in both.graph.nodes].count(ATTENTION) == 0
    exact, y = exported.module()(x).detach(), both.module()(x).detach()
    assert 0 < float((y - exact).norm() / exact.norm()) < 0.02


def test_the_graph_is_saved_and_read_and_keeps_its_batch_dynamic():
    _, exported, signature = captured()
    grids = grids_of(exported, x_of(4))
    chosen = [*quantisable(exported, "int8").values()]
    made = quantise(exported, signature, "int8", chosen, grids)
    data = dump_graph(made)
    assert data == dump_graph(quantise(exported, signature, "int8", chosen, grids))
    again = load_graph(data, weights_of(made), signature, "here").module()
    for rows in (1, 4):
        assert torch.equal(again(x_of(rows)), made.module()(x_of(rows)))


@pytest.mark.skipif(not SKUS["cpu"].int8, reason="a CPU without 8-bit products")  # it looks at nodes of integers, and there are none elsewhere
@pytest.mark.parametrize("kind", ["plain", "scaled", "normed"])
@pytest.mark.parametrize("precision", BACKENDS["openvino"].precisions)
def test_openvino_runs_it_as_one_node_of_integers_that_moves_no_keys(precision, kind):
    _, exported, signature = captured(kind)
    x = x_of(1)
    grids = grids_of(exported, x)
    made = quantise(exported, signature, "int8", [*quantisable(exported, "int8").values()], grids)
    compiled = ov.Core().compile_model(for_batch(lower(made, signature, precision), signature, 1), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    nodes = [{key: value.astype(str) for key, value in op.get_rt_info().items()} for op in compiled.get_runtime_model().get_ops()]
    attention = [node for node in nodes if "Softmax" in node["originalLayersNames"]]
    assert [(node["layerType"], node["outputPrecisions"]) for node in attention] == [("Subgraph", "u8")]
    assert attention[0]["primitiveType"].lower().endswith("i8"), attention[0]["primitiveType"]
    moved = [list(op.get_output_shape(0)) for op, node in zip(compiled.get_runtime_model().get_ops(), nodes, strict=True) if node["layerType"] == "Transpose"]
    assert [WIDTH // HEADS, TOKENS] not in [shape[-2:] for shape in moved]
    exact, y = made.module()(x).detach(), torch.from_numpy(compiled(x.numpy())[0])
    assert float((y - exact).norm() / exact.norm()) < 0.02, "bfloat16 beside it, and values near the middle of a step"
