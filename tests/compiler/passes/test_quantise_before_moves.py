"""A rounding step that comes before a move gives the same numbers, and OpenVINO's attention then writes integers."""

import openvino as ov
import pytest
import torch
from torch import nn

from reelstep.compiler.backends import BACKENDS
from reelstep.compiler.backends.openvino.convert import for_batch, lower
from reelstep.compiler.capture import capture
from reelstep.compiler.passes import apply_passes
from reelstep.compiler.passes import quantise as quantise_module
from reelstep.compiler.passes.mixed_precision import mixed_precision
from reelstep.compiler.passes.quantise import Grid, Watching, linears, quantise
from reelstep.compiler.passes.quantise_before_moves import FAKE_QUANTISE, is_rounded
from reelstep.compiler.program import Profile, Program, TensorSpec
from reelstep.compiler.signature import Signature
from reelstep.compiler.skus import SKUS

aten = torch.ops.aten
SDPA, LINEAR = aten.scaled_dot_product_attention.default, aten.linear.default
HEADS, WIDTH, TOKENS = 4, 64, 32


class Attention(nn.Module):
    """twice: the joined heads are read beside the layer too."""

    def __init__(self, twice):
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.qkv, self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3)), nn.Linear(WIDTH, WIDTH)
        self.twice = twice

    def forward(self, x):
        x = self.first(x)
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in self.qkv)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.last(x + self.out(y) + (y if self.twice else 0))


def quantised(twice=False, moved=True, monkeypatch=None):
    """The graph in int8, and a call of it."""
    torch.manual_seed(0)
    edge = ("B", TOKENS, WIDTH)
    program = Program("p", Attention(twice).eval(), (TensorSpec("x", "float32", edge),), (TensorSpec("y", "float32", edge),), (Profile("q", {}, 4),))
    exported, _ = apply_passes(capture(program, program.profiles[0]))
    signature, x = Signature.of(program, program.profiles[0]), 2 * torch.randn(1, TOKENS, WIDTH)
    watching = Watching(exported.module(), linears(exported))
    with torch.no_grad():
        watching.run(x)
    grids = {name: Grid.of(*covering) for name, covering in watching.ranges.items()}
    if not moved:
        monkeypatch.setattr(quantise_module, "quantise_before_moves", lambda made: made)
    return quantise(exported, signature, "int8", list(grids), grids), signature, x


def reader(exported):
    """The layer behind attention: the fifth of six."""
    return [node for node in exported.graph.nodes if node.target is LINEAR][4]


def test_what_attention_gives_is_rounded_before_its_heads_are_joined():
    made, _, _ = quantised()
    (attention,) = (node for node in made.graph.nodes if node.target is SDPA)
    assert [user.target for user in attention.users] == [FAKE_QUANTISE]
    assert reader(made).args[0].target is aten.view.default
    assert is_rounded(reader(made).args[0])


def test_the_numbers_are_the_same_to_the_bit(monkeypatch):
    (moved, _, x), (plain, _, _) = quantised(), quantised(moved=False, monkeypatch=monkeypatch)
    assert reader(plain).args[0].target is FAKE_QUANTISE
    assert torch.equal(moved.module()(x), plain.module()(x))


def test_a_move_that_something_else_reads_stays_before_the_rounding():
    made, _, _ = quantised(twice=True)
    assert reader(made).args[0].target is FAKE_QUANTISE


def test_the_layer_behind_a_moved_rounding_reads_float32_in_a_bfloat16_plan():
    made, signature, _ = quantised()
    mixed = mixed_precision(made, signature)
    assert reader(mixed).args[0].meta["val"].dtype is torch.float32
    (attention,) = (node for node in mixed.graph.nodes if node.target is SDPA)
    assert attention.meta["val"].dtype is torch.bfloat16


@pytest.mark.skipif(not SKUS["cpu"].int8, reason="a CPU without 8-bit products")  # it looks at nodes of integers, and there are none elsewhere
@pytest.mark.skipif("bfloat16" not in BACKENDS["openvino"].precisions, reason="a CPU without bfloat16, in which attention is one node")
def test_openvinos_attention_writes_integers_and_the_layer_reads_them():
    made, signature, x = quantised()
    model = for_batch(lower(made, signature, "bfloat16"), signature, 1)
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    nodes = [{key: value.astype(str) for key, value in op.get_rt_info().items()} for op in compiled.get_runtime_model().get_ops()]
    attention = [node for node in nodes if "Softmax" in node["originalLayersNames"]]
    assert [node["outputPrecisions"] for node in attention] == ["u8"]
    products = [node["primitiveType"].lower() for node in nodes if node["layerType"] == "FullyConnected"]
    assert [kind.endswith("i8") for kind in products] == [True] * 6, products
    exact, y = made.module()(x).detach(), torch.from_numpy(compiled(x.numpy())[0])
    assert float((y - exact).norm() / exact.norm()) < 0.02, "bfloat16 in attention, and values near the middle of a step"
