"""`reelstep fit` on the shipped model, as small as it goes: from the command line to an artifact that a bundle takes."""

from __future__ import annotations

import json

import pytest
import torch

from reelstep.__main__ import main
from reelstep.engine.build import build_bundle, load_fitted
from reelstep.engine.models import MODELS
from reelstep.engine.models.spec import hash_weights
from reelstep.engine.request import Fit
from reelstep.engine.samplers.fitted import Fitted
from reelstep.engine.samplers.step_cache import STEP_CACHES
from reelstep.errors import ConfigError
from reelstep.training.fits import FITS
from reelstep.training.model_field import ModelFields
from reelstep.training.zoo.stickers import prompts

SMALL = ["--pairs", "2", "--scale", "2", "--task", "text_to_image"]
OWN = {
    "bns": ["--nfe", "2", "--tolerance", "0.3", "--iterations", "2", "--batch", "2"],
    "bespoke": ["--nfe", "2", "--tolerance", "0.3", "--iterations", "1"],
    "adaptive-guidance": ["--steps", "4"],
    "linear-ag": ["--steps", "4"],
    "policy": ["--steps", "4", "--iterations", "1", "--trials", "1"],
    "step-cache": ["--solver", "euler", "--steps", "4", "--skip", "0.25"],
}


@pytest.fixture(scope="module")
def fit(tmp_path_factory):
    """Runs `reelstep fit NAME` once, and gives the artifact's file."""
    folder = tmp_path_factory.mktemp("fit")
    (folder / "prompts.txt").write_text("a cat grows\n\na red heart\n")
    made = {}

    def run(name):
        if name not in made:
            made[name] = folder / f"{name.replace('-', '_')}_2.json"
            cache = ["--cache", str(folder)] if "--iterations" in OWN[name] else []
            prompts = ["--prompts", str(folder / "prompts.txt")]
            assert main(["fit", name, "reel-tiny", "-o", str(made[name]), *SMALL, *OWN[name], *cache, *prompts]) == 0
        return made[name]

    return run


@pytest.fixture
def fitted(fit):
    return fit("bns")


@pytest.mark.parametrize("name", list(FITS))
def test_every_fit_writes_an_artifact_of_this_model_and_a_plot(fit, name):
    file = fit(name)
    artifact = Fitted.from_json(json.loads(file.read_text()))
    artifact.check_model("reel-tiny", hash_weights(MODELS["reel-tiny"].build()))
    assert artifact.scores_db[artifact.name] > 0
    assert file.with_suffix(".png").stat().st_size > 5000
    assert load_fitted([file], MODELS["reel-tiny"], artifact.model_hash)


def test_a_fitted_solver_scores_beside_plain_ones(fitted):
    artifact = Fitted.from_json(json.loads(fitted.read_text()))
    assert artifact.fit == Fit(("text_to_image",), "bns_2", "", 2, "cfg", {"rescale": 0.0}, 2.0)
    assert artifact.scores_db["bns_2"] >= artifact.scores_db["start"]
    assert {"euler.linear", "midpoint.linear", "heun.linear"} <= artifact.scores_db.keys()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"model_hash": "0" * 64}, "other weights"),
        ({"model": "wan"}, "fitted to model 'wan'"),
        ({"name": "euler"}, "is there already"),
        ({"version": 9}, "version"),
    ],
)
def test_an_artifact_that_is_not_for_this_model_never_enters_a_bundle(fitted, tmp_path, damage, message):
    data = json.loads(fitted.read_text()) | damage
    if "name" in damage:
        data["scores_db"]["euler"] = 1.0
        data["fit"]["solver"] = "euler"
    (tmp_path / "bad.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=message):
        build_bundle("reel-tiny", backend="null", precision=None, out=tmp_path / "b.reel", cache=None, fitted=[tmp_path / "bad.json"])
    (tmp_path / "cut.json").write_text(fitted.read_text()[:200])
    with pytest.raises(ConfigError, match=r"cut\.json"):
        build_bundle("reel-tiny", backend="null", precision=None, out=tmp_path / "b.reel", cache=None, fitted=[tmp_path / "cut.json"])
    assert not (tmp_path / "b.reel").exists()


def test_a_step_cache_is_calibrated_beside_fewer_steps_and_goes_into_a_bundle_with_pieces_only(fit, tmp_path):
    artifact = Fitted.from_json(json.loads(fit("step-cache").read_text()))
    assert artifact.name == "teacache"
    assert artifact.artifact.options.keys() == STEP_CACHES["teacache"].options.keys()
    assert artifact.artifact.options["threshold"] > 0
    assert artifact.scores_db.keys() == {"teacache", "euler, 3 steps"}
    with pytest.raises(ConfigError, match="compile with --step-cache"):
        build_bundle("reel-tiny", backend="null", precision=None, out=tmp_path / "b.reel", cache=None, fitted=[fit("step-cache")])


def test_a_model_in_one_piece_has_no_step_cache_to_fit(tmp_path, capsys):
    assert main(["fit", "step-cache", "dit-mid", "-o", str(tmp_path / "a.json")]) == 2
    assert "does not come in the pieces" in capsys.readouterr().err


@pytest.mark.parametrize("data", [b"GIF89a" + bytes(range(128, 256)) * 100, b"a cat", b"[" * 200_000])
def test_a_file_that_is_no_json_is_refused_in_a_line_without_what_is_in_it(tmp_path, data):
    (tmp_path / "cat.gif").write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        load_fitted([tmp_path / "cat.gif"], MODELS["reel-tiny"], "0" * 64)
    assert str(caught.value) == f"{tmp_path / 'cat.gif'} is not a JSON file; `reelstep fit` writes such a file"


@pytest.mark.parametrize("damage", [{"steps": 5}, {"schedule": "karras"}, {"solver": "gone"}])
def test_linear_ag_enters_a_bundle_only_for_the_solver_table_it_was_fitted_to(fit, tmp_path, damage):
    data = json.loads(fit("linear-ag").read_text())
    data["fit"].update(damage)
    (tmp_path / "bad.json").write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=r"fitted to solver table|unknown solver"):
        load_fitted([tmp_path / "bad.json"], MODELS["reel-tiny"], data["model_hash"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--guidance", "adaptive"], "depends on what came before"),
        (["--guidance", "none", "--scale", "3"], "no scale"),
        (["--scale", "-1"], "scale -1"),
        (["--pairs", "1"], "at least 2"),
        (["--prompts", "missing.txt"], "cannot read prompts"),
        (["--nfe", "0"], "at least 1"),
        (["-o", "no/such/folder/a.json"], "make it first"),
    ],
)
def test_a_fit_that_cannot_be_is_refused_before_any_work(change, message, tmp_path, capsys):
    arguments = ["fit", "bns", "reel-tiny", "-o", str(tmp_path / "a.json"), "--cache", str(tmp_path / "cache"), *SMALL, *OWN["bns"], *change]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_guidance_is_not_fitted_where_there_is_none_to_save(tmp_path, capsys):
    assert main(["fit", "adaptive-guidance", "reel-tiny", "-o", str(tmp_path / "a.json"), "--task", "animate_sticker"]) == 2
    assert "animate_sticker at scale 1 has no guidance to save; give --scale" in capsys.readouterr().err


