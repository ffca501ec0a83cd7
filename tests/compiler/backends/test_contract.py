"""What every registered backend promises, whoever adds one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from reelstep.compiler.backends import BACKENDS, Executable
from reelstep.compiler.bundle import Bundle
from reelstep.compiler.compile import compile_model
from reelstep.compiler.load import load
from reelstep.compiler.program import Precision, Profile, Program, TensorSpec
from reelstep.errors import CompileError, ConfigError

TOLERANCE: dict[Precision, float] = {
    "float32": 1e-5,  # order of summation: a few hundred terms, 6e-8 each
    "bfloat16": 3e-2,  # 8 bits: 4e-3 an operation, and about ten in a row
}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


def pairs() -> list[tuple[str, Precision]]:
    return [(name, precision) for name in BACKENDS for precision in BACKENDS[name].precisions]


@pytest.fixture(scope="session", params=pairs(), ids=lambda pair: "-".join(pair))
def choice(request: pytest.FixtureRequest) -> tuple[str, Precision]:
    found: tuple[str, Precision] = request.param
    return found


@pytest.fixture(scope="session")
def engine(bundle: Bundle, cache: Path, choice: tuple[str, Precision]) -> Executable:
    return load(bundle, cache, *choice)["denoise", "l4"]


def sample(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {"ids": torch.randint(0, 11, (rows, 4), generator=generator), "t": torch.rand(rows, generator=generator)}


def test_any_number_of_rows_gives_what_the_module_gives(engine: Executable, choice: tuple[str, Precision], programs: tuple[Program, ...]) -> None:
    for rows in (1, 2, 3, 5, 1):
        inputs = sample(rows)
        found = engine(inputs)
        assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
            "y": (torch.float32, (rows, 8, 8)), "next": (torch.int64, (rows, 4)),
        }  # fmt: skip
        if BACKENDS[choice[0]].runs:
            with torch.no_grad():
                y, following = programs[0].module(**inputs)
            assert torch.linalg.vector_norm(found["y"] - y) <= TOLERANCE[choice[1]] * torch.linalg.vector_norm(y)
            assert torch.equal(found["next"], following)


def test_a_later_call_leaves_earlier_outputs_alone(engine: Executable) -> None:
    first = engine(sample(2))["y"]
    kept = first.clone()
    engine(sample(3))
    engine({name: tensor.flip(0) for name, tensor in sample(2).items()})
    assert torch.equal(first, kept)


class Passing(torch.nn.Module):
    """Gives what it was given, and what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.held = torch.nn.Parameter(torch.ones(4))

    def forward(self, metadata: Tensor) -> tuple[Tensor, Tensor]:
        return metadata, self.held.expand(metadata.shape[0], 4)


@pytest.mark.parametrize("name", [name for name, backend in BACKENDS.items() if backend.runs and name != "tensorrt"])
def test_outputs_are_in_memory_of_their_own(name: str, tmp_path: Path) -> None:
    (given, passed, held) = (TensorSpec(each, "float32", ("B", 4)) for each in ("metadata", "passed", "held"))
    program = Program("p", Passing(), (given,), (passed, held), (Profile("any", {}, 3),))
    out = tmp_path / "p.reel"
    compile_model(model="m", version="1", settings={}, programs=[program], backend="null", out=out, solvers={}, card="")
    engine, x = load(Bundle.open(out), None, name)["p", "any"], torch.zeros(2, 4)
    with torch.inference_mode():
        for tensor in engine({"metadata": x}).values():
            tensor.fill_(7.0)
    again = engine({"metadata": x})
    assert torch.equal(again["passed"], torch.zeros(2, 4))
    assert torch.equal(again["held"], torch.ones(2, 4))


def test_inputs_need_not_be_contiguous(engine: Executable) -> None:
    inputs = sample(3)
    strided = {"ids": inputs["ids"].t().contiguous().t(), "t": torch.stack([inputs["t"], inputs["t"]], 1)[:, 0]}
    assert torch.equal(engine(strided)["y"], engine(inputs)["y"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ids": None}, "ids is missing"),
        ({"speed": torch.zeros(2)}, "speed is not an input"),
        ({"t": torch.zeros(2, dtype=torch.float64)}, r"t is float64 \[2\]"),
        ({"t": torch.zeros(2, 1)}, r"t is float32 \[2, 1\]"),
        ({"ids": torch.zeros(2, 7, dtype=torch.int64)}, r"ids is int64 \[2, 7\]"),
        ({"t": torch.zeros(3)}, "rows differ: ids has 2, t has 3"),
        ({"ids": torch.zeros(6, 4, dtype=torch.int64), "t": torch.zeros(6)}, "B from 1 to 5"),
        ({"ids": torch.zeros(0, 4, dtype=torch.int64), "t": torch.zeros(0)}, "B from 1 to 5"),
        ({"t": torch.tensor(0.0)}, r"t is float32 \[\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_with_what_would(engine: Executable, change: dict[str, Tensor | None], words: str) -> None:
    inputs = {name: tensor for name, tensor in {**sample(2), **change}.items() if tensor is not None}
    with pytest.raises(ConfigError, match=words):
        engine(inputs)


def test_a_program_kept_in_float32_is_exact_in_any_precision(bundle: Bundle, cache: Path, choice: tuple[str, Precision], programs: tuple[Program, ...]) -> None:
    if BACKENDS[choice[0]].runs:
        ids = sample(3)["ids"]
        found = load(bundle, cache, *choice)["lookup", "l4"]({"ids": ids})["sum"]
        torch.testing.assert_close(found, programs[1].module(ids).detach(), rtol=1e-6, atol=1e-6)  # four terms in float32


def test_a_damaged_engine_in_the_cache_is_built_again(bundle: Bundle, cache: Path, choice: tuple[str, Precision]) -> None:
    load(bundle, cache, *choice)
    if choice[0] == "inductor":
        pytest.skip("the same seal as openvino's, and a minute of C++ compiler")
    engines = sorted(cache.glob(f"{choice[0]}-*.blob"))
    for file in engines:
        file.write_bytes(b"not an engine")
    inputs = sample(2)
    before = load(bundle, None, *choice)["denoise", "l4"](inputs)["y"]
    assert torch.equal(load(bundle, cache, *choice)["denoise", "l4"](inputs)["y"], before)


def test_a_precision_that_the_machine_lacks_is_refused(bundle: Bundle) -> None:
    with pytest.raises(CompileError, match="'inductor' cannot run bfloat16 on this machine; it can run float32"):
        load(bundle, None, "inductor", "bfloat16")
