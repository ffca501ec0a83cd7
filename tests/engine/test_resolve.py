"""From what was asked to what runs: the menu of qualities, defaults, and what is fitted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from io import BytesIO
from typing import Any

import pytest
from PIL import Image

from reelstep.engine.models.spec import ModelSettings
from reelstep.engine.request import Choice, Defaults, Fit, Request
from reelstep.engine.resolve import Ask, resolve
from reelstep.errors import ConfigError, InvalidRequest, NotFound
from reelstep.tests.engine.conftest import make_model
from reelstep.tests.engine.service.fake_engine import IMAGE, MENU, VIDEO, FakeModel, FakeSettings


def resolved(model: FakeModel | None = None, **asked: object) -> Request:
    return resolve(Ask("a fox", **asked), {"fake": model or FakeModel()})  # type: ignore[arg-type]


def sampling(request: Request) -> tuple[object, ...]:
    return request.solver, request.schedule, request.steps, request.guidance, request.guidance_options, request.scale


@pytest.mark.parametrize(
    ("quality", "expected"),
    [
        ("draft", ("bns_6", "linear", 6, "cfg", {"rescale": 0.0}, 2.5)),  # all of it from the fit
        ("standard", ("heun", "linear", 5, "gate", {"stop": 0.25}, 3.0)),  # schedule and scale from the task's defaults
        ("best", ("euler", "quadratic", 50, "cfg", {"rescale": 0.0}, 4.0)),
        ("", ("euler", "linear", 4, "cfg", {"rescale": 0.0}, 3.0)),
    ],
)
def test_a_quality_is_what_its_entry_says_and_what_that_leaves_open_is_the_fits_or_the_tasks(quality: str, expected: tuple[object, ...]) -> None:
    assert sampling(resolved(quality=quality)) == expected


def test_a_quality_leaves_all_that_is_not_sampling_to_the_request() -> None:
    request = resolved(quality="draft", seed=3, count=2, frames_per_second=12.0, preview_every=2, negative_prompt="a dog")
    assert (request.seed, request.count, request.frames_per_second, request.preview_every, request.negative_prompt) == (3, 2, 12.0, 2, "a dog")


@pytest.mark.parametrize(
    ("those", "asked"),
    [
        ("solver", {"solver": "euler"}),
        ("solver", {"solver": "bns_6"}),  # even what the entry has
        ("schedule", {"schedule": "linear"}),
        ("steps", {"steps": 6}),
        ("steps", {"steps": 0}),
        ("the guidance scale", {"scale": 2.5}),
        ("the guidance scale", {"scale": 0.0}),
        ("the guidance rule", {"guidance": "cfg"}),
        ("the rule's options", {"guidance_options": {"rescale": 0.0}}),
        ("steps, the guidance scale", {"steps": 6, "scale": 2.0}),
    ],
)
def test_a_quality_beside_a_choice_of_its_own_is_refused_and_says_what_to_leave_out(those: str, asked: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolved(quality="draft", **asked)
    (violation,) = caught.value.violations
    assert violation.field == "quality"
    assert violation.description.endswith(f"leave quality out, or else {those}")


def test_a_quality_that_the_menu_lacks_is_refused_with_those_that_it_has_in_order_of_cost() -> None:
    for quality in ("ultra", "Draft"):
        with pytest.raises(NotFound, match=rf"'fake' has no quality '{quality}' for text_to_video; it has: draft, standard, best;"):
            resolved(quality=quality)
    with pytest.raises(NotFound, match="no quality 'draft' for text_to_image; it has: none;"):
        resolved(quality="draft", frames=1)
    few = FakeModel(settings=FakeSettings(defaults={"text_to_video": replace(VIDEO, menu={"best": MENU["best"], "draft": MENU["draft"]})}))
    with pytest.raises(NotFound, match="it has: draft, best;"):
        resolved(few, quality="standard")


def test_auto_leaves_the_whole_menu_open_with_one_seed_and_one_id() -> None:
    request = resolved(quality="auto", count=2)
    assert list(request.auto) == ["draft", "standard", "best"]
    for quality in request.auto:
        settled = request.settled(quality)
        assert settled == replace(resolved(quality=quality, count=2), id=request.id, seed=request.seed)
    assert sampling(request) == sampling(resolved(quality="draft")), "the cheapest stands for it"
    assert request.settled("best").settled("draft") == request.settled("best"), "it is chosen once"


def test_auto_may_become_only_what_the_rest_of_the_request_goes_with() -> None:
    assert list(resolved(quality="auto", lora={"neon": 1.0}).auto) == ["standard", "best"], "the draft's solver is fitted to the model without a LoRA"
    assert list(resolved(quality="auto", lora={"neon": 0.0}).auto) == ["draft", "standard", "best"]
    animated = resolved(quality="auto", image=picture())
    assert list(animated.auto) == ["standard", "best"], "the draft's solver was fitted for videos from words"
    assert animated.image is not None
    fitted = FakeModel(settings=FakeSettings(defaults={"text_to_video": replace(VIDEO, menu={"draft": MENU["draft"]})}))
    with pytest.raises(InvalidRequest, match="lora: quality 'draft' names 'bns_6', fitted to 'fake' without a LoRA"):
        resolved(fitted, quality="auto", lora={"neon": 1.0})


def test_auto_is_refused_where_any_quality_is_and_once_for_what_is_wrong_with_all_of_the_menu() -> None:
    with pytest.raises(InvalidRequest, match=r"quality: 'auto' chooses .* leave quality out, or else steps, the guidance scale$"):
        resolved(quality="auto", steps=6, scale=2.0)
    with pytest.raises(NotFound, match="'fake' has no quality 'auto' for text_to_image; it has: none;"):
        resolved(quality="auto", frames=1)
    with pytest.raises(InvalidRequest) as caught:
        resolved(quality="auto", count=99)
    assert [violation.field for violation in caught.value.violations] == ["count"]


@pytest.mark.parametrize(
    ("field", "asked"),
    [
        ("guidance_options", {"guidance": "adaptive", "guidance_options": {"threshold": math.nan}}),
        ("guidance_options", {"guidance": "adaptive", "guidance_options": {"treshold": 0.5}}),
        ("guidance_options", {"guidance": "interval", "guidance_options": {"start": 0.8, "stop": 0.2}}),
        ("scale", {"guidance": "none", "scale": 3.0}),
        ("step_cache_options", {"step_cache": "first_block", "step_cache_options": {"threshold": math.nan}, "steps": 20}),
        ("step_cache_options", {"step_cache": "first_block", "step_cache_options": {"last": 30.0}, "steps": 20}),
        ("step_cache", {"step_cache": "first_block", "steps": 1}),
    ],
)
def test_what_a_rule_refuses_is_told_of_the_field_that_it_came_in(field: str, asked: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        resolve(Ask("a cat", **asked), {"toy": make_model()})
    assert [violation.field for violation in caught.value.violations] == [field]


def picture() -> bytes:
    out = BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    return out.getvalue()


def test_a_quality_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="quality: is not UTF-8"):
        resolved(quality="caf\udce9")


def test_explicit_choices_and_defaults_are_as_they_were_on_a_model_with_a_menu() -> None:
    assert sampling(resolved(solver="heun", steps=7)) == ("heun", "linear", 7, "cfg", {"rescale": 0.0}, 3.0)
    assert sampling(resolved(guidance="none"))[-1] == 1.0
    assert sampling(resolved(solver="bns_6")) == ("bns_6", "linear", 6, "cfg", {"rescale": 0.0}, 2.5)


def test_a_fit_that_is_asked_for_leads_over_one_that_is_the_default() -> None:
    fits = {
        "bns_6": Fit(("text_to_video",), "bns_6", "", 6, "cfg", {"rescale": 0.0}, 2.5),
        "linear_8": Fit(("text_to_video",), "heun", "quadratic", 8, "linear_8", {}, 3.5),
    }
    rules: dict[str, dict[str, float]] = {"none": {}, "cfg": {"rescale": 0.0}, "linear_8": {}}
    settings = FakeSettings(defaults={"text_to_video": replace(VIDEO, solver="bns_6", steps=6, scale=2.5)})
    model = FakeModel(settings=settings, fits=fits, guidance_rules=rules)
    assert sampling(resolved(model)) == ("bns_6", "linear", 6, "cfg", {"rescale": 0.0}, 2.5)
    assert sampling(resolved(model, guidance="linear_8")) == ("heun", "quadratic", 8, "linear_8", {}, 3.5)
    with pytest.raises(InvalidRequest, match="guidance: 'linear_8', but 'bns_6' was fitted with 'cfg'"):
        resolved(model, solver="bns_6", guidance="linear_8")


@pytest.mark.parametrize(
    "changed",
    [{"forwards": 0.0}, {"psnr_db": float("inf")}, {"ssim": 1.5}, {"ssim": float("nan")}, {"frechet": -1.0}, {"frechet": float("nan")}, {"command": " "}],
)
def test_an_entry_of_numbers_that_nobody_can_have_measured_is_refused(changed: dict[str, float | str]) -> None:
    with pytest.raises(ConfigError, match="measured"):
        replace(MENU["draft"], **changed)  # type: ignore[arg-type]


def test_a_menu_has_the_three_names_and_rises_in_cost() -> None:
    with pytest.raises(ConfigError, match="entries for turbo; what it may have is: draft, standard, best"):
        replace(IMAGE, menu={"turbo": MENU["draft"]})
    with pytest.raises(ConfigError, match="draft, best cost 100, 12 forwards"):
        replace(IMAGE, menu={"draft": MENU["best"], "best": MENU["draft"]})
    assert replace(IMAGE, menu={"best": MENU["draft"], "draft": MENU["draft"]}).qualities == ("draft", "best"), "an equal cost is in order"


def test_a_menu_survives_json_that_sorts_its_names() -> None:
    entry = Choice(solver="bns_6", guidance_options={"rescale": 0.5}, forwards=12.0, psnr_db=31.25, ssim=0.9, frechet=None, command="a bench")
    full = Choice(solver="ab2", schedule="shifted", steps=9, scale=2.0, forwards=18.5, psnr_db=36.0, ssim=1.0, frechet=0.0, command="a bench")
    defaults = {"text_to_video": Defaults("euler", "linear", 4, 1.0, 8, 8.0, menu={"standard": full, "draft": entry}), "text_to_image": IMAGE}
    settings = ModelSettings(
        tasks=("text_to_video",), limits=FakeSettings().limits, defaults=defaults, path="condot", prediction="velocity", latent_channels=3,
        condition_channels=3, spatial_stride=8, temporal_stride=2, text_length=32, tile_frames=2, tile_overlap=1,
    )  # fmt: skip
    again = ModelSettings.from_json(json.loads(json.dumps(settings.to_json(), sort_keys=True)))
    assert again == settings
    assert again.defaults["text_to_video"].qualities == ("draft", "standard")
    assert again.defaults["text_to_video"].menu["draft"].frechet is None
