"""A bundle served by ranks gives one device's numbers, and what cannot be sharded is refused before any process starts."""

from __future__ import annotations

import os
import signal
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from reelstep import __main__ as cli
from reelstep.compiler.bundle import Bundle
from reelstep.compiler.compile import compile_model
from reelstep.compiler.part import Part
from reelstep.compiler.plan import Quantised
from reelstep.compiler.sharded import check_part
from reelstep.engine.commands import sample
from reelstep.engine.executors import on_mesh
from reelstep.engine.executors.on_mesh import open_on_mesh
from reelstep.engine.loop import open_engine
from reelstep.engine.models import MODELS
from reelstep.engine.models.spec import ModelSpec
from reelstep.engine.request import Call
from reelstep.errors import BundleError, ConfigError
from reelstep.parallel.mesh import Mesh
from reelstep.tests.engine.executors import small_model

PART = Part(f"{small_model.__name__}:build_denoiser", f"{small_model.__name__}:denoiser_programs", rules="movie-gen", prefix="denoiser.")
SPEC = ModelSpec("small", "1", MODELS["dit-mid"].settings, small_model.build, small_model.programs, None, sharding=(PART,))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = small_model.build()
    return compile_model(
        model="small", version="1", settings=SPEC.settings.to_json(), programs=small_model.programs(model), backend="eager", sku="cpu", precision=None,
        out=tmp_path_factory.mktemp("small") / "small.reel", solvers={}, fitted={}, card="", cache=None,
    )  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    """As a registered model; ranks are told by what was made of its spec."""
    monkeypatch.setattr(on_mesh, "MODELS", {"small": SPEC})
    return SPEC


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a process was to be started")

    monkeypatch.setattr(on_mesh, "start", refuse)


