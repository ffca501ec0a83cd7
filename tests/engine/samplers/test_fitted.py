"""Artifacts of fitted solvers: exact both ways, and refused when they are damaged or for another model."""

from __future__ import annotations

import json
import math

import pytest

from reelstep.engine.request import Fit
from reelstep.engine.samplers.fitted import Fitted, RuleOptions
from reelstep.engine.samplers.linear_ag import LinearAG
from reelstep.engine.samplers.ns import Table
from reelstep.engine.samplers.step_cache import CacheOptions
from reelstep.errors import ConfigError

TABLE = Table("bns", "condot", 1, (0.0, 1 / 3, 1.0), (1.0, 1 + 2e-16), ((1 / 3,), (0.1, 0.2)))
FIT = Fit(("text_to_video",), "bns_2", "", 2, "cfg", {"rescale": 0.0}, 3.0)
FITTED = Fitted("bns_2", "bns", "toy", "abc", FIT, TABLE, {"seed": 0}, {"bns_2": 41.5, "midpoint": 20.0})
LINEAR = Fitted(
    "linear_2", "linear_ag", "toy", "abc", Fit(("text_to_video",), "euler", "linear", 2, "linear_2", {}, 3.0),
    LinearAG("CL", ((), (-0.1, 1.0)), ((), (1 / 7,)), 3.0, "a" * 64, 1e-8, 5, (1.0, 0.99)), {}, {"linear_2": 30.0},
)  # fmt: skip
OPTIONS = Fitted("adaptive", "adaptive-guidance", "toy", "abc", FIT, RuleOptions("adaptive", {"threshold": 0.9, "guided": 2.0}), {}, {"adaptive": 30.0})


SKIPPING = Fitted("teacache", "step-cache", "toy", "abc", FIT, CacheOptions("teacache", {"threshold": 0.1, "c1": 1 / 3}), {}, {"teacache": 33.0})


@pytest.mark.parametrize("fitted", [FITTED, LINEAR, OPTIONS, SKIPPING])
def test_an_artifact_is_the_same_after_json(fitted):
    assert Fitted.from_json(json.loads(json.dumps(fitted.to_json()))) == fitted


@pytest.mark.parametrize(
    ("fitted", "damage"),
    [
        (LINEAR, lambda data: data["fit"].update(scale=4.0)),
        (LINEAR, lambda data: data["artifact"].update(policy="LL")),
        (OPTIONS, lambda data: data["artifact"]["options"].update(threshold=3.0)),
        (OPTIONS, lambda data: data["artifact"].update(rule="gone")),
        (OPTIONS, lambda data: data["artifact"].update(rule="adaptive_x1")),
        (SKIPPING, lambda data: data["artifact"]["options"].update(threshold=-1.0)),
        (SKIPPING, lambda data: data["artifact"].update(rule="first_block")),
        (SKIPPING, lambda data: data.update(kind="options")),
    ],
)
def test_damaged_guidance_is_refused(fitted, damage):
    data = json.loads(json.dumps(fitted.to_json()))
    damage(data)
    with pytest.raises(ConfigError):
        Fitted.from_json(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("artifact"),
        lambda data: data.update(version=0),
        lambda data: data.update(more=1),
        lambda data: data["artifact"].update(times=[0.0, 0.7, 0.6]),
        lambda data: data["artifact"].update(a=[1.0, math.nan]),
        lambda data: data["fit"].update(steps=3),
        lambda data: data["fit"].update(solver="bns_3"),
        lambda data: data.update(kind="guidance"),
        lambda data: data.update(kind="else"),
        lambda data: data["fit"].pop("scale"),
        lambda data: data.update(scores_db={}),
    ],
)
def test_a_damaged_artifact_is_refused(damage):
    data = json.loads(json.dumps(FITTED.to_json()))
    damage(data)
    with pytest.raises(ConfigError):
        Fitted.from_json(data)


@pytest.mark.parametrize("data", [None, [], 3, "table"])
def test_what_is_no_artifact_is_refused(data):
    with pytest.raises(ConfigError, match="not a fit"):
        Fitted.from_json(data)


def test_an_artifact_is_for_one_model_and_its_weights():
    FITTED.check_model("toy", "abc")
    with pytest.raises(ConfigError, match="model 'toy', not to 'other'"):
        FITTED.check_model("other", "abc")
    with pytest.raises(ConfigError, match="other weights"):
        FITTED.check_model("toy", "abd")
