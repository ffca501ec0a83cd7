"""The commands of recipes: wrong numbers, wrong places and interruptions are a line each, and what is shipped stays unless something was learned."""

import os
import runpy
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reelstep.compiler.skus import SKUS, cpu
from reelstep.errors import ConfigError, StorageError
from reelstep.training import recipe
from reelstep.training.half import half_products, products
from reelstep.training.imagine_flash import Distilled
from reelstep.training.zoo import reel_tiny_flash

ZOO = Path(reel_tiny_flash.__file__).parent
RECIPES = sorted(path.stem for path in ZOO.glob("*.py") if "def main()" in path.read_text(encoding="utf-8"))


def test_every_recipe_was_found():
    assert RECIPES == ["reel_tiny_denoiser", "reel_tiny_export", "reel_tiny_flash", "reel_tiny_lora", "reel_tiny_tae", "sticker_features"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_ends_with_one_line_for_what_is_not_there(name, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    out = "--source" if name == "reel_tiny_export" else "--out"
    monkeypatch.setattr(sys, "argv", [f"{name}.py", out, "file"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ZOO / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{name}: ")
    assert "file" in line


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("reel_tiny_flash", ["--batch", "0"], "--batch: '0' is not a whole number of at least 1"),
        ("reel_tiny_flash", ["--iterations", "-3"], "--iterations: '-3' is not a whole number of at least 1"),
        ("reel_tiny_flash", ["--rate", "nan"], "--rate: 'nan' is not a number above 0"),
        ("reel_tiny_flash", ["--seed", "-1"], "--seed: '-1' is not a whole number of at least 0"),
        ("reel_tiny_lora", ["--clips", "1050"], "--clips: '1050' is not a multiple of 100"),
        ("reel_tiny_lora", ["--steps", "many"], "--steps: 'many' is not a whole number of at least 1"),
        ("reel_tiny_denoiser", ["--clips", "-100"], "--clips: '-100' is not a whole number of at least 100"),
        ("reel_tiny_tae", ["--peak", "-1"], "--peak: '-1' is not a number above 0"),
    ],
)
def test_a_number_that_nothing_can_be_trained_with_is_refused(name, arguments, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as ended:
        import_module(f"reelstep.training.zoo.{name}").main()
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_ctrl_c_is_130_and_no_traceback(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipe.py"])

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        recipe.run(interrupted)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "recipe: cancelled; what was saved is gone on with when it is run again\n"


def test_weights_are_written_whole_for_all_who_may_read(tmp_path):
    target, before = tmp_path / "weights.safetensors", os.umask(0o022)
    try:
        recipe.write_weights(target, {"w": torch.arange(6).reshape(2, 3).T}, {"made": "here"})
    finally:
        os.umask(before)
    assert target.stat().st_mode & 0o777 == 0o644
    assert torch.equal(load_file(target)["w"], torch.arange(6).reshape(2, 3).T)
    with pytest.raises(ConfigError, match="there is no folder"):
        recipe.check_paths(tmp_path, tmp_path / "nowhere" / "weights.safetensors")
    with pytest.raises(StorageError, match="cannot write into"):
        recipe.check_paths(target)


def test_a_student_that_learned_nothing_replaces_nothing(tmp_path):
    target = tmp_path / "student.safetensors"
    target.write_bytes(b"shipped")
    nothing = Distilled(7.7, 7.7, 0, ((0, 7.7),), "the loss was nan at iteration 0; try a lower rate")
    with pytest.raises(ConfigError, match=r"no iterate was better than the teacher in the student's place, .* is left as it was; the loss was nan"):
        reel_tiny_flash.write(target, None, nothing)
    assert target.read_bytes() == b"shipped"


@pytest.mark.parametrize(("features", "half"), [(frozenset({"avx2"}), False), (frozenset({"avx512_bf16"}), True)])
def test_products_are_in_half_precision_only_where_the_cpu_has_them(features, half, monkeypatch):
    monkeypatch.setattr(cpu, "SKU", replace(SKUS["cpu"], features=features))
    with half_products():
        assert (torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16) == half
    with half_products(wanted=False):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32
    assert products() == ("bfloat16 products" if half else "float32")