def test_a_bundles_programs_on_two_ranks_give_one_devices_numbers_also_after_a_kill(
    small: ModelSpec, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[Any] = []
    real = on_mesh.start
    monkeypatch.setattr(on_mesh, "start", lambda *args: made.append(real(*args)) or made[-1])
    monkeypatch.setattr(on_mesh, "SKU", replace(on_mesh.SKU, units=1))
    executor = open_on_mesh(bundle, Mesh.parse("cp=2"), tmp_path)
    try:
        assert "mesh cp=2 has 2 ranks, and this machine 1 cores" in caplog.text
        assert executor.max_rows == {("small", "denoise", "video"): 1, ("small", "embed_time", "any"): 16}, "rows of what is not sharded go to both"
        whole = small.build().double()
        t = torch.tensor([0.1, 0.8])
        (time,) = executor.run("small", [Call("embed_time", "any", {"t": t})])
        module: Any = whole.denoiser
        with torch.no_grad():
            assert (time["modulation"] - module.time(t.double())).abs().max() < 1e-5
            inputs = {"x": torch.randn(2, 4, 3, 4, 4), "modulation": time["modulation"], "context": torch.randn(2, 5, 24)}
            wanted = module(inputs["x"].double(), inputs["modulation"].double(), None, inputs["context"].double())
        (first,) = executor.run("small", [Call("denoise", "video", inputs)])
        assert (first["velocity"] - wanted).norm() < 1e-5 * wanted.norm()
        os.kill(made[-1].children[1].pid, signal.SIGKILL)
        (again,) = executor.run("small", [Call("denoise", "video", inputs)])
        assert torch.equal(again["velocity"], first["velocity"])
        assert executor.restarts == 1
    finally:
        executor.close()


@pytest.mark.usefixtures("no_process")
def test_weights_for_the_ranks_are_written_once_in_float32(small: ModelSpec, bundle: Bundle, tmp_path: Path) -> None:
    files = {on_mesh.weights_file(bundle, small, tmp_path) for _ in range(2)}
    (file,) = files
    with safe_open(file, "pt") as stored:
        own = small.build().state_dict()
        assert set(stored.keys()) == set(own)
        assert all(torch.equal(stored.get_tensor(name), own[name]) for name in own)


def other_weights() -> small_model.Small:
    model = small_model.build()
    model.denoiser.patch_out.weight.data[0, 0] += 1
    return model


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize(
    ("registered", "mesh", "error", "words"),
    [
        (SPEC, "cp=4", ConfigError, r"mesh cp=4 leaves 3 of the 3 heads of 'small' to 4 ranks of cp, which need at least 1 each; use ring=2, by"),
        (SPEC, "tp=4", ConfigError, r"3 heads of 'small' on mesh tp=4 cannot be split over 4 ranks.*use at most 3 ranks"),
        (SPEC, "cp=2,tp=2", ConfigError, r"cp=2,tp=2 leaves 1 of the 3 heads of 'small' to 2 ranks of cp, which need at least 1 each; use ring=2, by"),
        (replace(SPEC, version="7"), "cp=2", BundleError, r"has version 1 of 'small', and this package shards version 7; run `reelstep compile` again"),
        (replace(SPEC, sharding=()), "cp=2", ConfigError, r"'small' does not say how it is sharded; those that do: none\. Serve it without a mesh"),
        (replace(SPEC, build=other_weights), "cp=2", BundleError, r"has other weights in 'denoise' than this package's 'small'"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    registered: ModelSpec, mesh: str, error: type[Exception], words: str, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_mesh, "MODELS", {"small": registered})
    with pytest.raises(error, match=words):
        open_on_mesh(bundle, Mesh.parse(mesh), tmp_path)


@pytest.mark.usefixtures("no_process")
def test_ranks_of_one_process_share_no_gpu(small: ModelSpec, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_mesh, "arch_here", lambda *_: "sm90")
    with pytest.raises(ConfigError, match=r"on mesh cp=2 by backend 'eager': ranks beside this process share a CPU; add `--cluster local`"):
        open_on_mesh(bundle, Mesh.parse("cp=2"), tmp_path)


def test_a_quantised_bundle_is_refused(small: ModelSpec, bundle: Bundle) -> None:
    first, *others = bundle.plan.programs
    quantised = replace(first, quantised=Quantised("int8", 1, 1, 0.01, 0.05, ()))
    made = copy(bundle)
    made.plan = replace(bundle.plan, programs=(quantised, *others))
    with pytest.raises(ConfigError, match="is quantised, and ranks share weights in float32 alone"):
        on_mesh.spec_of(made)


def test_a_registered_models_parts_are_those_of_its_weights() -> None:
    for spec in (spec for spec in MODELS.values() if spec.sharding):
        model = spec.build()
        for part in spec.sharding:
            check_part(part, Mesh.parse("cp=2,tp=2"), spec.name)
            module = part.empty()
            assert {part.prefix + name for name in module.state_dict()} <= set(model.state_dict()), spec.name
            assert {program.name for program in part.programs_of(module)} <= {program.name for program in spec.programs(model)}


def test_an_engine_on_a_mesh_takes_one_bundle_in_float32(bundle: Bundle, tmp_path: Path) -> None:
    mesh = Mesh.parse("cp=2")
    with pytest.raises(ConfigError, match=r"2 bundles on mesh cp=2: .* serve each bundle from a server of its own"):
        open_engine([bundle.path, bundle.path], cache=tmp_path, mesh=mesh)
    with pytest.raises(ConfigError, match="precision bfloat16 on mesh cp=2: ranks run float32"):
        open_engine([bundle.path], cache=tmp_path, precision="bfloat16", mesh=mesh)
    with pytest.raises(ConfigError, match="'small' does not say how it is sharded; those that do: reel-tiny"):
        open_engine([bundle.path], cache=tmp_path, mesh=mesh)


def test_the_command_line_refuses_an_unknown_axis_and_a_wrong_request_before_ranks_start(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sample, "load_engine", lambda *_: pytest.fail("ranks were started"))
    command = ["sample", str(bundle.path), "a dog", "-o", str(tmp_path / "dog.webp"), "--cache", str(tmp_path)]
    assert cli.main([*command, "--mesh", "dp=2"]) == 2
    assert "unknown mesh axis 'dp'; known: cfg, cp, ring, tp" in capsys.readouterr().err
    assert cli.main([*command, "--mesh", "cp=2"]) == 2
    assert "model 'small' does not do text_to_video" in capsys.readouterr().err
