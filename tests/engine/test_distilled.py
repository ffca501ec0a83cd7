"""A student of few steps: its grids travel with it and are all that it runs, and what it would not heed is refused before any compute."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from reelstep.benchmarks.concurrency import run_all
from reelstep.engine.build import default_tables, load_fitted, menu_tables
from reelstep.engine.executors.inline import Inline
from reelstep.engine.loop import Engine
from reelstep.engine.models.reel_tiny_flash import SPEC
from reelstep.engine.models.spec import GRID, Distilled, ModelSettings
from reelstep.engine.request import Choice, Defaults
from reelstep.engine.resolve import Ask, resolve
from reelstep.engine.runner import Runner
from reelstep.engine.served import ServedModel, schedules_of
from reelstep.errors import ConfigError, InvalidRequest, NotFound
from reelstep.training.imagine_flash import StudentGrid

UNEVEN = {1: (0.0, 1.0), 3: (0.0, 0.1, 0.45, 1.0)}
"""No rule of the number of steps makes these."""


def served(settings: ModelSettings = SPEC.settings) -> ServedModel:
    return ServedModel(SPEC.name, SPEC.version, settings, schedules_of(settings), default_tables(settings))


def refused(**asked: object) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as caught:
        resolve(Ask("a fox", **asked), {SPEC.name: served()})  # type: ignore[arg-type]
    return {violation.field: violation.description for violation in caught.value.violations}


@pytest.fixture
def toy_student(closed_form):
    """Settings of the closed-form model, as a student on uneven grids."""
    settings, _, _ = closed_form
    defaults = {"text_to_video": Defaults("ddim", GRID, 3, 1.0, 8, 8.0, guidance="none")}
    return replace(settings, tasks=("text_to_video",), defaults=defaults, distilled=Distilled(UNEVEN, 3.0, "toy"))


def test_the_settings_survive_json_that_sorts_its_names(toy_student):
    again = ModelSettings.from_json(json.loads(json.dumps(toy_student.to_json(), sort_keys=True)))
    assert again == toy_student
    assert again.distilled is not None
    assert again.distilled.grids[3] == (0.0, 0.1, 0.45, 1.0)


def test_settings_of_a_bundle_that_knows_no_students_are_of_an_ordinary_model(closed_form):
    data = closed_form[0].to_json()
    assert data.pop("distilled") is None
    assert ModelSettings.from_json(data) == closed_form[0]


@pytest.mark.parametrize(
    ("grids", "scale", "says"),
    [
        ({}, 3.0, "at least one number of steps"),
        ({2: (0.0, 1.0)}, 3.0, "grid of 2 steps"),
        ({0: (0.0,)}, 3.0, "grid of 0 steps"),
        ({2: (0.0, 0.0, 1.0)}, 3.0, "increasing"),
        ({2: (0.1, 0.5, 1.0)}, 3.0, "from 0"),
        ({2: (0.0, 0.5, 0.9)}, 3.0, "to 1"),
        ({2: (0.0, float("nan"), 1.0)}, 3.0, "increasing"),
        ({1: (0.0, 1.0)}, 0.5, "at least 1"),
        ({1: (0.0, 1.0)}, float("nan"), "at least 1"),
    ],
)
def test_grids_that_no_student_can_run_are_refused(grids, scale, says):
    with pytest.raises(ConfigError, match=says):
        Distilled(grids, scale, "a teacher")


@pytest.mark.parametrize("changed", [{"steps": 2}, {"schedule": "linear"}, {"guidance": "cfg"}, {"scale": 3.0}])
def test_defaults_that_no_request_could_ask_for_are_refused(toy_student, changed):
    defaults = {"text_to_video": replace(toy_student.defaults["text_to_video"], **changed)}
    with pytest.raises(ConfigError, match="a distilled model has a number of steps out of 1, 3, schedule 'grid', guidance 'none' and scale 1"):
        replace(toy_student, defaults=defaults)


@pytest.mark.parametrize("steps", UNEVEN)
def test_a_table_is_the_grids_and_the_one_of_training(toy_student, steps):
    """On CondOT, DDIM is Euler's method: each velocity times the length of its step."""
    tables = default_tables(toy_student)
    assert set(tables) == {"ddim.grid.1", "ddim.grid.3"}
    table = tables[f"ddim.grid.{steps}"]
    lengths = [after - before for before, after in pairwise(UNEVEN[steps])]
    assert table.times == UNEVEN[steps]
    assert table.b[-1] == pytest.approx(lengths, abs=1e-15)
    assert table == StudentGrid("condot", UNEVEN[steps], gamma=None).table
    assert served(toy_student).table("ddim", GRID, steps) == table


def test_another_number_of_steps_has_no_table(toy_student):
    with pytest.raises(ConfigError, match="2 steps of a student that was distilled for 1, 3; take one of these"):
        served(toy_student).table("ddim", GRID, 2)


def test_it_offers_what_it_heeds_and_nothing_else():
    model = served()
    assert (model.solvers, model.schedules, model.guidance_rules, model.step_caches, model.fits) == (("ddim",), ("grid",), {"none": {}}, {}, {})


