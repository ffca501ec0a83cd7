"""Every choice of every plan is one that somebody read."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from reelstep.__main__ import main
from reelstep.engine.models import MODELS
from reelstep.kernels.jit import HAS_TRITON
from reelstep.parallel.mesh import Mesh
from reelstep.tests.golden.plans import BEST_OF_EIGHT, GOLDEN, HERE, KEPT, LARGE, Golden, difference, plan_text


def marked(golden: Golden) -> list[pytest.MarkDecorator]:
    triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton, of the version in constraints.txt")
    return [pytest.mark.slow] * (golden.model == LARGE) + [triton] * (golden in KEPT)


@pytest.mark.parametrize("golden", [pytest.param(golden, marks=marked(golden), id=str(golden)) for golden in GOLDEN])
def test_a_plan_is_the_one_that_was_agreed_on(golden: Golden) -> None:
    if found := difference(golden, plan_text(golden)):
        pytest.fail(found, pytrace=False)


@pytest.mark.slow
@pytest.mark.parametrize("sku", sorted({golden.sku for golden in GOLDEN if golden.mesh}))
def test_the_mesh_is_the_one_that_the_planner_ranks_first(sku: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", LARGE, "--sku", sku, "--gpus", "8", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)["choices"][0]
    assert best["mesh"] == asdict(Mesh.parse(BEST_OF_EIGHT))


def test_every_model_has_a_plan_and_every_file_is_of_one() -> None:
    assert {golden.model for golden in GOLDEN} == {*MODELS}
    assert {path.name for path in HERE.glob("*.txt")} == {golden.path.name for golden in GOLDEN}


def test_a_changed_choice_shows_as_its_line_with_the_command_that_keeps_it() -> None:
    golden = GOLDEN[0]
    kept = golden.path.read_text()
    found = difference(golden, kept.replace("backend null", "backend eager"))
    assert "-backend null\n+backend eager\n" in found
    assert f"`python -P -m reelstep.tests.golden.plans {golden.model}` rewrites it" in found
    assert difference(golden, kept) == ""
