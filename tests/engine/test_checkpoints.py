"""A request that another engine began is gone on with, bit for bit, and nothing else is taken for it."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from reelstep.engine.checkpoints import Checkpoints
from reelstep.engine.executors.inline import Inline
from reelstep.engine.loop import Engine
from reelstep.engine.pipelines.state import PipelineState
from reelstep.engine.request import Failed
from reelstep.engine.runner import Runner
from reelstep.errors import ConfigError, StorageError, Unavailable
from reelstep.tests.engine.executors.toy_engine import Heard

KINDS = {
    "two steps of history": {"solver": "ab2", "scale": 2.0, "count": 2},
    "noise at every step": {"solver": "dpmpp_2m_sde", "scale": 3.0, "guidance": "apg"},
    "what guidance has latched": {"guidance": "adaptive", "guidance_options": {"threshold": 0.6}, "scale": 3.0},
    "a step cache": {"step_cache": "first_block", "step_cache_options": {"threshold": 0.3}, "scale": 2.0},
    "a picture": {"task": "animate_sticker", "image": np.full((16, 16, 3), 200, np.uint8), "scale": 2.0, "guidance": "cfg"},
}


def disagree(inputs):
    """A field in which every output keeps some of its own noise, and the branches differ."""
    said, t = inputs["context"][:, 0, 0], inputs["modulation"][:, 0, 0]
    turned = torch.where((said > 0)[:, None, None, None, None], inputs["x"], inputs["x"].roll(1, -1))
    return {"velocity": -torch.lerp(turned, inputs["x"], t[:, None, None, None, None])}


class Limited:
    """Runs so many denoiser calls and then none until it is let go."""

    inline, capacity = False, 1

    def __init__(self, runner: Runner, calls: int) -> None:
        self.inner, self.calls, self.ran = Inline({"toy": runner}), calls, 0
        self.max_rows = self.inner.max_rows
        self.stuck, self.go = threading.Event(), threading.Event()

    def run(self, model, calls):
        if calls[0].program.startswith("denoise"):
            self.ran += 1
            if self.ran > self.calls:
                self.stuck.set()
                assert self.go.wait(20)
        return self.inner.run(model, calls)


@pytest.fixture
def engines(make_toy, closed_form, tmp_path):
    """engine(calls) keeps a checkpoint every 2 steps in one directory."""
    _, programs, _ = closed_form
    model = make_toy().engine.models["toy"]
    runner = Runner({**programs, ("denoise", "video"): disagree}, dict.fromkeys(programs, 8))
    made = []

    def make(calls: int = 10**6, identity: str = "a"):
        executor = Limited(runner, calls)
        engine = Engine({"toy": model}, executor, checkpoints=Checkpoints(tmp_path / "states", 2, {"toy": identity}))
        made.append((engine, executor))
        return engine, executor

    yield make
    for engine, executor in made:
        executor.go.set()
        engine.close(0)


def submit(engine, request_for, heard, **changed):
    engine.submit(request_for(steps=8, seed=11, **changed), heard)
    return heard


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_engine_goes_on_with_what_another_one_began(kind, engines, request_for, tmp_path):
    options = KINDS[kind]
    engine, whole = engines()
    wanted = submit(engine, request_for, Heard(), **options).result()
    engine.close(5)
    assert list((tmp_path / "states").iterdir()) == [], "one that has ended needs no state"
    engine, first = engines(calls=whole.ran * 3 // 4)
    heard = submit(engine, request_for, Heard(), **options)
    assert first.stuck.wait(20)
    closer = threading.Thread(target=engine.close, args=(0.0,))
    closer.start()
    assert heard.ended.wait(20)
    assert isinstance(heard.last, Failed)
    assert isinstance(heard.last.error, Unavailable)
    first.go.set()
    closer.join(20)
    (file,) = (tmp_path / "states").glob("*.state")
    assert file.parent.stat().st_mode & 0o777 == 0o700, "nobody else reads it"
    engine, second = engines()
    found = submit(engine, request_for, Heard(), **options).result()
    assert np.array_equal(found.media.frames, wanted.media.frames)
    assert (found.usage.nfe, found.usage.forwards, found.usage.cached) == (wanted.usage.nfe, wanted.usage.forwards, wanted.usage.cached)
    assert 0 < second.ran < whole.ran, "only the rest ran"
    engine.close(5)
    assert not file.exists()


def test_another_request_another_bundle_and_a_damaged_file_begin_anew(engines, request_for, tmp_path, caplog):
    def run(identity="a", **changed):
        engine, executor = engines(identity=identity)
        submit(engine, request_for, Heard(), **changed).result()
        engine.close(5)
        return executor.ran

    engine, first = engines(calls=5)
    submit(engine, request_for, Heard())
    assert first.stuck.wait(20)
    closer = threading.Thread(target=engine.close, args=(0.0,))
    closer.start()
    first.go.set()
    closer.join(20)
    (file,) = (tmp_path / "states").glob("*.state")
    kept = file.read_bytes()
    deep = save({"x": torch.zeros(1)}, {"state": "[" * 100_000})
    assert run(prompt="a dog") == 8
    assert run(identity="b") == 8
    assert file.read_bytes() == kept
    for data in (kept[:100], b"", kept[:-8], kept.replace(b"GuidanceState", b"OtherStatexxx"), deep):
        file.write_bytes(data)
        with caplog.at_level(logging.WARNING):
            assert run() == 8
        assert "the request begins anew" in caplog.text
        caplog.clear()
    file.write_bytes(kept)
    assert run(id="another id", priority=1, preview_every=0, deadline=time.monotonic() + 60) < 8


def test_the_oldest_make_room_and_a_full_disk_harms_no_request(engines, request_for, tmp_path, caplog, monkeypatch):
    store = Checkpoints(tmp_path / "few", 1, {"toy": "a"}, most=2)
    requests = [request_for(seed=n) for n in range(4)]
    for request in requests:
        store.keep(request, PipelineState(step=request.seed))
        time.sleep(0.02)
    store.close()
    assert [found and found.step for found in map(store.find, requests)] == [None, None, 2, 3]

    slow, written = threading.Event(), []
    monkeypatch.setattr("reelstep.engine.checkpoints.replace_file", lambda path, data: (slow.wait(10), written.append(data)))
    store = Checkpoints(tmp_path / "slow", 1, {"toy": "a"})
    for step in range(20):
        store.keep(requests[0], PipelineState(step=step))
    store.keep(requests[1], PipelineState(step=0))
    slow.set()
    store.close()
    assert len(written) <= 3, "the first, the newest, and another request's"

    def full(path: Path, data: bytes) -> None:
        raise StorageError("no space")

    monkeypatch.setattr("reelstep.engine.checkpoints.replace_file", full)
    engine, _ = engines()
    submit(engine, request_for, Heard()).result()
    engine.close(5)
    assert "a checkpoint was not kept: no space" in caplog.text
    with pytest.raises(ConfigError, match="both are at least 1"):
        Checkpoints(tmp_path, 0, {})
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="choose another directory"):
        Checkpoints(tmp_path / "file" / "states", 1, {})
