"""`reelstep plan`: what is asked of the planner, and what is refused first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reelstep import __main__ as cli
from reelstep.compiler.planner import Workload
from reelstep.engine.commands import plan
from reelstep.engine.models import MODELS
from reelstep.tests.compiler.test_planner import MOVIE_GEN


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--plot", "plan.bmp"], "a plot 'plan.bmp'; its name ends in one of .png, .svg, .pdf"),
        (["--plot", "nowhere/plan.png"], "a plot 'nowhere/plan.png', and there is no folder nowhere; make it, or choose another"),
        (["--gpus", "99999999999999999999"], "--gpus 99999999999999999999; at most 65536"),
    ],
)
def test_what_a_plan_could_not_give_is_refused_before_it_is_made(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "planned_workload", lambda *_, **__: pytest.fail("it was planned"))
    assert cli.main(["plan", "movie-gen-30b", "--sku", "h200-sxm", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_the_command_plans_a_model_of_the_zoo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = {}

    def workload(args: object, guided: bool) -> Workload:
        asked["guided"] = guided
        return MOVIE_GEN

    monkeypatch.setattr(plan, "planned_workload", workload)
    assert cli.main(["plan", "movie-gen-30b", "--sku", "h200-sxm", "--gpus", "8", "--deadline", "60s", "--top", "3"]) == 0
    printed = capsys.readouterr().out
    assert "movie-gen-30b on 8 x h200-sxm" in printed
    assert "past the deadline of 60 s" in printed
    assert asked == {"guided": True}
    assert cli.main(["plan", "movie-gen-30b", "--sku", "h200-sxm", "--gpus", "8", "--nfe", "4", "--guidance", "none", "--json"]) == 0
    assert {choice["sampling"]["forwards"] for choice in json.loads(capsys.readouterr().out)["choices"]} == {4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["movie-gen-30b", "--sku", "h300"], "unknown SKU 'h300'; known: a100-80g, b200, cpu"),
        (["movie-gen-31b", "--sku", "b200"], "unknown model 'movie-gen-31b'"),
        (["movie-gen-30b", "--sku", "b200", "--solver", "heun", "--nfe", "5"], "NFE 5 of 'heun', which takes 2 a step; a positive multiple of 2"),
        (["movie-gen-30b", "--sku", "b200", "--gpus", "0"], "--gpus 0; a number above 0"),
        (["movie-gen-30b", "--sku", "b200", "--size", "770x768"], "size 770x768; movie-gen-30b needs sides that are multiples of 8 pixels"),
        (["reel-tiny", "--sku", "b200", "--frames", "9"], "at profile 'asked': 5 x 8 x 8 tokens; this model has positions for 4 x 8 x 8: take"),
        (["movie-gen-30b", "--sku", "b200", "--size", "24x24"], "at profile 'asked': patchify: patch (1, 2, 2) does not divide F, H, W = (32, 3, 3)"),
    ],
)
def test_a_mistake_is_told_before_any_work(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_menu_that_was_measured_is_what_is_planned() -> None:
    args = cli.build_parser().parse_args(["plan", "reel-tiny", "--sku", "b200"])
    samplings = plan.planned_samplings(MODELS["reel-tiny"].settings, args)
    assert [(s.solver, s.nfe, s.forwards) for s in samplings] == [("bns_4", 4, 8), ("bns_8", 8, 16), ("bns_16", 16, 32)]
    assert all("(reelstep bench steps)" in s.quality for s in samplings)
    assert all(s.pairs == s.nfe for s in samplings)
    picture = cli.build_parser().parse_args(["plan", "reel-tiny", "--sku", "b200", "--frames", "1"])
    assert {s.solver for s in plan.planned_samplings(MODELS["reel-tiny"].settings, picture)} == {"ab2"}
