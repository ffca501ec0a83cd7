"""A bundle that takes adapters, served by ranks: rows keep their own, and an engine on them makes one device's videos."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from reelstep.compiler.lora import Layout, layers_of
from reelstep.compiler.part import Part
from reelstep.engine import build
from reelstep.engine.executors import on_mesh
from reelstep.engine.executors.on_mesh import open_on_mesh
from reelstep.engine.executors.restarting import Restarting
from reelstep.engine.loop import Engine, open_engine
from reelstep.engine.models import MODELS
from reelstep.engine.models.reel_tiny import WEIGHTS
from reelstep.engine.models.spec import ModelSpec
from reelstep.engine.request import Call
from reelstep.engine.resolve import Ask, resolve
from reelstep.parallel.mesh import Mesh
from reelstep.tests.engine.conftest import Heard
from reelstep.tests.engine.executors import small_model

PART = Part(f"{small_model.__name__}:build_denoiser", f"{small_model.__name__}:denoiser_programs", rules="movie-gen", prefix="denoiser.")


def adaptable(model: nn.Module) -> dict[str, nn.Linear]:
    assert isinstance(model, small_model.Small)
    return {name: layer for name, layer in model.denoiser.named_modules() if isinstance(layer, nn.Linear) and name.startswith("blocks.")}


LAYOUT = Layout(3, layers_of(adaptable(small_model.build())))
SPEC = ModelSpec("small", "1", MODELS["dit-mid"].settings, small_model.build, small_model.programs, None, adaptable=adaptable, sharding=(PART,))
GREY = WEIGHTS / "reel-tiny-grey-lora.safetensors"


@pytest.fixture(params=["cfg=2", pytest.param("cfg=2,tp=2", marks=pytest.mark.slow)])
def replica(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Restarting]:
    """Two halves, or two of two ranks each that share heads and FFN units."""
    for module in (build, on_mesh):
        monkeypatch.setattr(module, "MODELS", {"small": SPEC})
    mesh = Mesh.parse(request.param)
    bundle = build.build_bundle("small", backend="eager", precision=None, out=tmp_path / "small.reel", cache=None, lora_rank=LAYOUT.rank, mesh=mesh)
    assert {program.program for group in bundle.plan.ranks for program in group.programs} == {"denoise", "denoise_lora"}
    executor = open_on_mesh(bundle, mesh, tmp_path)
    yield executor
    executor.close()


@torch.no_grad()
def test_halves_of_a_mesh_take_each_row_with_its_own_adapter(replica: Restarting) -> None:
    assert replica.max_rows["small", "denoise_lora", "video"] == replica.max_rows["small", "denoise", "video"] == 8
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (1, 4, 3, 4, 4), "modulation": (1, 7, 24), "context": (1, 5, 24), "lora": (1, LAYOUT.numbers)}
    rows = [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(3)]
    rows[1]["lora"].zero_()
    found = replica.run("small", [Call("denoise_lora", "video", row) for row in rows])
    whole = small_model.build().double().denoiser
    for row, output in zip(rows, found, strict=True):
        other: Any = copy.deepcopy(whole)
        for (name, *_), (down, up) in zip(LAYOUT.layers, LAYOUT.pairs(row["lora"].double()), strict=True):
            other.get_submodule(name).weight += (down[0] @ up[0]).T
        given = [row[name].double() for name in ("x", "modulation", "context")]
        wanted = other(given[0], given[1], None, given[2])
        assert (output["velocity"] - wanted).norm() < 1e-5 * wanted.norm()
    (plain,) = replica.run("small", [Call("denoise", "video", {name: rows[1][name] for name in ("x", "modulation", "context")})])
    assert torch.allclose(plain["velocity"], found[1]["velocity"], rtol=1e-5, atol=1e-5), "the row without one"


def sampled(engine: Engine) -> list[np.ndarray]:
    """A video with the shipped adapter and one without."""
    videos = []
    for lora in ({"grey": 1.0}, {}):
        heard = Heard()
        engine.submit(resolve(Ask("a red apple bounces", seed=1, steps=2, solver="euler", lora=lora), engine.models), heard)
        videos.append(heard.result().media.frames)
    engine.close(1.0)
    return videos


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    """A bundle that takes the adapter, and what it makes."""
    out = tmp_path_factory.mktemp("tiny") / "tiny.reel"
    build.build_bundle("reel-tiny", backend="eager", precision=None, out=out, cache=None, lora_rank=4)
    return out, sampled(open_engine([out], cache=out.parent, loras={"grey": GREY}))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mesh", ["tp=2", "cp=2"])
def test_the_shipped_adapter_on_ranks_makes_one_devices_video(mesh: str, on_one_device: tuple[Path, list[np.ndarray]], tmp_path: Path) -> None:
    bundle, (grey, plain) = on_one_device
    found = sampled(open_engine([bundle], cache=tmp_path, mesh=Mesh.parse(mesh), loras={"grey": GREY}))
    assert np.abs(grey.astype(int) - plain).mean() > 5, "the adapter changes the video"
    for wanted, frames in zip((grey, plain), found, strict=True):
        assert np.abs(wanted.astype(int) - frames).max() <= 1
