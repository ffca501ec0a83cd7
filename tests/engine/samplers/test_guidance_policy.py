"""Policies of guidance: what each evaluation asks for, costs and gives; what they are bound to; how a bundle takes and offers them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from reelstep.engine.build import load_fitted
from reelstep.engine.models import MODELS
from reelstep.engine.request import Fit
from reelstep.engine.resolve import Ask, resolve
from reelstep.engine.samplers.fitted import Fitted
from reelstep.engine.samplers.guidance import GUIDANCE, GuidanceState, guided
from reelstep.engine.samplers.guidance_policy import GuidancePolicy
from reelstep.engine.samplers.ns import drive, sample, start
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.schedules import linear
from reelstep.engine.samplers.tables import SOLVERS
from reelstep.engine.served import ServedModel
from reelstep.errors import ConfigError, InvalidRequest

SCALE, CONDOT = 3.0, PATHS["condot"]
TABLE = SOLVERS["euler"].build(linear(6), CONDOT)
NOISE = torch.from_numpy(np.random.default_rng(0).standard_normal((4, 5)))
FIT = Fit(("text_to_video",), "euler", "linear", 6, "policy_6", {}, SCALE)


def policy(*scales, table=TABLE):
    return GuidancePolicy(scales, SCALE, table.hash, 8)


def fitted(made, model="toy", fit=FIT):
    return Fitted("policy_6", "policy", model, "0" * 64, fit, made, {"forwards": made.forwards}, {"policy_6": 30.0})


MIXED = policy(0.0, 3.0, 1.5, 1.0, 6.0, 1.0)


def network(x, t, branches):
    return tuple(torch.cos(2 * x) * (1 + t) if name == "text" else torch.sin(x) - t for name in branches)


def run(rule, table=TABLE, asked=None):
    def heard(x, t, branches):
        if asked is not None:
            asked.append(branches)
        return network(x, t, branches)

    state = GuidanceState()
    return drive(guided(sample(table, start(table, NOISE)), rule, state), heard), state


def test_each_evaluation_has_a_scale_of_its_own_and_asks_for_what_that_needs():
    asked = []
    got, state = run(MIXED.rule(), asked=asked)
    x = NOISE.numpy()
    for j, s in enumerate((0.0, 3.0, 1.5, 1.0, 6.0, 1.0)):
        text, null = np.cos(2 * x) * (1 + j / 6), np.sin(x) - j / 6
        x = x + (null + s * (text - null)) / 6
    np.testing.assert_allclose(got.numpy(), x, rtol=0, atol=1e-12)
    assert asked == [("null",), ("text", "null"), ("text", "null"), ("text",), ("text", "null"), ("text",)]
    assert (state.nfe, state.forwards, MIXED.forwards, state.memory) == (6, 9, 9, {})


@pytest.mark.parametrize(
    ("scales", "rule", "scale", "options"),
    [
        ((3.0,) * 6, "cfg", SCALE, {}),
        ((1.0,) * 6, "none", 1.0, {}),
        ((0.0,) * 6, "cfg", 0.0, {}),
        ((1.0, 3.0, 3.0, 1.0, 1.0, 1.0), "interval", SCALE, {"start": 0.1, "stop": 0.5}),
    ],
)
def test_policies_that_are_another_rule_are_it_bit_for_bit(scales, rule, scale, options):
    got, state = run(policy(*scales).rule())
    want, counts = run(GUIDANCE[rule].build(scale, CONDOT, options))
    assert torch.equal(got, want)
    assert (state.nfe, state.forwards) == (counts.nfe, counts.forwards)


@pytest.mark.parametrize("stop", range(6))
def test_a_run_saved_at_any_query_continues_bit_for_bit(stop, interrupted):
    whole, counts = run(MIXED.rule())
    got, guidance = interrupted(TABLE, NOISE, MIXED.rule(), network, stop)
    assert torch.equal(got, whole)
    assert guidance == counts


def test_one_more_evaluation_than_it_has_is_refused():
    with pytest.raises(ConfigError, match="a state of its own"):
        next(MIXED.rule()(NOISE, 0.5, GuidanceState(nfe=6)))


def test_it_is_for_its_own_table_and_scale_only():
    MIXED.check(TABLE, SCALE)
    for table, scale in ((SOLVERS["ab2"].build(linear(6), CONDOT), SCALE), (SOLVERS["euler"].build(linear(5), CONDOT), SCALE), (TABLE, 4.0)):
        with pytest.raises(ConfigError, match="fit it again"):
            MIXED.check(table, scale)
    with pytest.raises(ConfigError, match="of 2 evaluations"):
        policy(1.0, 3.0).check(TABLE, SCALE)


def test_json_keeps_every_bit():
    odd = policy(0.1 + 0.2, 1 + 2**-52, 1 / 3)
    assert odd.forwards == 6, "nearly 1 is not 1"
    assert GuidancePolicy.from_json(json.loads(json.dumps(odd.to_json()))) == odd
    assert Fitted.from_json(json.loads(json.dumps(fitted(MIXED).to_json()))) == fitted(MIXED)
    assert fitted(MIXED).to_json()["kind"] == "policy"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"scales": []}, "one finite number"),
        ({"scales": [1.0, -0.5]}, "one finite number"),
        ({"scales": [1.0, math.nan]}, "one finite number"),
        ({"scales": [1.0, math.inf]}, "one finite number"),
        ({"scales": ["much"]}, "not a number"),
        ({"scales": None}, "not a number"),
        ({"scale": 1.0}, "a finite scale above 1"),
        ({"scale": math.inf}, "a finite scale above 1"),
        ({"pairs": 0}, "at least one pair"),
        ({"table": ""}, "a table's hash"),
        ({"gamma": 1.0}, "has the fields"),
    ],
)
def test_a_damaged_policy_is_refused(change, match):
    with pytest.raises(ConfigError, match=match):
        GuidancePolicy.from_json({**MIXED.to_json(), **change})


@pytest.mark.parametrize("change", [{"fit": {**vars(FIT), "scale": 4.0}}, {"fit": {**vars(FIT), "guidance": "cfg"}}, {"scores_db": {}}, {"kind": "guidance"}])
def test_an_artifact_that_contradicts_itself_is_refused(change):
    with pytest.raises(ConfigError):
        Fitted.from_json({**json.loads(json.dumps(fitted(MIXED).to_json())), **change})


@pytest.mark.parametrize(("change", "match"), [({}, ""), ({"steps": 5}, "fitted to solver table"), ({"solver": "ab2"}, "fitted to solver table")])
def test_a_bundle_takes_it_for_its_table_only(change, match, tmp_path):
    spec = MODELS["reel-tiny"]
    file = tmp_path / "policy_6.json"
    file.write_text(json.dumps(fitted(MIXED, "reel-tiny", Fit(**{**vars(FIT), **change})).to_json()))
    if not match:
        assert set(load_fitted([file], spec, "0" * 64)) == {"policy_6"}
        return
    with pytest.raises(ConfigError, match=match):
        load_fitted([file], spec, "0" * 64)


def test_a_request_that_names_it_gets_its_steps_and_scale_and_no_other(closed_form):
    served = ServedModel("toy", "1", closed_form[0], ("linear",), {}, {"policy_6": fitted(MIXED)})
    assert served.fits == {"policy_6": FIT}
    assert served.guidance_rules["policy_6"] == {}
    assert "policy_6" not in served.solvers
    request = resolve(Ask("a cat", guidance="policy_6"), {"toy": served})
    assert (request.solver, request.schedule, request.steps, request.scale, request.guidance) == ("euler", "linear", 6, SCALE, "policy_6")
    got, _ = run(served.rule(request.guidance, request.scale, request.guidance_options))
    assert torch.equal(got, run(MIXED.rule())[0])
    for other in ({"steps": 5}, {"scale": 4.0}, {"solver": "ab2"}, {"guidance_options": {"rescale": 0.5}}):
        with pytest.raises(InvalidRequest):
            resolve(Ask("a cat", guidance="policy_6", **other), {"toy": served})
