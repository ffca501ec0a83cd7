"""Weights are stored as they are read."""

import copy

import pytest
import torch
from torch import nn

from reelstep.compiler.capture import capture
from reelstep.compiler.passes import apply_passes
from reelstep.compiler.passes.cast_weights import cast_weights
from reelstep.compiler.passes.mixed_precision import PRODUCTS, mixed_precision
from reelstep.compiler.passes.quantise import linears, quantise
from reelstep.compiler.program import Profile, Program, TensorSpec
from reelstep.compiler.signature import Signature

bf16, f32 = torch.bfloat16, torch.float32


class Net(nn.Module):
    """A layer at both ends that mixed precision leaves in float32, and between them one, a table, and a weight that products and sums both read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 8)
        self.both = nn.Parameter(torch.randn(16, 16))
        self.register_buffer("table", torch.randn(16, 16), persistent=False)

    def forward(self, x):
        x = self.first(x) + self.both[0]
        return self.last(x + self.middle(x) + x @ self.both + x @ self.table)


def exported():
    torch.manual_seed(0)
    spec = TensorSpec("x", "float32", ("B", 16, 8))
    program = Program("p", Net(), (spec,), (TensorSpec("y", "float32", ("B", 16, 8)),), (Profile("q", {}, 4),))
    graph, _ = apply_passes(capture(program, program.profiles[0]))
    return graph, Signature.of(program, program.profiles[0])


def weights(graph):
    return {name.removeprefix("body."): tensor.dtype for name, tensor in {**graph.state_dict, **graph.constants}.items()}


def casts(graph):
    return sum(node.target is torch.ops.aten.to.dtype for node in graph.graph.nodes)


@torch.no_grad()
def test_what_products_alone_read_is_stored_as_they_read_it_and_gives_the_same_bits():
    graph, signature = exported()
    mixed = mixed_precision(graph, signature)
    x = torch.randn(3, 16, 8)
    truth, before = mixed.module()(x), casts(mixed)
    made = cast_weights(mixed)
    made.validate()
    assert weights(made) == {
        "first.weight": f32, "first.bias": f32, "middle.weight": bf16, "middle.bias": bf16, "last.weight": f32, "last.bias": f32, "both": f32, "table": bf16,
    }  # fmt: skip
    assert before - casts(made) == 3, "the weight that a sum reads too is cast as before"
    assert [node.meta["val"].dtype for node in made.graph.nodes if node.target in PRODUCTS] == [f32, bf16, bf16, bf16, f32]
    assert torch.equal(made.module()(x), truth)


def test_weights_of_the_graph_that_was_given_stay():
    graph, signature = exported()
    kept = copy.deepcopy(graph.state_dict)
    cast_weights(mixed_precision(graph, signature))
    assert all(torch.equal(graph.state_dict[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("scheme", ["int8-weights", "fp8"])
def test_numbers_of_a_quantised_layer_stay_as_they_are(scheme):
    graph, signature = exported()
    mixed = mixed_precision(quantise(graph, signature, scheme, linears(graph).values(), {}), signature)
    before = {name: dtype for name, dtype in weights(mixed).items() if dtype not in (f32, bf16)}
    after = weights(cast_weights(mixed))
    assert before
    assert {name: after[name] for name in before} == before
