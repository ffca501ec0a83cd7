"""Every kernel becomes machine code of every arch on a machine without a GPU, and fits what that arch has."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from reelstep.compiler import cubins
from reelstep.compiler.cubins import SHARED_LIMIT, Cubin, compile_kernels, kernels_for, main, resources
from reelstep.errors import CompileError, NotFound
from reelstep.kernels import OPS
from reelstep.kernels.jit import HAS_TRITON, tl, triton
from reelstep.kernels.op import Kernel

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

EM_CUDA = 190
"""Machine of an ELF file with CUDA code."""

SPILLED = {"attention": 32, "attention_lengths": 32}
"""Bytes a thread may spill: beside 128 sums of a thread, a few addresses that the loop does not read are put aside. Kernels over rows spill none."""


def check(cubin: Cubin) -> None:
    assert cubin.code[:4] == b"\x7fELF"
    assert struct.unpack_from("<H", cubin.code, 18) == (EM_CUDA,)
    assert 0 < cubin.registers <= 255
    assert cubin.registers * 32 * cubin.warps <= 65536, "a program must fit the registers of a multiprocessor"
    assert cubin.spilled_bytes <= SPILLED.get(cubin.kernel, 0), cubin
    assert cubin.shared_bytes <= SHARED_LIMIT[cubin.arch], cubin


def test_every_op_compiles_for_hopper() -> None:
    found = list(compile_kernels("sm90"))
    assert [c.kernel for c in found] == [k.name for op in OPS.values() for k in op.kernels(90)]
    for cubin in found:
        check(cubin)
    attention = next(c for c in found if c.kernel == "attention")
    assert attention.shared_bytes >= 128 * 128 * 2 + 2 * 2 * 128 * 128 * 2, "a block of queries and two stages of keys and values"


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_every_kernel_compiles_for(arch: str) -> None:
    found = list(compile_kernels(arch))
    assert len(found) == len(kernels_for(arch)) >= len(OPS) - 1
    for cubin in found:
        check(cubin)


def test_an_arch_without_fp8_is_not_asked_for_it() -> None:
    names = {arch: {k.name for k in kernels_for(arch)} for arch in SHARED_LIMIT}
    assert names["sm90"] - names["sm80"] == {"fp8_norm_quantise"}
    assert names["sm89"] == names["sm90"] == names["sm100"] == names["sm120"]


def many(x: tl.tensor, N: tl.constexpr, M: tl.constexpr) -> None:
    """A tile times its columns' sums, so that all of the tile is alive at once."""
    at = tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :]
    tile = tl.load(x + at)
    for _ in range(4):
        tile = tile * tl.sum(tile, 0)[None, :] + tl.sum(tile, 1)[:, None]
    tl.store(x + at, tile)


def test_spilled_registers_are_seen() -> None:
    """256 values a thread in float32 cannot all be in 255 registers."""
    kernel = Kernel("many", triton.jit(many), {"x": "*fp32", "N": 128, "M": 64}, 1, 1)
    cubin = next(compile_kernels("sm90", [kernel]))
    assert cubin.spilled_bytes > 0
    assert resources(cubin.code) == (cubin.registers, cubin.spilled_bytes)


def test_a_kernel_that_does_not_compile_is_named() -> None:
    wrong = Kernel("wrong", triton.jit(many), {"x": "*fp32", "N": 100, "M": 128}, 1, 1)  # not a power of two
    with pytest.raises(CompileError, match="kernel 'wrong' does not compile for sm80"):
        next(compile_kernels("sm80", [wrong]))


def test_an_unknown_arch_is_an_error_with_those_we_compile_for() -> None:
    with pytest.raises(NotFound, match="unknown arch 'sm75'; known: sm100, sm120, sm80, sm89, sm90"):
        compile_kernels("sm75")


def test_without_triton_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cubins, "HAS_TRITON", False)
    with pytest.raises(CompileError, match=r"install reelstep\[triton\]"):
        compile_kernels("sm90")


def test_in_the_interpreter_there_is_no_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cubins, "interpreted", lambda kernel: True)
    with pytest.raises(CompileError, match="TRITON_INTERPRET=1 is set"):
        next(compile_kernels("sm90"))


def test_the_command_prints_a_row_for_each_and_writes_the_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--arch", "sm90", "--kernel", "swiglu", "--kernel", "gelu_tanh", "--out", str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["kernel", "arch", "warps", "stages", "registers", "spilled", "shared", "code"]
    assert [row[:2] for row in rows[1:3]] == [["swiglu", "sm90"], ["gelu_tanh", "sm90"]]
    assert {p.name: p.stat().st_size for p in tmp_path.iterdir()} == {f"{row[0]}.sm90.cubin": int(row[7]) for row in rows[1:3]}
    assert main(["--arch", "sm80", "--kernel", "fp8_norm_quantise"]) == 1
    assert "unknown kernel for sm80 'fp8_norm_quantise'; known: attention" in capsys.readouterr().err
