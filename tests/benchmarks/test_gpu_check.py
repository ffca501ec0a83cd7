"""The check of a GPU: its parts at tiny sizes on the CPU, its bounds on values that are known to be wrong, and its refusal where there is no GPU."""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from subprocess import run
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from reelstep.benchmarks.gpu_check import __main__ as command
from reelstep.benchmarks.gpu_check import attention, correctness, memory_bound
from reelstep.benchmarks.gpu_check.apart import apart
from reelstep.benchmarks.gpu_check.bench import LARGE, Bench, Finding, Sizes, checked
from reelstep.benchmarks.gpu_check.bounds import doubled, error_and_bound, worst
from reelstep.benchmarks.gpu_check.correctness import check_op
from reelstep.benchmarks.gpu_check.fp8 import fp8_layers
from reelstep.benchmarks.gpu_check.memory_bound import large_examples
from reelstep.benchmarks.gpu_check.parts import PARTS
from reelstep.benchmarks.gpu_check.ranks import Piece, rank_pieces
from reelstep.benchmarks.gpu_check.running import Part, run_parts, unfinished, wrong
from reelstep.benchmarks.harness import write
from reelstep.engine.models.movie_gen import CONFIG_30B
from reelstep.kernels import OPS
from reelstep.kernels.attention_choice import ATTENTIONS

CPU = torch.device("cpu")
TINY = Sizes(
    replace(CONFIG_30B, layers=2, width=64, ffn=96, heads=4, latent_channels=3, positions=(4, 4, 4), text_widths=(5,), time_frequencies=16),
    latent=(2, 4, 4), text=8, matmul=32, ranks=2, clips=2,
)  # fmt: skip
PACKAGES_OF_OTHERS = ("einops", "openvino", "google_crc32c", "cryptography", "grpc", "av", "PIL", "scipy", "ray", "diffusers")


