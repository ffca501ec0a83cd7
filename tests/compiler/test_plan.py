from __future__ import annotations

import json
from dataclasses import replace

import pytest

from reelstep.compiler.bundle import Bundle
from reelstep.compiler.plan import Plan
from reelstep.errors import BundleError


def test_a_plan_survives_json(bundle: Bundle) -> None:
    again = Plan.from_json(json.loads(json.dumps(bundle.plan.to_json())))
    assert again == bundle.plan
    assert again.hash == bundle.plan.hash


def test_a_choice_changes_the_hash_and_shows_in_the_diff(bundle: Bundle) -> None:
    other = replace(bundle.plan, precision="bfloat16", precision_reason="asked for")
    assert other.hash != bundle.plan.hash
    assert "+precision bfloat16: asked for" in bundle.plan.diff(other)
    assert not bundle.plan.diff(bundle.plan)


def test_the_explanation_gives_every_choice_and_why(bundle: Bundle) -> None:
    text = replace(bundle.plan, precision="bfloat16").explain()
    for words in ("backend eager", "precision bfloat16: ", "batch 1..5", "precision float32: kept", "passes functionalise", bundle.plan.programs[0].graph_hash):
        assert words in text


def test_a_plan_with_a_missing_or_unknown_field_is_refused(bundle: Bundle) -> None:
    data = bundle.plan.to_json()
    for wrong in ({**data, "colour": 1}, {k: v for k, v in data.items() if k != "mesh"}):
        with pytest.raises(BundleError, match="not a plan"):
            Plan.from_json(wrong)
