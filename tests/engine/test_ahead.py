"""A bundle is opened for one request while torch is imported: without torch, and without work for a request that may yet be refused."""

import subprocess
import sys
import threading
from dataclasses import replace
from io import BytesIO

import pytest
import torch
from PIL import Image

from reelstep import __main__ as cli
from reelstep.compiler.load import load, silent
from reelstep.engine.ahead import likely, open_ahead
from reelstep.engine.loop import expected_rounds
from reelstep.engine.resolve import Ask, resolve
from reelstep.engine.scheduler import rows_of
from reelstep.tests.engine.conftest import SETTINGS, make_model

Image.new("RGB", (16, 16)).save(PNG := BytesIO(), "PNG")
PICTURE = PNG.getvalue()
ASK = Ask(prompt="a fox")
WITHOUT_TORCH = """
import sys, threading
from pathlib import Path
from reelstep.compiler.load import silent
from reelstep.engine.ahead import open_ahead
from reelstep.engine.resolve import Ask

ahead = open_ahead(Path(sys.argv[1]), Ask(prompt="a fox"), cache=Path(sys.argv[2]), backend=None, precision=None, progress=silent, trusted=())
[thread.join() for thread in threading.enumerate() if thread.name == "reelstep-ahead"]
print(*[name for name in ("torch", "cryptography", "grpc") if name in sys.modules])
print([engine.found for engine in ahead.engines.values()], "torch" in sys.modules)
"""


def opened(bundle, cache, ask=ASK, told=silent):
    """And waited for."""
    ahead = open_ahead(bundle.path, ask, cache=cache, backend=None, precision=None, progress=told, trusted=())
    for thread in threading.enumerate():
        if thread.name == "reelstep-ahead":
            thread.join()
    return ahead.engines["denoise", "video"]


def test_engines_of_the_cache_are_opened_before_torch_is_imported(compile_toy, tmp_path):
    bundle, _ = compile_toy(backend="openvino")
    load(bundle, tmp_path / "cache")
    command = [sys.executable, "-P", "-c", WITHOUT_TORCH, str(bundle.path), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["", "[True] False"]


def test_an_engine_that_was_opened_ahead_computes_as_any_and_is_not_told_of(compile_toy, tmp_path):
    bundle, _ = compile_toy(backend="openvino", precision="float32")
    x, told = torch.randn(2, 3), []
    wanted = load(bundle, tmp_path / "cache")["denoise", "video"]({"x": x})["velocity"]
    engine = opened(bundle, tmp_path / "cache", told=lambda *stage: told.append(stage))
    assert torch.equal(engine({"x": x})["velocity"], wanted)
    assert not told


def test_what_is_not_in_the_cache_is_not_made_before_it_is_called(compile_toy, tmp_path):
    bundle, _ = compile_toy(backend="openvino", cache=None)
    told = []
    engine = opened(bundle, tmp_path / "cache", told=lambda *stage: told.append(stage))
    assert not engine.found
    assert not (tmp_path / "cache").exists()
    engine({"x": torch.randn(2, 3)})
    assert told == [("openvino: denoise video", 0, 0)]
    assert engine.found


def test_a_request_that_is_refused_makes_no_engine(compile_toy, tmp_path, capsys):
    bundle, _ = compile_toy(backend="openvino", cache=None)
    arguments = ["sample", str(bundle.path), "a fox", "-o", str(tmp_path / "fox.mp4"), "--steps", "1000", "--cache", str(tmp_path / "cache")]
    assert cli.main(arguments) == 2
    assert "steps" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "ask",
    [
        {"scale": 3.0},
        {"scale": 1.0},
        {"scale": 3.0, "steps": 1},
        {"scale": 1.0, "guidance": "none"},
        {"scale": 3.0, "count": 3},
        {"scale": 3.0, "frames": 1},
        {"scale": 3.0, "image": PICTURE},
    ],
    ids=lambda ask: " ".join(f"{name} {value if name != 'image' else ''}" for name, value in ask.items()),
)
def test_the_guess_is_what_the_engine_will_expect(ask, compile_toy):
    bundle, _ = compile_toy()
    toy = make_model()
    model = replace(toy, settings=replace(SETTINGS, defaults=dict.fromkeys(SETTINGS.tasks, SETTINGS.defaults["text_to_video"])))
    asked = Ask(prompt="a fox", **ask)
    request = resolve(asked, {"toy": model})
    rounds = expected_rounds(model, request, request.steps)
    calls = {key[1:]: rows for each in rounds for key, rows in rows_of(each).items()}
    guess = dict(likely(bundle, asked))
    assert guess.keys() == calls.keys()
    assert {key: rows > 1 for key, rows in guess.items()} == {key: rows > 1 for key, rows in calls.items()}, "by which an engine is chosen"


def test_a_request_that_will_be_refused_is_not_guessed_at_length(compile_toy):
    bundle, _ = compile_toy()
    limits = SETTINGS.limits
    most = likely(bundle, replace(ASK, steps=limits.max_steps, count=limits.max_count))
    assert likely(bundle, replace(ASK, steps=10**12, count=10**12)) == most


def test_a_student_is_not_guided(compile_toy):
    bundle, _ = compile_toy()
    bundle.settings["distilled"] = {"grids": {"1": [0, 1]}, "scale": 3.0, "teacher": "toy"}
    assert dict(likely(bundle, ASK))["denoise", "video"] == 1
