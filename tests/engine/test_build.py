"""Every registered model becomes a bundle, and the shipped one runs as its modules do."""

import json

import pytest
import torch

from reelstep.compiler.bundle import Bundle
from reelstep.compiler.load import load
from reelstep.engine.build import ServedModel, build_bundle, default_tables, hash_weights, table_name
from reelstep.engine.models import MODELS
from reelstep.engine.models.spec import ModelSettings
from reelstep.engine.request import Fit
from reelstep.engine.samplers.fitted import Fitted
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.schedules import linear
from reelstep.engine.samplers.tables import SOLVERS


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """A solver that says it was fitted to reel-tiny."""
    model_hash, table = hash_weights(MODELS["reel-tiny"].build()), SOLVERS["midpoint"].build(linear(1), PATHS["condot"])
    fitted = Fitted("bns_2", "bns", "reel-tiny", model_hash, Fit(("text_to_video",), "bns_2", "", 2, "cfg", {"rescale": 0.0}, 3.0), table, {}, {"bns_2": 1.0})
    file = tmp_path_factory.mktemp("fit") / "bns_2.json"
    file.write_text(json.dumps(fitted.to_json()))
    return file


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, artifact):
    """Compiled without a network that runs, each once."""
    made: dict[str, Bundle] = {}

    def bundle(name):
        if name not in made:
            out = tmp_path_factory.mktemp("bundles") / f"{name}.reel"
            fitted = [artifact] if name == "reel-tiny" else []
            made[name] = build_bundle(name, backend="null", precision=None, out=out, cache=None, fitted=fitted)
        return made[name]

    return bundle


SLOW = {"movie-gen-30b"}  # 48 layers: a minute and more to trace


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MODELS])
def test_every_registered_model_compiles_and_plans(name, bundles):
    bundle = bundles(name)
    spec = MODELS[name]
    assert ModelSettings.from_json(bundle.settings) == spec.settings
    assert bundle.plan.model == name
    engines = load(bundle, None)
    for key, signature in bundle.signatures.items():
        out = engines[key]({edge.name: edge.zeros(1, "meta" if not bundle.has_weights else "cpu") for edge in signature.inputs})
        assert {edge.name: tuple(out[edge.name].shape[1:]) for edge in signature.outputs} == {edge.name: edge.sizes for edge in signature.outputs}


@pytest.mark.slow
def test_the_30b_plan_states_its_tokens_work_and_weights(bundles):
    plan = bundles("movie-gen-30b").plan.program("denoise", "video")
    assert plan.flops == pytest.approx(1.0249e16, rel=1e-3)
    time = bundles("movie-gen-30b").plan.program("embed_time", "any")
    text = (4096 + 1280 + 1472) * 6144 + 3 * 2 * 6144  # the projections run in no program here
    assert plan.parameters + time.parameters + text == 29_303_494_656


def test_default_tables_travel_with_the_bundle_and_are_used(bundles):
    served = ServedModel.of(bundles("reel-tiny"))
    assert set(served.tables) == set(default_tables(served.settings))
    d = served.settings.defaults["text_to_video"]
    assert served.table(d.solver, d.schedule, d.steps) is served.tables[table_name(d.solver, d.schedule, d.steps)]
    assert served.table("midpoint", "linear", 3).n == 6


def test_a_fitted_solver_travels_with_the_bundle_and_is_offered(bundles, artifact):
    served = ServedModel.of(bundles("reel-tiny"))
    fitted = Fitted.from_json(json.loads(artifact.read_text()))
    assert served.fits == {"bns_2": fitted.fit}
    assert "bns_2" in served.solvers
    assert served.table("bns_2", "linear_quadratic", 2) == fitted.artifact


@torch.no_grad()
def test_the_shipped_weights_are_within_their_size_and_finite():
    card = MODELS["reel-tiny"].card
    weights = card.parent / "reel-tiny.safetensors"
    assert weights.stat().st_size <= 25_000_000
    assert all(bool(torch.isfinite(p).all()) for p in MODELS["reel-tiny"].build().parameters())
