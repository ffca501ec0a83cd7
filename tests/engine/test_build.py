"""Every registered model becomes a bundle, and the shipped one runs as its modules do."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
from torch import nn

from reelstep.compiler.backends.openvino.decoder import decoder_of
from reelstep.compiler.bundle import Bundle
from reelstep.compiler.capture import quiet_torch
from reelstep.compiler.load import load, load_later
from reelstep.compiler.program import Profile, Program, TensorSpec
from reelstep.compiler.storage import free_bytes
from reelstep.engine import build
from reelstep.engine.build import build_bundle, default_tables
from reelstep.engine.models import MODELS
from reelstep.engine.models.spec import ModelSettings, ModelSpec, hash_weights
from reelstep.engine.request import Choice, Fit
from reelstep.engine.resolve import Ask, resolve
from reelstep.engine.samplers.fitted import Fitted
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.schedules import linear
from reelstep.engine.samplers.step_cache import PIECES
from reelstep.engine.samplers.tables import SOLVERS
from reelstep.engine.served import ServedModel, table_name
from reelstep.errors import CompileError, ConfigError, StorageError


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
    assert set(served.tables) >= set(default_tables(served.settings))
    d = served.settings.defaults["text_to_video"]
    assert served.table(d.solver, d.schedule, d.steps) is served.tables[table_name(d.solver, d.schedule, d.steps)]
    assert served.table("midpoint", "linear", 3).n == 6


def test_a_bundle_compiled_without_pieces_offers_no_step_cache(bundles):
    assert ServedModel.of(bundles("dit-mid")).step_caches == {}


def test_the_pieces_of_every_model_that_has_some_are_those_that_step_caches_ask_for():
    for spec in MODELS.values():
        if spec.pieces is not None:
            module = spec.build()
            denoise, *pieces = (next(p for p in spec.programs(module) if p.name == "denoise"), *spec.pieces(module))
            assert [piece.name for piece in pieces] == [*PIECES]
            assert all([(p.name, p.max_batch) for p in piece.profiles] == [(p.name, p.max_batch) for p in denoise.profiles] for piece in pieces)


def test_pieces_are_refused_for_a_model_that_does_not_come_in_any(tmp_path):
    with pytest.raises(ConfigError, match="'dit-mid' does not come in the pieces"):
        build_bundle("dit-mid", backend="null", precision=None, out=tmp_path / "b.reel", cache=None, step_cache=True)


def test_a_fitted_solver_travels_with_the_bundle_and_is_offered(bundles, artifact):
    served = ServedModel.of(bundles("reel-tiny"))
    fitted = Fitted.from_json(json.loads(artifact.read_text()))
    assert served.fits["bns_2"] == fitted.fit
    assert "bns_2" in served.solvers
    assert served.table("bns_2", "linear_quadratic", 2) == fitted.artifact


@pytest.mark.parametrize("name", ["reel-tiny", "dit-mid"])
def test_openvino_reads_every_program_without_another_trace(name, bundles, monkeypatch):
    monkeypatch.setattr(TorchFXPythonDecoder, "from_exported_program", lambda *_: pytest.fail("it was traced, which takes as long as a capture"))
    for key in bundles(name).signatures:
        with quiet_torch():
            decoder_of(bundles(name).program(*key))


MEASURED = {"psnr_db": 30.0, "ssim": 0.9, "frechet": None, "command": "none: these are for a test"}


@pytest.fixture
def build_with_menu(monkeypatch, tmp_path, closed_form):
    """Builds the bundle of a model of one linear map, with a menu for its videos and a fitted solver beside it."""
    settings, _, _ = closed_form

    def built(menu, *, fitted=True):
        defaults = {task: replace(d, menu=menu) for task, d in settings.defaults.items()}
        torch.manual_seed(0)
        module = nn.Linear(3, 3)
        edges = (TensorSpec("x", "float32", ("B", 3)),), (TensorSpec("velocity", "float32", ("B", 3)),)
        programs = (Program("denoise", module, *edges, (Profile("video", {}, 2),)),)
        spec = ModelSpec("toy", "1", replace(settings, defaults=defaults), lambda: module, lambda _: programs, None)
        monkeypatch.setattr(build, "MODELS", {"toy": spec})
        table, fit = SOLVERS["midpoint"].build(linear(1), PATHS["condot"]), Fit(("text_to_video",), "bns_2", "", 2, "cfg", {"rescale": 0.0}, 3.0)
        file = tmp_path / "bns_2.json"
        file.write_text(json.dumps(Fitted("bns_2", "bns", "toy", hash_weights(module), fit, table, {}, {"bns_2": 1.0}).to_json()))
        return build_bundle("toy", backend="null", precision=None, out=tmp_path / "toy.reel", cache=None, fitted=[file] if fitted else [])

    return built


def test_a_menu_travels_with_the_bundle_with_the_tables_that_it_names(build_with_menu):
    plain = Choice(solver="ab2", schedule="linear_quadratic", steps=8, guidance="apg", guidance_options={"eta": 0.5}, scale=2.0, forwards=16.0, **MEASURED)
    served = ServedModel.of(build_with_menu({"draft": Choice(solver="bns_2", forwards=4.0, **MEASURED), "best": plain}))
    assert served.settings.defaults["text_to_video"].qualities == ("draft", "best")
    assert table_name("ab2", "linear_quadratic", 8) in served.tables
    assert not any(name.startswith("bns_2") for name in served.tables), "that is among the fits"
    draft, best = (resolve(Ask("a cat", quality=quality), {"toy": served}) for quality in ("draft", "best"))
    assert (draft.solver, draft.steps, draft.scale) == ("bns_2", 2, 3.0)
    assert (best.solver, best.schedule, best.steps, best.guidance, best.scale, best.guidance_options["eta"]) == ("ab2", "linear_quadratic", 8, "apg", 2.0, 0.5)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"solver": "bns_8"}, "unknown solver 'bns_8'; known: ab2, bns_2, "),
        ({"guidance": "linear_8"}, "unknown guidance 'linear_8'; known: "),
        ({"schedule": "wavy"}, "unknown schedule 'wavy'; known: "),
        ({"steps": 0}, "steps: 0 is not in 1..100"),
        ({"scale": 21.0}, "scale: 21.0 is not in 0..20"),
        ({"guidance": "cfg", "guidance_options": {"treshold": 0.5}}, "guidance_options: unknown option of guidance 'cfg' 'treshold'; known: rescale"),
        ({"guidance": "none", "scale": 2.0}, "scale: "),
        ({"solver": "bns_2", "steps": 8}, "steps: 8, but 'bns_2' was fitted with 2"),
        ({"solver": "bns_2", "scale": 1.0}, "scale: 1.0, but 'bns_2' was fitted with 3.0"),
    ],
)
def test_an_entry_that_no_request_could_run_is_found_before_anything_is_compiled(build_with_menu, tmp_path, entry, says):
    with pytest.raises(ConfigError, match=re.escape(f"'standard' in the menu of 'toy' for text_to_video: {says}")):
        build_with_menu({"standard": Choice(forwards=8.0, **entry, **MEASURED)})
    assert not (tmp_path / "toy.reel").exists()


def test_an_entry_whose_fit_was_left_out_of_the_bundle_is_found_too(build_with_menu):
    with pytest.raises(ConfigError, match=r"unknown solver 'bns_2'.*add the fit that it names"):
        build_with_menu({"draft": Choice(solver="bns_2", forwards=4.0, **MEASURED)}, fitted=False)


@torch.no_grad()
def test_the_shipped_weights_are_within_their_size_and_finite():
    card = MODELS["reel-tiny"].card
    weights = card.parent / "reel-tiny.safetensors"
    assert weights.stat().st_size <= 25_000_000
    assert all(bool(torch.isfinite(p).all()) for p in MODELS["reel-tiny"].build().parameters())


def test_what_was_made_of_all_the_same_is_not_made_again(compile_toy):
    first, captured = compile_toy()
    again, captured_again = compile_toy()
    assert captured
    assert not captured_again, "and the cache, which this backend puts nothing into, need not have been there"
    assert again.manifest["sha256"] == first.manifest["sha256"]


def test_what_lies_at_the_output_and_is_no_bundle_is_refused_before_the_work(compile_toy, tmp_path, monkeypatch):
    (tmp_path / "toy.reel").write_text("mine")
    monkeypatch.setattr(build, "compile_model", lambda **_: pytest.fail("it was captured"))
    with pytest.raises(StorageError, match=r"toy\.reel exists and is not what would be written there"):
        compile_toy()
    assert (tmp_path / "toy.reel").read_text() == "mine"


def test_a_bundle_is_done_also_where_the_cache_takes_no_note_of_it(compile_toy, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    bundle, _ = compile_toy()
    assert bundle.path == tmp_path / "toy.reel"
    assert "toy.reel is done, but compiling it again will do all the work again" in caplog.text


@pytest.mark.parametrize("place", ["out", "cache"])
def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch, place):
    (tmp_path / "file").touch()
    monkeypatch.setattr(build, "compile_model", lambda **_: pytest.fail("it was captured"))
    places = {"out": tmp_path / "dit.reel", "cache": tmp_path / "cache"} | {place: tmp_path / "file" / "here"}
    with pytest.raises(StorageError, match=r"cannot write into .*file: Not a directory"):
        build_bundle("dit-mid", backend="openvino", precision=None, **places)


def test_a_disk_without_room_for_the_weights_is_found_before_the_work(compile_toy, tmp_path, monkeypatch):
    weights = 4 * (3 * 3 + 3)  # of one linear map
    with monkeypatch.context() as patch:
        patch.setattr(build, "free_bytes", lambda _: weights - 1)
        patch.setattr("reelstep.compiler.compile.capture_all", lambda *_: pytest.fail("it was captured"))
        with pytest.raises(StorageError, match=r"toy\.reel would hold .* GB of weights, and its disk has .* GB free\. Nothing was compiled; .* with -o"):
            compile_toy()
    monkeypatch.setattr(build, "free_bytes", lambda _: weights)
    assert compile_toy()[1]
    assert free_bytes(tmp_path / "not" / "yet") == free_bytes(tmp_path)


def test_what_a_build_of_engines_needs_is_looked_for_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "compile_model", lambda **_: pytest.fail("it was captured"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(CompileError, match=r"backend 'inductor' can build no engine here: it needs a C\+\+ compiler and found none; install g\+\+ or set CXX"):
        build_bundle("dit-mid", backend="inductor", precision=None, out=tmp_path / "dit.reel", cache=tmp_path / "cache")
    assert not (tmp_path / "dit.reel").exists()


def test_what_is_done_is_found_where_nothing_can_be_written(compile_toy, monkeypatch):
    compile_toy()
    for check in ("check_writable", "check_replaceable"):
        monkeypatch.setattr(build, check, lambda *_: pytest.fail("a place to write was looked for"))
    assert not compile_toy()[1]


def test_who_stops_while_engines_are_built_finds_the_bundle_done(compile_toy, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "load", stop)
        with pytest.raises(KeyboardInterrupt):
            compile_toy(backend="eager", precision="float32")
    assert not compile_toy(backend="eager", precision="float32")[1]


def test_a_portable_bundle_is_not_made_again_either_and_leaves_engines_to_others(compile_toy, monkeypatch):
    monkeypatch.setattr(build, "load", lambda *_, **__: pytest.fail("engines were built"))
    assert compile_toy(backend="eager", precision="float32", portable=True)[1]
    assert not compile_toy(backend="eager", precision="float32", portable=True)[1]


def test_another_model_card_makes_it_anew(compile_toy, monkeypatch):
    compile_toy()
    monkeypatch.setattr(build, "card_of", lambda spec, fused: "# Corrected\n")
    again, captured = compile_toy()
    assert captured
    assert again.model_card == "# Corrected\n"


def test_engines_of_a_model_without_weights_are_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "compile_model", lambda **_: pytest.fail("it was captured"))
    with pytest.raises(ConfigError, match=r"model 'movie-gen-30b' comes without weights, so backend 'openvino' has no engine to build .* --backend null"):
        build_bundle("movie-gen-30b", backend="openvino", precision=None, out=tmp_path / "mg.reel", cache=tmp_path / "cache")


@pytest.mark.parametrize("choices", [{"seed": 1}, {"precision": "bfloat16"}, {"backend": "eager"}, {"out": Path("other.reel")}, {"cache": Path("other")}])
def test_another_choice_is_made_anew(compile_toy, tmp_path, choices):
    compile_toy()
    assert compile_toy(**{name: tmp_path / value if isinstance(value, Path) else value for name, value in choices.items()})[1]


def test_another_process_finds_the_same_stamp(tmp_path):
    code = """
