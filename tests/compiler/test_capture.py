from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from reelstep.compiler.capture import capture
from reelstep.compiler.program import Profile, Program, TensorSpec
from reelstep.errors import CompileError, ConfigError

X = TensorSpec("x", "float32", ("B", "N"))
PROFILE = Profile("n4", {"N": 4}, 6)


class Apply(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)  # type: ignore[operator, no-any-return]


def program(function: object, name: str = "p") -> Program:
    return Program(name, Apply(function), (X,), (TensorSpec("y", "float32", ("B", "N")),), (PROFILE,))


@pytest.mark.parametrize("rows", [1, 2, 5, 6])
def test_the_batch_is_dynamic(rows: int) -> None:
    x = torch.randn(rows, 4)
    assert torch.equal(capture(program(torch.tanh), PROFILE).module()(x), torch.tanh(x))


@pytest.mark.parametrize("rows", [1, 2])
def test_a_profile_of_two_rows_keeps_the_batch_apart_from_sizes_of_two(rows: int) -> None:
    captured = capture(program(lambda x: x.view(x.shape[0], 2, 2).tanh().flatten(1)), Profile("two", {"N": 4}, 2))
    assert all("2, 2, 2" not in str(node.args) for node in captured.graph.nodes)
    x = torch.randn(rows, 4)
    assert torch.equal(captured.module()(x), torch.tanh(x))


def test_a_profile_of_one_row_is_captured_static() -> None:
    one = Profile("one", {"N": 4}, 1)
    x = torch.randn(1, 4)
    assert torch.equal(capture(program(torch.tanh), one).module()(x), torch.tanh(x))


def test_a_module_stays_in_training_mode() -> None:
    p = program(nn.Dropout())
    capture(p, PROFILE)
    assert p.module.training


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (
            lambda x: x * (1 if x.sum() > 0 else 2),
            r"'p' at profile 'n4' cannot be exported at \S+test_capture\.py:\d+, `lambda x: .*2\),`: Could not guard .*: choose by torch\.where, or outside",
        ),
        (lambda x: x + torch.zeros(3, 4), "cannot be exported: its code takes 3, the rows that it was traced with, for the only number of rows; take sizes"),
        (lambda x: x.nothing(), r"cannot be exported at \S+test_capture\.py:\d+, `.*x\.nothing\(\).*`: 'FakeTensor' object has no attribute 'nothing'"),
        (lambda x: x if x.shape[0] == 1 else x.tanh(), r"another way for one row \(nothing more\) than for more \(tanh at \S+test_capture\.py:\d+\)"),
        (lambda x: x / (x.shape[0] - 1) if x.shape[0] > 1 else x, r"another way for one row"),
        (lambda x: torch.cat([x, x]), r"returns float32 \[2\*s\d+, 4\]; declared is y: .* with as many rows as the inputs have \(s\d+\)"),
        (lambda x: x[x.sum(1) > 0], r"returns float32 \[u0, 4\]; declared is y"),
        (lambda x: x.double(), "returns float64"),
        (lambda x: x[:, :2], "declared is y"),
        (lambda x: (x, x), "returns 2 tensors"),
    ],
)
def test_what_cannot_be_captured_names_program_profile_line_and_cause(function: object, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CompileError, match=words) as raised:
        capture(program(function), PROFILE)
    assert "\n" not in str(raised.value)
    assert capsys.readouterr().err == "", "the error says it all"


@pytest.mark.parametrize("function", [torch.rand_like, torch.bernoulli, torch.nn.functional.dropout, lambda x: attention(x, 0.5)])
def test_what_draws_random_numbers_is_refused_with_its_line(function: Callable[..., Tensor]) -> None:
    with pytest.raises(CompileError, match=r"'p' at profile 'n4' draws random numbers, .* as an input, or leave it out: aten\..* at \S+\.py:\d+, `"):
        capture(program(function), PROFILE)


@pytest.mark.parametrize("function", [nn.Dropout(), lambda x: torch.nn.functional.dropout(x, training=False), lambda x: attention(x, 0.0)])
def test_what_could_draw_and_does_not_is_captured(function: Callable[..., Tensor]) -> None:
    x = torch.randn(2, 4)
    assert torch.equal(capture(program(function), PROFILE).module()(x), function(x) if not isinstance(function, nn.Dropout) else x)


def attention(x: Tensor, dropout: float) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(*(x[:, None, :, None] for _ in range(3)), dropout_p=dropout).flatten(1)


def test_a_size_without_a_number_and_a_name_that_is_no_file_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="no number to N"):
        capture(program(torch.tanh), Profile("empty", {}, 2))
    with pytest.raises(ConfigError, match="names are"):
        capture(program(torch.tanh, "../p"), PROFILE)
