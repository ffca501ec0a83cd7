"""A model whose programs are closed forms, so that the engine is tested without a network.

Its exact velocity leads every latent to TARGET (at scale 1), whatever the steps; decoding repeats latents into pixels.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from reelstep.compiler.program import Profile, Program, TensorSpec
from reelstep.engine import build
from reelstep.engine.build import build_bundle
from reelstep.engine.executors.inline import Inline
from reelstep.engine.loop import BatchRecord, Engine
from reelstep.engine.models.spec import ModelSettings, ModelSpec
from reelstep.engine.request import Defaults, Event, Failed, Finished, Fit, Limits, Request
from reelstep.engine.runner import Runner
from reelstep.engine.samplers.fitted import Fitted, RuleOptions
from reelstep.engine.samplers.linear_ag import LinearAG
from reelstep.engine.samplers.ns import Table
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.schedules import linear
from reelstep.engine.samplers.step_cache import CacheOptions
from reelstep.engine.samplers.tables import SOLVERS
from reelstep.engine.served import ServedModel

TARGET, NULL_TARGET = 0.5, -0.25
SETTINGS = ModelSettings(
    tasks=("text_to_image", "text_to_video", "animate_sticker"),
    limits=Limits(sizes=((16, 16),), frames=(1, 8), max_steps=100, max_scale=20.0, max_count=4, max_prompt_bytes=31),
    defaults={"text_to_video": Defaults("euler", "linear", 4, 1.0, 8, 8.0)},
    path="condot", prediction="velocity", latent_channels=3, condition_channels=3, spatial_stride=8, temporal_stride=2, text_length=32,
    tile_frames=2, tile_overlap=1,
)  # fmt: skip


LINEAR = Fitted(
    "linear_4", "linear_ag", "toy", "0" * 64, Fit(("text_to_video",), "euler", "linear", 4, "linear_4", {}, 2.0),
    LinearAG(
        "CLCL", ((), (-1.0, 1.0), (0.0, -1.0, 1.0), (0.0, 0.0, -1.0, 1.0)), ((), (1.0,), (0.0, 1.0), (0.0, 0.0, 1.0)), 2.0,
        SOLVERS["euler"].build(linear(4), PATHS["condot"]).hash, 1e-8, 8, (1.0, 1.0, 1.0, 1.0),
    ), {}, {"linear_4": 40.0},
)  # fmt: skip
"""Its estimate is the prompt's velocity less the last known difference."""
CALIBRATED = Fitted("adaptive", "adaptive-guidance", "toy", "0" * 64, LINEAR.fit, RuleOptions("adaptive", {"threshold": 0.7}), {}, {"adaptive": 1.0})
SKIPPING = Fitted("first_block", "step-cache", "toy", "0" * 64, LINEAR.fit, CacheOptions("first_block", {"threshold": 0.2}), {}, {"first_block": 1.0})
FITTED = Fitted(
    "bns_2", "bns", "toy", "0" * 64, Fit(("text_to_video",), "bns_2", "", 2, "cfg", {"rescale": 0.0}, 2.0),
    Table("bns", "condot", 1, (0.0, 0.4, 1.0), (1.0, 1.0), ((0.4,), (0.4, 0.6))), {"seed": 0}, {"bns_2": 40.0},
)  # fmt: skip


