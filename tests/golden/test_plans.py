"""Every choice of every plan is one that somebody read."""

from __future__ import annotations

import pytest

from reelstep.engine.models import MODELS
from reelstep.tests.golden.plans import GOLDEN, HERE, LARGE, Golden, difference, plan_text


@pytest.mark.parametrize("golden", [pytest.param(golden, marks=[pytest.mark.slow] * (golden.model == LARGE), id=str(golden)) for golden in GOLDEN])
def test_a_plan_is_the_one_that_was_agreed_on(golden: Golden) -> None:
    if found := difference(golden, plan_text(golden)):
        pytest.fail(found, pytrace=False)


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
