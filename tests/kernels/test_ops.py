"""Every op of the table, with the examples of its own file: the formula in float32 and the kernel, against the formula in float64.

Triton's interpreter must be chosen before Triton is imported, so these cases run in a process of their own; with a GPU the same cases run on it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reelstep.benchmarks.gpu_check.bounds import FROM_HALVES, doubled, error_and_bound
from reelstep.benchmarks.gpu_check.correctness import DTYPES
from reelstep.kernels import OPS
from reelstep.kernels.jit import HAS_TRITON
from reelstep.kernels.op import Make, Op, exactly, tensors_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def contiguous(generator: torch.Generator, dtype: torch.dtype, device: str) -> Make:
    def make(*sizes: int, dtype: torch.dtype | None = dtype) -> Tensor:
        return torch.randn(sizes, generator=generator).to(device, dtype)

    return make


def strided(generator: torch.Generator, dtype: torch.dtype, device: str) -> Make:
    """Every second element of a tensor whose last dims are swapped: no two elements of a row side by side."""

    def make(*sizes: int, dtype: torch.dtype | None = dtype) -> Tensor:
        wide = torch.randn(*sizes[:-2], *reversed(sizes[-2:]), 2, generator=generator).to(device, dtype)[..., 0]
        return wide.mT if len(sizes) > 1 else wide

    return make


def sliced(generator: torch.Generator, dtype: torch.dtype, device: str) -> Make:
    """A piece of a wider tensor, as chunks of a fused projection are: rows in one piece, far apart."""

    def make(*sizes: int, dtype: torch.dtype | None = dtype) -> Tensor:
        return torch.randn(*sizes[:-1], sizes[-1] + 5, generator=generator).to(device, dtype)[..., 3:-2]

    return make


LAYOUTS: dict[str, Callable[[torch.Generator, torch.dtype, str], Make]] = {"contiguous": contiguous, "strided": strided, "sliced": sliced}


def examples(op: Op, dtype: torch.dtype, device: str = "cpu", layout: str = "contiguous") -> Iterator[tuple[Any, ...]]:
    return op.examples(LAYOUTS[layout](torch.Generator().manual_seed(0), dtype, device))


def compare(found: Any, formula: Any, truth: Any, what: str, float32: float = 4 * torch.finfo(torch.float32).eps) -> None:
    """The kernel may err twice as much as the formula in float32 does, and by one rounding of its output; four in float32, since the order of sums differs."""
    for one, like in zip_longest(tensors_of(found), tensors_of(formula)):
        assert (one.shape, one.dtype) == (like.shape, like.dtype), what
    error, bound = error_and_bound(found, formula, truth, float32)
    assert error <= bound, f"{what}: error {error:.3e}, allowed {bound:.3e}"


def compare_kernel(name: str, dtype: torch.dtype, device: str) -> None:
    op = OPS[name]
    for layout in LAYOUTS:
        for i, arguments in enumerate(examples(op, dtype, device, layout)):
            compare(op.launch(*arguments), op.reference(*arguments), op.reference(*doubled(arguments)), f"{name} {dtype} {layout} example {i}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_an_op_on_a_cpu_is_its_formula(name: str, dtype: torch.dtype) -> None:
    op = OPS[name]
    for layout in LAYOUTS:
        for i, arguments in enumerate(examples(op, dtype, layout=layout)):
            what = f"{name} {dtype} {layout} example {i}"
            compare(op.overload(*arguments), op.reference(*arguments), op.reference(*doubled(arguments)), what, FROM_HALVES)


@pytest.mark.parametrize("name", OPS)
def test_a_decomposition_is_the_formula(name: str) -> None:
    op = OPS[name]
    for i, arguments in enumerate(examples(op, torch.float32)):
        compare(op.decomposition(*arguments), op.reference(*arguments), op.reference(*doubled(arguments)), f"{name} example {i}")


@pytest.mark.parametrize("name", OPS)
def test_an_op_is_registered_as_torch_wants_it(name: str) -> None:
    op = OPS[name]
    for layout in ("sliced", "strided"):
        for arguments in examples(op, torch.bfloat16, layout=layout):
            torch.library.opcheck(op.overload, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(op.overload, next(examples(op, torch.float32)))


@pytest.mark.skipif(not INTERPRETED, reason="run by test_kernels_in_the_interpreter in a process of its own")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_a_kernel_in_the_interpreter_is_its_formula(name: str, dtype: torch.dtype) -> None:
    compare_kernel(name, dtype, "cpu")


def compare_attention_to_hidden_keys(device: str) -> None:
    """Scores of -inf by keys of -inf: of a first block and not the second, of all of both, and of the keys that a length leaves."""
    generator = torch.Generator().manual_seed(0)
    for hidden, lengths in ((10, None), (64, None), (128, None), (64, torch.tensor([64], dtype=torch.int32, device=device))):
        q, k, v = (torch.randn(1, 1, n, 16, generator=generator).to(device) for n in (64, 128, 128))
        q[..., -1], k[..., :hidden, -1] = 1, -torch.inf
        arguments = q, k, v, lengths, 0.25, "triton"
        op = OPS["attention"]
        compare(op.launch(*arguments), op.reference(*arguments), op.reference(*doubled(arguments)), f"{hidden} hidden of {lengths}")


@pytest.mark.skipif(not INTERPRETED, reason="run by test_kernels_in_the_interpreter in a process of its own")
def test_attention_passes_over_keys_that_score_minus_infinity_in_the_interpreter() -> None:
    compare_attention_to_hidden_keys("cpu")


@pytest.mark.gpu
def test_attention_passes_over_keys_that_score_minus_infinity_on_a_gpu() -> None:
    compare_attention_to_hidden_keys("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_a_kernel_on_a_gpu_is_its_formula(name: str, dtype: torch.dtype) -> None:
    compare_kernel(name, dtype, "cuda")


def test_a_kernel_is_given_no_float64_which_it_would_round() -> None:
    run = exactly(lambda *_: "kernel", lambda *_: "formula")
    half, double = torch.ones(1, dtype=torch.bfloat16), torch.ones(1, dtype=torch.float64)
    assert [run(half, 0.5), run(half, None, double), run(double)] == ["kernel", "formula", "formula"]
    assert [run(half, [half, half]), run(half, [half, double])] == ["kernel", "formula"], "as a solver's past velocities are given"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_an_op_on_a_gpu_is_its_formula(name: str, dtype: torch.dtype) -> None:
    op = OPS[name]
    for layout in LAYOUTS:
        for i, arguments in enumerate(examples(op, dtype, "cuda", layout)):
            what = f"{name} {layout} example {i}"
            compare(op.overload(*arguments), op.reference(*arguments), op.reference(*doubled(arguments)), what, FROM_HALVES)


@pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="needs Triton, and is what starts the interpreter")
def test_kernels_in_the_interpreter() -> None:
    root = Path(__file__).resolve().parents[2]
    arguments = ["-m", "pytest", str(Path(__file__).relative_to(root)), "-q", "-k", "in_the_interpreter", "-p", "no:cacheprovider"]
    found = subprocess.run([sys.executable, "-P", *arguments], cwd=root, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
    assert f"{len(OPS) * len(DTYPES) + 1} passed" in found.stdout


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors, and other work beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