def test_nothing_is_fitted_to_a_student_and_its_teacher_is_named(tmp_path, capsys):
    assert main(["fit", "bns", "reel-tiny-flash", "-o", str(tmp_path / "a.json"), "--cache", str(tmp_path / "cache"), *SMALL, *OWN["bns"]]) == 2
    assert "fit 'reel-tiny', its teacher" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_a_models_field_is_its_guided_network_with_gradients_in_state_and_time():
    spec = MODELS["reel-tiny"]
    module = spec.build()
    fields = ModelFields.of(spec, module, Fit(("text_to_image",), "", "", 4, "cfg", {"rescale": 0.0}, 3.0), ["a cat", "a dog grows"])
    x, t = fields.noise(5).requires_grad_(), torch.tensor(0.3, requires_grad=True)
    u = fields(torch.tensor([0, 1]))(x, t)
    modulation, condition = module.denoiser.time(t.reshape(1)), torch.zeros_like(x)
    text, null = (module.denoiser(x, modulation.expand(2, -1, -1), condition, fields.contexts[name]) for name in ("text", "null"))
    assert torch.allclose(u, null + 3.0 * (text - null), atol=1e-4)
    gradients = torch.autograd.grad(u.square().sum(), (x, t))
    assert all(bool(g.any()) for g in gradients)
    assert torch.equal(fields(torch.tensor([1]))(x[1:], t), fields(torch.tensor([1]))(x[1:], t))


def test_prompts_are_different_and_a_function_of_their_seed():
    one = prompts(130, 0)
    assert len(set(one)) == 130
    assert prompts(130, 0) == one
    assert prompts(130, 1) != one


def test_a_new_calibration_takes_the_place_of_the_one_that_the_model_ships_with(tmp_path):
    spec = MODELS["reel-tiny"]
    own = next(file for file in spec.fitted if file.name == "reel-tiny.adaptive.json")
    data = json.loads(own.read_text())
    data["artifact"]["options"]["threshold"] = 0.5
    (tmp_path / "mine.json").write_text(json.dumps(data))
    made = load_fitted([*spec.fitted, tmp_path / "mine.json"], spec, data["model_hash"])
    assert len(made) == len(spec.fitted)
    assert made["adaptive"].artifact.options["threshold"] == 0.5
    with pytest.raises(ConfigError, match="is there already"):
        load_fitted([*spec.fitted, tmp_path / "mine.json", tmp_path / "mine.json"], spec, data["model_hash"])


def test_a_name_that_comes_with_the_model_is_noted_before_the_work(tmp_path, monkeypatch, capsys):
    def work(*_):
        raise ConfigError("the work begins")

    monkeypatch.setattr("reelstep.training.fits.prepare", work)
    for name, noted in (("bns_4", True), ("mine_4", False)):
        assert main(["fit", "bns", "reel-tiny", "--nfe", "4", "-o", str(tmp_path / f"{name}.json")]) == 2
        assert ("note: reel-tiny comes with a 'bns_4', beside which" in capsys.readouterr().err) == noted
