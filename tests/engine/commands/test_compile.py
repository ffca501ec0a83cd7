"""What `reelstep compile` says at its end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from reelstep import __main__ as cli
from reelstep.compiler.backends.tensorrt import NOT_RUN
from reelstep.compiler.plan import Plan


@pytest.mark.parametrize(
    ("mesh", "options", "weights", "ends"),
    [
        ({"cp": 3}, [], True, "its ranks build their engines when it is opened: `reelstep serve y.reel --mesh cp=3`\n"),
        ({"cp": 3}, ["--portable"], True, "its ranks build their engines when it is opened: `reelstep serve y.reel --mesh cp=3`\n"),
        ({"cp": 3}, [], False, "a plan alone: model 'reel-tiny' comes without weights, so that nothing can run it; read it with `reelstep inspect y.reel`\n"),
        ({}, ["--portable"], True, "build them there with `reelstep finalize y.reel`\n"),
        ({}, [], True, "y.reel  1.0 MB, plan 0123456789abcdef\n"),
    ],
)
def test_compile_ends_with_how_what_it_made_gets_its_engines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mesh: dict[str, int], options: list[str], weights: bool, ends: str
) -> None:
    plan = Plan("toy", "1", "openvino", "cpu", "avx512", mesh, "float32", "asked for", ())
    monkeypatch.setattr(Plan, "hash", "0123456789abcdef")
    bundle = SimpleNamespace(path=Path("y.reel"), total_bytes=10**6, plan=plan, signatures={("denoise", "video"): None}, has_weights=weights)
    monkeypatch.setattr("reelstep.engine.build.build_bundle", lambda *_, **__: bundle)
    assert cli.main(["compile", "reel-tiny", *options]) == 0
    assert capsys.readouterr().out.endswith(ends)


def test_compile_says_that_a_backend_computes_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan("toy", "1", "null", "b200", "sm100", {}, "bfloat16", "asked for", ())
    bundle = SimpleNamespace(path=Path("y.reel"), total_bytes=10**6, plan=plan, signatures={("denoise", "video"): None}, has_weights=True)
    monkeypatch.setattr("reelstep.engine.build.build_bundle", lambda *_, **__: bundle)
    assert cli.main(["compile", "reel-tiny", "--sku", "b200", "--backend", "null"]) == 0
    assert capsys.readouterr().out.endswith("a plan alone: backend 'null' computes nothing; read it with `reelstep inspect y.reel`\n")


def test_compile_says_what_of_a_backend_nobody_has_seen_on_hardware(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan("toy", "1", "tensorrt", "b200", "sm100", {}, "bfloat16", "asked for", ())
    bundle = SimpleNamespace(path=Path("y.reel"), total_bytes=10**6, plan=plan, signatures={("denoise", "video"): None}, has_weights=True)
    monkeypatch.setattr("reelstep.engine.build.build_bundle", lambda *_, **__: bundle)
    assert cli.main(["compile", "reel-tiny", "--sku", "b200"]) == 0
    assert f"\n{NOT_RUN}\nleft to b200: " in capsys.readouterr().out