def encode_text(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The context says only whether there was any text."""
    said = (inputs["tokens"][:, 0] != 1).float()
    return {"context": said[:, None, None].expand(-1, 32, 4)}


def embed_time(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"modulation": inputs["t"][:, None, None].expand(-1, 7, 4)}


def denoise(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Velocity of the straight line from x to the target: exact for every solver that never evaluates t = 1."""
    said, t = inputs["context"][:, 0, 0], inputs["modulation"][:, 0, 0]
    target = torch.where(said > 0, TARGET, NULL_TARGET)[:, None, None, None, None] + inputs["condition"]
    return {"velocity": (target - inputs["x"]) / (1 - t[:, None, None, None, None])}


def denoise_embed(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tokens [B, 7, F, 2, 2]: x, a channel that the first block fills, the condition."""
    x, t = inputs["x"], inputs["modulation"][:, 0, 0]
    hidden = torch.cat([x, torch.zeros_like(x[:, :1]), inputs["condition"]], 1)
    return {"hidden": hidden, "signal": hidden * (1 + t[:, None, None, None, None])}


def denoise_first(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first block adds what it knows of text and time."""
    added = torch.zeros_like(inputs["hidden"])
    added[:, 3] = (1 + inputs["context"][:, 0, 0] + inputs["modulation"][:, 0, 0])[:, None, None, None]
    return {"hidden": inputs["hidden"] + added}


def denoise_rest(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`denoise`, and what must be added to x for it."""
    hidden = inputs["hidden"]
    velocity = denoise({**inputs, "x": hidden[:, :3], "condition": hidden[:, 4:]})["velocity"]
    residual = torch.zeros_like(hidden)
    residual[:, :3] = velocity - hidden[:, :3]
    return {"residual": residual, "velocity": velocity}


def denoise_last(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"velocity": (inputs["hidden"] + inputs["residual"])[:, :3]}


def decode(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    z = inputs["latent"]
    return {"video": z.repeat_interleave(2, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)}


def encode_image(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"latent": inputs["picture"][:, :, :, ::8, ::8] * 0.1}


PROGRAMS = {
    ("encode_text", "any"): encode_text, ("embed_time", "any"): embed_time, ("encode_image", "image"): encode_image,
    ("denoise", "video"): denoise, ("denoise", "image"): denoise, ("decode", "video"): decode, ("decode", "image"): decode,
    **{(piece.__name__, profile): piece for piece in (denoise_embed, denoise_first, denoise_rest, denoise_last) for profile in ("video", "image")},
}  # fmt: skip


def make_model(name: str = "toy") -> ServedModel:
    return ServedModel(name, "1", SETTINGS, ("linear", "linear_quadratic"), {}, {each.name: each for each in (FITTED, LINEAR, CALIBRATED, SKIPPING)}, True)


def make_runner(**replaced: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> Runner:
    """The closed-form programs, some replaced by name."""
    programs = {key: replaced.get(key[0], run) for key, run in PROGRAMS.items()}
    return Runner(programs, dict.fromkeys(programs, 8))


NUMBERS = itertools.count()


def make_request(**changed: object) -> Request:
    base = Request(
        id=f"request {next(NUMBERS)}", model="toy", task="text_to_video", prompt="a cat", negative_prompt="", seed=1, count=1, width=16,
        height=16, frames=8, frames_per_second=8.0, steps=4, scale=1.0, solver="euler", schedule="linear", guidance="cfg",
        guidance_options={}, step_cache="", step_cache_options={}, image=None, preview_every=0, priority=0, deadline=math.inf,
    )  # fmt: skip
    return replace(base, **changed)  # type: ignore[arg-type]


class Heard:
    """A listener that remembers, and waits for the end."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Finished | Failed):
            self.ended.set()

    def last(self) -> Event:
        assert self.ended.wait(20), f"no end after 20 s; heard {self.events}"
        return self.events[-1]

    def result(self) -> Finished:
        last = self.last()
        assert isinstance(last, Finished), last
        return last

    def error(self) -> Exception:
        last = self.last()
        assert isinstance(last, Failed), last
        return last.error


class Toy:
    """An engine over the closed-form model, and the batches it ran."""

    def __init__(self, runner: Runner, **options: int) -> None:
        self.batches: list[BatchRecord] = []
        self.engine = Engine({"toy": make_model()}, Inline({"toy": runner}), on_batch=self.batches.append, **options)

    def submit(self, **changed: object) -> Heard:
        heard = Heard()
        self.engine.submit(make_request(**changed), heard)
        return heard


@pytest.fixture
def toy():
    made = Toy(make_runner())
    yield made
    made.engine.close(0)


@pytest.fixture
def make_toy():
    """Toys with other programs or limits; all are closed at the end."""
    made: list[Toy] = []

    def make(replaced: Mapping[str, Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]] | None = None, **options: int) -> Toy:
        made.append(Toy(make_runner(**(replaced or {})), **options))
        return made[-1]

    yield make
    for each in made:
        each.engine.close(0)


@pytest.fixture
def request_for():
    return make_request


@pytest.fixture
def closed_form():
    """Settings, programs and targets of the toy model."""
    return SETTINGS, PROGRAMS, (TARGET, NULL_TARGET)


@pytest.fixture
def compile_toy(monkeypatch, tmp_path, closed_form):
    """Compiles a model of one linear map with a cache, and says whether anything was captured for it."""
    settings, _, _ = closed_form
    captured = []
    whole = build.compile_model
    monkeypatch.setattr(build, "compile_model", lambda **choices: captured.append(1) or whole(**choices))

    def compiled(seed=0, **choices):
        torch.manual_seed(seed)
        module = nn.Linear(3, 3)
        edges = (TensorSpec("x", "float32", ("B", 3)),), (TensorSpec("velocity", "float32", ("B", 3)),)
        programs = (Program("denoise", module, *edges, (Profile("video", {}, 2),)),)
        monkeypatch.setattr(build, "MODELS", {"toy": ModelSpec("toy", "1", settings, lambda: module, lambda _: programs, None)})
        captured.clear()
        asked = {"backend": "null", "precision": None, "out": tmp_path / "toy.reel", "cache": tmp_path / "cache"} | choices
        return build_bundle("toy", **asked), bool(captured)

    return compiled
