"""Artifacts of fitted solvers: exact both ways, and refused when they are damaged or for another model."""

from __future__ import annotations

import json
import math

import pytest

from reelstep.engine.request import Fit
from reelstep.engine.samplers.fitted import Fitted
from reelstep.engine.samplers.ns import Table
from reelstep.errors import ConfigError

TABLE = Table("bns", "condot", 1, (0.0, 1 / 3, 1.0), (1.0, 1 + 2e-16), ((1 / 3,), (0.1, 0.2)))
FITTED = Fitted("bns_2", "bns", "toy", "abc", Fit(("text_to_video",), 2, "cfg", {"rescale": 0.0}, 3.0), TABLE, {"seed": 0}, {"bns_2": 41.5, "midpoint": 20.0})


def test_an_artifact_is_the_same_after_json():
    assert Fitted.from_json(json.loads(json.dumps(FITTED.to_json()))) == FITTED


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("table"),
        lambda data: data.update(version=0),
        lambda data: data.update(more=1),
        lambda data: data["table"].update(times=[0.0, 0.7, 0.6]),
        lambda data: data["table"].update(a=[1.0, math.nan]),
        lambda data: data["fit"].update(steps=3),
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
    with pytest.raises(ConfigError, match="not a fitted solver"):
        Fitted.from_json(data)


def test_an_artifact_is_for_one_model_and_its_weights():
    FITTED.check_model("toy", "abc")
    with pytest.raises(ConfigError, match="model 'toy', not to 'other'"):
        FITTED.check_model("other", "abc")
    with pytest.raises(ConfigError, match="other weights"):
        FITTED.check_model("toy", "abd")