import sys
from pathlib import Path
from reelstep.engine import build
build.compile_model = lambda **_: sys.exit("captured")
build.stamp_of = lambda cache, asked: sys.exit(build.canonical_json(asked).decode())
build.build_bundle("dit-mid", backend="null", precision=None, out=Path("b.reel"), cache=Path("."))
"""
    told = [
        subprocess.run([sys.executable, "-P", "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, cwd=tmp_path, capture_output=True, text=True).stderr
        for seed in ("1", "2")
    ]
    assert '"dit-mid"' in told[0]
    assert told[0] == told[1]


def test_other_sources_make_it_anew(compile_toy, monkeypatch):
    compile_toy()
    monkeypatch.setattr(build, "source_hash", lambda *folders: "of an edited pass")
    assert compile_toy()[1]


def test_a_note_in_the_cache_that_is_damaged_makes_it_anew(compile_toy, tmp_path):
    compile_toy()
    (stamp,) = (tmp_path / "cache").glob("compiled-*")
    stamp.write_bytes(b"\xff\xfe")
    assert compile_toy()[1]


@pytest.mark.parametrize("harm", ["damaged", "replaced", "gone"])
def test_what_lies_there_must_be_what_was_made(compile_toy, tmp_path, harm):
    first, _ = compile_toy()
    if harm == "damaged":
        (first.path / "plan.json").write_text("{}")
    elif harm == "gone":
        shutil.rmtree(first.path)
    else:
        compile_toy(seed=1)
    again, captured = compile_toy()
    assert captured
    assert again.manifest["sha256"] == first.manifest["sha256"]


def test_engines_that_are_opened_later_are_made_once_when_they_are_called(compile_toy, tmp_path):
    bundle, _ = compile_toy(backend="eager", precision="float32")
    told = []
    engine = load_later(bundle, tmp_path / "cache", progress=lambda stage, done, total: told.append((stage, done, total)))["denoise", "video"]
    assert not told
    x = torch.randn(2, 3)
    torch.manual_seed(0)
    wanted = nn.Linear(3, 3)(x)
    for _ in range(2):
        torch.testing.assert_close(engine({"x": x})["velocity"], wanted.detach())
    assert told == [("eager: denoise video", 0, 0)]


def test_engines_that_are_opened_ahead_are_made_once_too(compile_toy, tmp_path):
    bundle, _ = compile_toy(backend="eager", precision="float32")
    told = []
    engine = load_later(bundle, tmp_path / "cache", progress=lambda *stage: told.append(stage))["denoise", "video"]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(engine.open, 2)
        engine({"x": torch.randn(2, 3)})
    assert len(told) == 1
