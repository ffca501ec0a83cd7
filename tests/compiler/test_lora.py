"""Adapters as an input of a program: every row is what the network with its own changed weights gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from reelstep.compiler.backends import BACKENDS, Executable
from reelstep.compiler.capture import capture
from reelstep.compiler.lora import Adapted, Layout, layers_of, with_lora
from reelstep.compiler.passes import apply_passes
from reelstep.compiler.program import Profile, Program, TensorSpec
from reelstep.compiler.signature import Signature
from reelstep.errors import CompileError, ConfigError

ROWS, RANK = 4, 3


class Net(nn.Module):
    """Two layers that are adapted, one of them used twice, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 5)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        y = torch.tanh(self.first(x) + shift[:, None])
        return self.last(self.second(torch.tanh(self.second(y))))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def program(net: Net) -> Program:
    inputs = TensorSpec("x", "float32", ("B", "L", 6)), TensorSpec("shift", "float32", ("B", 8))
    return Program("denoise", net, inputs, (TensorSpec("y", "float32", ("B", "L", 5)),), (Profile("p", {"L": 4}, ROWS),))


def linears(net: Net) -> dict[str, nn.Linear]:
    return {"first": net.first, "second": net.second}


@pytest.fixture(scope="module")
def layout(net: Net) -> Layout:
    return Layout(RANK, layers_of(linears(net)))


@pytest.fixture(scope="module")
def adapted(net: Net, program: Program, layout: Layout) -> Program:
    return with_lora(program, linears(net), layout)


@pytest.fixture(scope="module", params=[name for name in ("eager", "openvino") if BACKENDS[name].runs])
def engine(request: pytest.FixtureRequest, adapted: Program) -> Executable:
    exported, _ = apply_passes(capture(adapted, adapted.profiles[0]))
    return BACKENDS[request.param].build(lambda: exported, Signature.of(adapted, adapted.profiles[0]), "float32", None, "")


def rows_of(count: int, layout: Layout) -> dict[str, Tensor]:
    """Rows with adapters of their own: of full rank, of a lower one, and the last with none."""
    generator = torch.Generator().manual_seed(1)
    packed = torch.randn(count, layout.numbers, generator=generator)
    for _, up in layout.pairs(packed):
        up[1:, -1] = 0
        up[-1] = 0
    return {"x": torch.randn(count, 4, 6, generator=generator), "shift": torch.randn(count, 8, generator=generator), "lora": packed}


def changed(net: Net, layout: Layout, packed: Tensor) -> Net:
    """The network in float64 with the weights that one row's numbers ask for, read from them by hand."""
    made = copy.deepcopy(net).double()
    numbers = packed.double().tolist()
    for layer in (made.first, made.second):
        down = torch.tensor([[numbers.pop(0) for _ in range(RANK)] for _ in range(layer.in_features)], dtype=torch.float64)
        up = torch.tensor([[numbers.pop(0) for _ in range(layer.out_features)] for _ in range(RANK)], dtype=torch.float64)
        layer.weight.data += torch.einsum("ir,ro->oi", down, up)
    assert not numbers
    return made


@torch.no_grad()
def test_rows_of_one_batch_are_each_the_network_with_their_own_weights(engine: Executable, net: Net, layout: Layout) -> None:
    inputs = rows_of(ROWS, layout)
    found = engine(inputs)["y"]
    for row in range(ROWS):
        expected = changed(net, layout, inputs["lora"][row])(inputs["x"][row, None].double(), inputs["shift"][row, None].double())
        assert torch.linalg.vector_norm(found[row] - expected[0]) <= 1e-5 * torch.linalg.vector_norm(expected)
    assert not torch.allclose(found[0], net(inputs["x"], inputs["shift"])[0], rtol=0.1), "the adapters change something"


def test_a_row_is_what_it_is_alone(engine: Executable, layout: Layout) -> None:
    inputs = rows_of(ROWS, layout)
    together = engine(inputs)["y"]
    for row in range(ROWS):
        alone = engine({name: tensor[row, None] for name, tensor in inputs.items()})["y"]
        assert torch.allclose(together[row], alone[0], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_row_without_strength_is_the_base_bit_for_bit_where_the_same_code_runs(net: Net, layout: Layout) -> None:
    inputs = rows_of(ROWS, layout)
    module = Adapted(net, linears(net), layout)
    assert torch.equal(module(*inputs.values())[-1], net(inputs["x"], inputs["shift"])[-1])


def test_the_module_is_left_as_it_was_and_its_weights_are_not_doubled(adapted: Program, net: Net, layout: Layout) -> None:
    adapted.module(*rows_of(2, layout).values())
    assert not any(module._forward_hooks for module in net.modules())
    assert sum(p.numel() for p in adapted.module.parameters()) == sum(p.numel() for p in net.parameters())
    with pytest.raises(RuntimeError):
        adapted.module(torch.zeros(2, 4, 7), torch.zeros(2, 8), torch.zeros(2, layout.numbers))
    assert not any(module._forward_hooks for module in net.modules()), "nor after a failure"


def test_the_program_is_the_others_with_one_input_more(program: Program, adapted: Program, layout: Layout) -> None:
    assert (adapted.name, adapted.outputs, adapted.profiles) == ("denoise_lora", program.outputs, program.profiles)
    assert adapted.inputs == (*program.inputs, TensorSpec("lora", "float32", ("B", layout.numbers)))
    assert layout.numbers == RANK * (6 + 8 + 8 + 8)


def test_an_input_that_does_not_fit_is_refused_with_what_it_takes(engine: Executable, layout: Layout) -> None:
    inputs = rows_of(2, layout)
    with pytest.raises(ConfigError, match=rf"lora is float32 \[2, {layout.numbers - 1}\].*lora: float32 \[B, {layout.numbers}\]"):
        engine({**inputs, "lora": inputs["lora"][:, 1:]})


@pytest.mark.parametrize("rank", [0, -1, 7])
def test_a_rank_that_cannot_be_is_refused(rank: int, net: Net) -> None:
    with pytest.raises(ConfigError, match=rf"LoRA rank {rank}; from 1 to 6"):
        Layout(rank, layers_of(linears(net)))


def test_a_layer_whose_input_has_no_tokens_is_found_when_it_is_captured(program: Program, layout: Layout, net: Net) -> None:
    class Flat(Net):
        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return self.last(self.second(self.first(x[:, 0]) + shift))[:, None].expand(-1, 4, -1)  # type: ignore[no-any-return]

    flat = Flat()
    wrong = with_lora(Program("denoise", flat, program.inputs, program.outputs, program.profiles), linears(flat), layout)
    with pytest.raises(CompileError, match="denoise_lora"):
        capture(wrong, wrong.profiles[0])