@pytest.fixture
def bench() -> Iterator[Bench]:
    """One that measures as little as it can."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Bench(CPU, TINY)
    made.seconds = lambda run, most_s=0.0, warmup=0: made.each(run, 1)[0]  # type: ignore[method-assign]
    yield made
    torch.set_num_threads(before)


def test_the_shapes_are_those_of_movie_gen_30b() -> None:
    assert (LARGE.tokens, LARGE.config.width, LARGE.config.heads, LARGE.head) == (73_728, 6144, 48, 128)


def test_parts_together_take_less_than_nine_minutes() -> None:
    assert sum(part.budget_s for part in PARTS) < 9 * 60
    assert PARTS[0].name == "ceilings", "shares are of what it measures"


@pytest.mark.parametrize("part", [part for part in PARTS if part.name not in ("correctness", "end to end")], ids=lambda part: part.name)
def test_a_part_runs_whole_at_a_tiny_size(part: Part, bench: Bench) -> None:
    rows = run_parts(bench, [PARTS[0], part], tell=lambda line: None)
    assert not [row for row in rows if row["what"] == "failed"], rows
    assert wrong(rows) == []
    timed = [row for row in rows if row["rate"] is not None]
    assert all(row["seconds"] > 0 and row["share"] is not None for row in timed)


@pytest.mark.parametrize("name", OPS)
def test_a_right_op_is_found_right(name: str, bench: Bench) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert check_op(OPS[name], dtype, bench).right, (name, dtype)


def test_a_wrong_op_is_found_wrong(bench: Bench) -> None:
    op = OPS["gelu_tanh"]
    other = replace(op, reference=lambda x: torch.nn.functional.gelu(x.float() if x.dtype != torch.float64 else x).to(x.dtype))
    found = check_op(other, torch.float32, bench)
    assert found.right is False
    assert found.error is not None
    assert 1e-4 < found.error < 1e-3, "the two forms of GELU differ by at most 5e-4"


@pytest.mark.parametrize(
    "rounded",
    [
        lambda exact: torch.where(exact.double().abs() < 48, torch.zeros_like(exact, dtype=torch.float32), exact.float()),
        lambda exact: torch.where(exact.double() > 0, exact.float() * (1 - 2**-4), exact.float()),
    ],
    ids=["small ones are lost", "cut off"],
)
def test_e4m3_that_is_rounded_wrongly_is_found(rounded: Callable[[Tensor], Tensor], bench: Bench) -> None:
    op = OPS["fp8_norm_quantise"]

    def launch(*arguments: Any) -> tuple[Tensor, Tensor]:
        values, steps = op.reference(*arguments)
        return rounded(values).to(torch.float8_e4m3fn), steps

    arguments = next(iter(op.examples(bench.randn)))
    exact = op.reference(*doubled(arguments))
    error, allowed = error_and_bound(op.reference(*arguments), op.reference(*arguments), exact, 1e-6)
    assert error <= allowed
    error, allowed = error_and_bound(launch(*arguments), op.reference(*arguments), exact, 1e-6)
    assert error > allowed


def test_a_gpu_without_products_in_e4m3_is_not_asked_for_them(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch, "_scaled_mm", lambda *_, **__: pytest.fail("it was called"))
    bench.device = torch.device("cuda")
    (row,) = fp8_layers(bench)
    assert row.note == "not run: products in E4M3 need sm89, and this is sm80"
    assert row.right is None


def test_bounds_hold_one_rounding_and_no_nan() -> None:
    truth = torch.tensor([1.0, -2.0], dtype=torch.float64)
    error, bound = error_and_bound((truth + 2**-8).bfloat16(), truth.bfloat16(), truth, 0.0)
    assert (error, bound) == (0.0, 2 * torch.finfo(torch.bfloat16).eps), "1 + 2**-8 rounds to even, -2 + 2**-8 too"
    error, bound = error_and_bound((truth + 0.1).float(), truth.float(), truth, 1e-6)
    assert error == pytest.approx(0.1)
    assert bound == pytest.approx(2e-6)
    assert error_and_bound(truth.float(), truth.bfloat16(), truth, 1e-6)[0] == math.inf, "of another dtype"
    assert math.isnan(worst([(0.0, 1.0), (math.nan, 1.0)])[0])
    assert worst([(0.0, 0.0), (0.3, 1.0), (0.2, 0.25)]) == (0.2, 0.25), "the empty and the exact say least"
    assert worst([(1e-9, 0.0), (0.9, 1.0)]) == (1e-9, 0.0)
    assert checked("", math.nan, 1.0).right is False


def test_every_op_but_attention_is_timed_and_its_bytes_are_counted_once(bench: Bench) -> None:
    assert {name for name, _, _ in large_examples(bench)} == {*OPS} - {"attention"}
    found = {finding.what: finding for finding in memory_bound.memory_bound(bench)}
    tokens, d = TINY.tokens, TINY.config.width
    row = found["gated_residual"]
    assert row.rate is not None
    assert row.seconds is not None
    assert row.rate * 1e9 * row.seconds == pytest.approx(2 * (3 * tokens * d + d)), "x, y and out, and one gate, in bfloat16"
    row = found["fp8_norm_quantise"]
    assert row.rate is not None
    assert row.seconds is not None
    assert row.rate * 1e9 * row.seconds == pytest.approx(3 * tokens * d + 3 * 2 * d + 4 * tokens), "x in two bytes, values in one, a step of four a row"


@pytest.mark.parametrize(("cp", "tp"), [(2, 1), (1, 2)])
def test_ranks_share_the_products_of_a_block(cp: int, tp: int, bench: Bench) -> None:
    def flops(cp: int, tp: int) -> dict[str, float]:
        pieces: list[Piece] = list(rank_pieces(bench, cp, tp))
        return {piece.what: piece.flops for piece in pieces}

    whole, one = flops(1, 1), flops(cp, tp)
    d, length, text = TINY.config.width, TINY.tokens, TINY.text
    assert whole["self-attention"] == 4 * length**2 * d
    assert whole["linear layers"] == 2 * d * d * (6 * length + 2 * text) + 6 * length * d * TINY.config.ffn
    assert one["self-attention"] == whole["self-attention"] / 2
    assert one["attention to text"] == whole["attention to text"] / 2
    projections_of_text = 4 * d * d * text
    shared = whole["linear layers"] - projections_of_text
    assert one["linear layers"] == shared / 2 + projections_of_text / tp, "a split in tokens leaves every rank the whole text"


def test_a_part_that_fails_or_takes_too_long_keeps_its_rows_and_stops_no_other(bench: Bench) -> None:
    def fails(_: Bench) -> Iterator[Finding]:
        yield Finding("first")
        raise RuntimeError("no such instruction")

    def sleeps(_: Bench) -> Iterator[Finding]:
        yield Finding("before")
        with suppress(Exception):  # as Triton's autotuner and torch's compiler have it around much of what they run
            time.sleep(30)
        yield Finding("never")

    def wrongs(_: Bench) -> Iterator[Finding]:
        yield checked("value", 2.0, 1.0)

    began = time.monotonic()
    rows = run_parts(bench, [Part("a", 5, fails), Part("b", 0.1, sleeps), Part("c", 5, wrongs)], tell=lambda line: None)
    assert time.monotonic() - began < 20
    assert [(row["part"], row["what"]) for row in rows] == [("a", "first"), ("a", "failed"), ("b", "before"), ("b", "failed"), ("c", "value")]
    assert rows[1]["note"] == "RuntimeError: no such instruction"
    assert "stopped after its 0.1 s" in rows[3]["note"]
    assert wrong(rows) == ["c: value"]


def test_a_device_that_is_lost_ends_no_part_that_has_processes_of_its_own(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(_: Bench) -> Iterator[Finding]:
        monkeypatch.setattr(torch.cuda, "synchronize", lost)
        raise torch.AcceleratorError("an illegal memory access was encountered")

    def lost(_: torch.device) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    def finds(_: Bench) -> Iterator[Finding]:
        yield Finding("found")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    bench.device = torch.device("cuda")
    rows = run_parts(bench, [Part("a", 5, finds), Part("b", 5, breaks), Part("c", 5, finds), Part("d", 5, finds, alone=True)], tell=lambda line: None)
    assert [(row["part"], row["what"]) for row in rows] == [("a", "found"), ("b", "failed"), ("c", "failed"), ("d", "found")]
    assert rows[2]["note"].startswith("not run: the device was lost in part 'b': AcceleratorError: an illegal memory access")
    assert unfinished(rows) == ["b", "c"]
    assert {part.name for part in PARTS if part.alone} == {"correctness", "end to end"}


def test_an_op_that_fails_is_a_row_and_the_others_are_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no such instruction")

    failing = replace(ATTENTIONS["sdpa"], run=fails)
    monkeypatch.setattr(attention, "ATTENTIONS", {**ATTENTIONS, "sdpa": failing})
    monkeypatch.setattr(correctness, "check_op", fails)
    monkeypatch.setattr(Bench, "moved", lambda self, what, *_, **__: fails() if what == "swiglu" else Finding(what))
    rows = run_parts(bench, [Part("kernels", 60, memory_bound.memory_bound), Part("attention", 60, attention.attention_rates)], tell=lambda line: None)
    failed = [row for row in rows if row["note"] == "RuntimeError: no such instruction"]
    assert [row["what"] for row in failed] == ["swiglu failed", "attention sdpa failed"]
    assert len([row for row in rows if row["part"] == "kernels"]) == len(OPS) - 1
    assert any(row["what"].startswith("torch scaled") and row["right"] for row in rows)
    assert unfinished(rows) == ["kernels", "attention"]
    assert correctness._check_op(("swiglu", torch.float32, bench.device)) == Finding("swiglu float32 failed", right=False, note=failed[0]["note"])


def ends_itself(_: Bench) -> Iterator[Finding]:
    yield Finding("first")
    print("no more", file=sys.stderr, flush=True)
    reader = Thread(target=ctypes.string_at, args=(8,))  # where nothing is: not the first thread, as an engine's is not
    reader.start()
    reader.join()


def ends_at_once(_: Bench) -> Iterator[Finding]:
    yield Finding("first")
    os._exit(7)


def raises(_: Bench) -> Iterator[Finding]:
    yield Finding("first")
    raise ValueError("no such engine")


@pytest.mark.parametrize(
    ("find", "why"),
    [
        ("ends_itself", "by SIGSEGV in .*_ctypes.*; it said last: no more"),
        ("ends_at_once", "its process exited with 7"),
        ("raises", "ValueError: no such engine"),
    ],
)
def test_what_ends_its_process_leaves_its_rows_and_the_other_parts(find: str, why: str, bench: Bench) -> None:
    there = getattr(import_module("reelstep.tests.benchmarks.test_gpu_check"), find)  # by the name that another process finds it by
    parts = [Part("a", 60, lambda bench: apart(there, bench.device)), Part("b", 5, lambda _: iter([Finding("second")]))]
    kept: list[int] = []
    rows = run_parts(bench, parts, tell=lambda line: None, keep=lambda rows: kept.append(len(rows)))
    assert [(row["part"], row["what"]) for row in rows] == [("a", "first"), ("a", "failed"), ("b", "second")]
    assert re.search(why, rows[1]["note"])
    assert kept == [1, 2, 3], "what was found is kept, whatever ends the check"


def test_ops_are_checked_in_processes_of_their_own(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correctness, "DTYPES", (torch.float32,))
    found = list(correctness.correctness(bench))
    assert {row.what for row in found} == {f"{name} float32" for name in OPS}
    assert all(row.right for row in found)


def test_rows_are_written_as_json_without_nan(tmp_path: Path) -> None:
    row = {"part": "p", "what": "w", "error": math.nan, "rate": 2.5, "right": None}
    write("gpu_check", [row], {"gpu": "none"}, tmp_path / "deep" / "rows.json")
    written = json.loads((tmp_path / "deep" / "rows.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert written["rows"] == [{**row, "error": "nan"}]
    assert written["conditions"] == {"gpu": "none"}


def stops(_: Bench) -> Iterator[Finding]:
    yield checked("value", 0.5, 1.0)
    raise RuntimeError("an illegal memory access")


@pytest.mark.parametrize(
    ("find", "code", "says"),
    [
        (lambda _: iter([checked("value", 2.0, 1.0)]), 1, "1 wrong: p: value"),
        (stops, 3, "nothing was found wrong, but not all was checked; these parts failed: p"),
        (lambda _: iter([checked("value", 0.5, 1.0)]), None, ""),
    ],
)
def test_the_exit_code_says_whether_something_was_wrong_or_not_checked(
    find: Callable[[Bench], Iterator[Finding]], code: int | None, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "Bench", lambda device, sizes: Bench(CPU, TINY))
    monkeypatch.setattr(command, "PARTS", (Part("p", 5, find),))
    if code is None:
        command.main([])
    else:
        with pytest.raises(SystemExit) as stopped:
            command.main([])
        assert stopped.value.code == code
        assert says in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_needs_no_package_of_the_other_parts() -> None:
    """Run as `make gpu-check` does, where only torch, Triton, numpy, safetensors and rich are installed."""
    block = f"""
import importlib.abc, runpy, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {PACKAGES_OF_OTHERS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import reelstep.compiler.passes.quantise
sys.argv = ["gpu_check"]
runpy.run_module("reelstep.benchmarks.gpu_check", run_name="__main__")
"""
    found = run([sys.executable, "-P", "-c", block], capture_output=True, text=True, timeout=120)
    assert found.returncode == 2, found.stderr
    assert "sees no NVIDIA GPU, so there is nothing to check" in found.stderr
