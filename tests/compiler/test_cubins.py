"""Every kernel becomes machine code of every arch on a machine without a GPU, and fits what that arch has."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest

from reelstep.compiler import cubins
from reelstep.compiler.compile import make_plan
from reelstep.compiler.cubins import SHARED_LIMIT, Cubin, compile_kernels, kernels_for, main, resources, with_kernels
from reelstep.compiler.plan import Plan, ProgramPlan, RankPlan
from reelstep.compiler.skus import SKUS
from reelstep.errors import CompileError, NotFound
from reelstep.kernels import OPS
from reelstep.kernels.attention_triton import TILES
from reelstep.kernels.jit import HAS_TRITON, tl, triton
from reelstep.kernels.op import Kernel

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

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


@needs_triton
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_every_kernel_compiles_for(arch: str) -> None:
    found = list(compile_kernels(arch))
    assert len(found) == len(kernels_for(arch)) >= len(OPS) - 1
    for cubin in found:
        check(cubin)


@needs_triton
def test_every_op_has_its_kernels_on_hopper() -> None:
    found = list(compile_kernels("sm90"))
    assert [c.kernel for c in found] == [k.name for op in OPS.values() for k in op.kernels(90)]
    attention = next(c for c in found if c.kernel == "attention")
    tile = TILES[90][0]
    assert attention.shared_bytes >= 2 * 128 * (tile.queries + 2 * tile.stages * tile.keys), "a block of queries, and of keys and values in every stage"


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


@needs_triton
def test_spilled_registers_are_seen() -> None:
    """256 values a thread in float32 cannot all be in 255 registers."""
    kernel = Kernel("many", triton.jit(many), {"x": "*fp32", "N": 128, "M": 64}, 1, 1)
    cubin = next(compile_kernels("sm90", [kernel]))
    assert cubin.spilled_bytes > 0
    assert resources(cubin.code) == (cubin.registers, cubin.spilled_bytes)


@needs_triton
def test_a_kernel_that_does_not_compile_is_named() -> None:
    wrong = Kernel("wrong", triton.jit(many), {"x": "*fp32", "N": 100, "M": 128}, 1, 1)  # not a power of two
    with pytest.raises(CompileError, match="kernel 'wrong' does not compile for sm80"):
        next(compile_kernels("sm80", [wrong]))


@needs_triton
def test_an_unknown_arch_is_an_error_with_those_we_compile_for() -> None:
    with pytest.raises(NotFound, match="unknown arch 'sm75'; known: sm100, sm120, sm80, sm89, sm90"):
        compile_kernels("sm75")


@needs_triton
def test_without_triton_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cubins, "HAS_TRITON", False)
    with pytest.raises(CompileError, match=r"install reelstep\[triton\]"):
        compile_kernels("sm90")


@needs_triton
def test_in_the_interpreter_there_is_no_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cubins, "interpreted", lambda kernel: True)
    with pytest.raises(CompileError, match="TRITON_INTERPRET=1 is set"):
        next(compile_kernels("sm90"))


@needs_triton
def test_the_command_prints_a_row_for_each_and_writes_the_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--arch", "sm90", "--kernel", "swiglu", "--kernel", "gelu_tanh", "--out", str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["kernel", "arch", "warps", "stages", "registers", "spilled", "shared", "code"]
    assert [row[:2] for row in rows[1:3]] == [["swiglu", "sm90"], ["gelu_tanh", "sm90"]]
    assert {p.name: p.stat().st_size for p in tmp_path.iterdir()} == {f"{row[0]}.sm90.cubin": int(row[7]) for row in rows[1:3]}
    assert main(["--arch", "sm80", "--kernel", "fp8_norm_quantise"]) == 2
    out, err = capsys.readouterr()
    assert "unknown kernel for sm80 'fp8_norm_quantise'; known: attention" in err
    assert not out
    assert main(["--arch", "sm80", "--arch", "sm89", "--kernel", "fp8_norm_quantise"]) == 0
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("fp8")] == ["sm89"], "the only one of them that has E4M3"


@needs_triton
def test_a_folder_that_cannot_be_made_is_told_before_anything_is_compiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["--arch", "sm90", "--kernel", "swiglu", "--out", str(tmp_path / "file" / "cubins")]) == 1
    assert capsys.readouterr() == ("", f"error: cannot make the folder {tmp_path}/file/cubins: Not a directory; choose another with --out\n")


def planned(*ops: str, sku: str = "h200-sxm") -> Plan:
    counts = {f"reelstep.{op}.default": 2 for op in ops} | {"aten.linear.default": 1}
    program = ProgramPlan("p", "any", "", counts, 1, 1, 1, False, "bfloat16", ())
    return make_plan("m", "1", "inductor", SKUS[sku], "bfloat16", "asked for", (program,))


@needs_triton
@pytest.mark.parametrize("sku", ["h200-sxm", "rtx-5090"])
def test_a_plan_has_the_figures_of_the_kernels_that_its_ops_are(sku: str) -> None:
    arch = SKUS[sku].arch
    plan = with_kernels(planned("swiglu", "gelu_tanh", sku=sku))
    wanted = {c.kernel: c for c in compile_kernels(arch, [k for k in kernels_for(arch) if k.name in ("swiglu", "gelu_tanh")])}
    assert [kernel.op for kernel in plan.kernels] == ["swiglu", "gelu_tanh"], "in the order of the table of ops"
    for found in plan.kernels:
        cubin = wanted[found.kernel]
        assert (found.warps, found.stages, found.registers) == (cubin.warps, cubin.stages, cubin.registers)
        assert (found.spilled_bytes, found.shared_bytes) == (cubin.spilled_bytes, cubin.shared_bytes)
        assert f"  {found.op}: {cubin.warps} warps, {cubin.stages} stages, {cubin.registers} registers" in plan.explain()
    assert plan.kernels_by == f"compiled for {arch} by Triton {triton.__version__}"
    assert Plan.from_json(plan.to_json()) == plan


@needs_triton
def test_figures_that_cannot_be_kept_are_found_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert with_kernels(planned("swiglu"), tmp_path / "file" / "cache") == with_kernels(planned("swiglu"))


@needs_triton
def test_kernels_are_compiled_once_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = with_kernels(planned("swiglu"), tmp_path)
    cubins._measured.cache_clear()
    monkeypatch.setattr(cubins, "_compile", lambda *_: pytest.fail("it was compiled again"))
    assert with_kernels(planned("swiglu"), tmp_path) == first
    (figures,) = tmp_path.iterdir()
    whole = figures.read_bytes()
    for damaged in (b"", b"{}"):
        figures.write_bytes(damaged)
        with pytest.raises(pytest.fail.Exception, match="compiled again"):
            with_kernels(planned("swiglu"), tmp_path)
    figures.write_bytes(whole)
    (kernel,) = OPS["swiglu"].kernels(90)
    monkeypatch.setattr(cubins, "OPS", {"swiglu": replace(OPS["swiglu"], kernels=lambda _: (replace(kernel, warps=2),))})
    with pytest.raises(pytest.fail.Exception, match="compiled again"):
        with_kernels(planned("swiglu"), tmp_path)


def test_a_plan_whose_programs_keep_no_op_has_no_kernels() -> None:
    assert with_kernels(planned()) == planned()
    assert "kernels" not in planned().explain()


def test_ops_of_a_meshs_ranks_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cubins, "HAS_TRITON", False)
    plan = planned("swiglu")
    split = replace(plan, programs=(), ranks=(RankPlan((0,), 0, plan.programs),))
    assert "kernels of the ops that are kept: not compiled: Triton is not installed; install reelstep[triton] (swiglu)" in with_kernels(split).explain()


def test_the_ring_between_ranks_is_no_kernel() -> None:
    assert with_kernels(planned("ring_attention")) == planned("ring_attention")


@needs_triton
def test_logarithms_in_half_precision_are_merged_on_gpus() -> None:
    (merge,) = (kernel for kernel in kernels_for("sm90") if kernel.name == "lse_merge")
    halves = replace(merge, arguments={**merge.arguments, "lse_a": "*fp16", "lse_b": "*fp16"})
    (cubin,) = compile_kernels("sm90", [halves])
    check(cubin)