@pytest.mark.parametrize("steps", [None, *UNEVEN])
def test_a_request_runs_one_forward_a_step_on_the_grid(toy_student, closed_form, steps):
    """The exact velocity at t = 0.1, 0.45 leads to the target from any grid; the times asked show which."""
    _, programs, (target, _) = closed_form
    asked: list[float] = []

    def embed_time(inputs):
        asked.extend(inputs["t"].tolist())
        return programs["embed_time", "any"](inputs)

    own = {**programs, ("embed_time", "any"): embed_time}
    engine = Engine({"toy": replace(served(toy_student), name="toy")}, Inline({"toy": Runner(own, dict.fromkeys(own, 8))}))
    _, (result,) = run_all(engine, [resolve(Ask("a cat", steps=steps, seed=1), engine.models)], together=True)
    engine.close(0)
    assert asked == pytest.approx(UNEVEN[steps or 3][:-1], abs=1e-7)
    assert (result.usage.nfe, result.usage.forwards) == (steps or 3, steps or 3)
    assert torch.from_numpy(result.media.frames).float().sub((target + 1) * 127.5).abs().max() <= 1


@pytest.mark.parametrize(
    ("asked", "field", "says"),
    [
        ({"steps": 4}, "steps", "4: this model was distilled from 'reel-tiny' at scale 3 for 1, 2, 3 steps"),
        ({"steps": 0}, "steps", "0: .* for 1, 2, 3 steps"),
        ({"solver": "euler"}, "solver", "'euler': .* to be run by 'ddim'"),
        ({"solver": "no such"}, "solver", "'no such': .* to be run by 'ddim'"),
        ({"schedule": "linear"}, "schedule", "'linear': .* times of its own"),
        ({"guidance": "cfg"}, "guidance", "'cfg': .* at scale 3, so guidance is in its weights and inert here"),
        ({"guidance": "adaptive", "scale": 1.0}, "guidance", "'adaptive': .* inert here"),
        ({"scale": 3.0}, "scale", "3.0: .* inert here"),
        ({"scale": 0.0}, "scale", "0.0: .* inert here"),
        ({"scale": float("nan")}, "scale", "nan: .* inert here"),
        ({"guidance_options": {"rescale": 0.0}}, "guidance_options", "rescale.*: .* inert here"),
        ({"negative_prompt": "a dog"}, "negative_prompt", "never asks what it steers away from, so this is inert here"),
        ({"negative_prompt": " "}, "negative_prompt", "inert here"),
        ({"step_cache": "teacache"}, "step_cache", "'teacache': .* too little in common"),
    ],
)
def test_what_it_would_not_heed_is_refused_with_the_reason_and_the_way_out(asked, field, says):
    found = refused(**asked)
    assert list(found) == [field]
    assert "distilled from 'reel-tiny' at scale 3" in found[field]
    assert found[field].endswith("leave it out, or ask 'reel-tiny'")
    with pytest.raises(InvalidRequest, match=says):
        resolve(Ask("a fox", **asked), {SPEC.name: served()})


def test_all_of_it_is_refused_at_once():
    asked = {"solver": "heun", "schedule": "karras", "steps": 8, "scale": 7.5, "guidance": "cfg", "guidance_options": {"rescale": 0.5}}
    found = refused(**asked, negative_prompt="a dog", step_cache="first_block")
    assert set(found) == {"solver", "schedule", "steps", "scale", "guidance", "guidance_options", "negative_prompt", "step_cache"}


def test_a_long_name_is_not_repeated_in_full():
    assert len(refused(solver="x" * 10_000, step_cache="y" * 10_000)["solver"]) < 400


def test_its_own_choices_may_be_named_so_that_the_spec_of_an_answer_can_be_sent_again():
    first = resolve(Ask("a fox", seed=1), {SPEC.name: served()})
    asked = {"solver": first.solver, "schedule": first.schedule, "guidance": first.guidance, "scale": first.scale, "steps": first.steps}
    again = resolve(Ask("a fox", seed=1, request_id=first.id, **asked), {SPEC.name: served()})
    assert again == first
    assert (again.solver, again.schedule, again.steps, again.guidance, again.scale) == ("ddim", "grid", 3, "none", 1.0)


def test_an_ordinary_model_has_no_grid(closed_form):
    settings = closed_form[0]
    with pytest.raises(NotFound, match=r"unknown schedule 'grid'; known: .*linear"):
        resolve(Ask("a fox", schedule=GRID), {"toy": replace(served(settings), name="toy")})


MEASURED = {"psnr_db": 30.0, "ssim": 0.9, "frechet": None, "command": "none: these are for a test"}


def test_a_menu_of_a_student_names_its_steps_and_nothing_that_is_inert(toy_student):
    def with_menu(**entry):
        menu = {"draft": Choice(forwards=1.0, **entry, **MEASURED)}
        return served(replace(toy_student, defaults={"text_to_video": replace(toy_student.defaults["text_to_video"], menu=menu)}))

    assert set(menu_tables(with_menu(steps=1))) == {"ddim.grid.1"}
    assert resolve(Ask("a cat", quality="draft"), {SPEC.name: with_menu(steps=1)}).steps == 1
    for entry, says in (({"steps": 2}, "steps: 2: .* for 1, 3 steps"), ({"guidance": "cfg", "scale": 3.0}, "scale: 3.0: .*guidance: 'cfg': ")):
        with pytest.raises(ConfigError, match=f"'draft' in the menu of 'reel-tiny-flash' for text_to_video: {says}"):
            menu_tables(with_menu(**entry))


def test_nothing_that_was_fitted_goes_into_its_bundle(tmp_path):
    with pytest.raises(ConfigError, match=r"bns_8.json: 'reel-tiny-flash' is a student of few steps and no velocity field.*compile it without"):
        load_fitted([tmp_path / "bns_8.json"], SPEC, "0" * 64)
