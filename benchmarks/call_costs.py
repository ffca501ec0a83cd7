"""Seconds of a network call by its rows: what a simulated replica is made of. Each number says whether it was measured or assumed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from reelstep.engine.models import MODELS
from reelstep.engine.request import Defaults
from reelstep.engine.scheduler import Key, Round, rounds_of
from reelstep.errors import ConfigError, unknown

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Point:
    """What a call of so many rows takes. source: "measured: by what" or "assumed: why"."""

    rows: int
    seconds: float
    source: str


@dataclass(frozen=True)
class Task:
    """The shape of a task's requests. branches: of guidance, each a call of its own. picture: whether one is encoded. menu: steps by quality."""

    profile: str
    branches: int
    picture: bool
    steps: int
    menu: Mapping[str, int]


@dataclass(frozen=True)
class Costs:
    """One model on one SKU. Programs are named "program/profile". Raises ConfigError for tables that no replica can have."""

    model: str
    sku: str
    max_rows: Mapping[str, int]
    points: Mapping[str, tuple[Point, ...]]
    tasks: Mapping[str, Task]

    def __post_init__(self) -> None:
        if self.max_rows.keys() != self.points.keys() or not all(self.points.values()):
            raise ConfigError(f"costs of {self.model}: every program has max_rows and at least one point; have {sorted(self.max_rows)}, {sorted(self.points)}")
        for name, points in self.points.items():
            rows = [point.rows for point in points]
            if not (self.max_rows[name] >= 1 and rows[0] >= 1 and all(a < b for a, b in pairwise(rows))):
                raise ConfigError(f"costs of {name}: rows {rows} with at most {self.max_rows[name]}; they start at 1 or more and increase")
            for point in points:
                if not (0 < point.seconds < math.inf and point.source.startswith(("measured: ", "assumed: "))):
                    raise ConfigError(f"costs of {name}: {point}; seconds are above 0, and source begins with 'measured: ' or 'assumed: '")
        for task, shape in self.tasks.items():
            if shape.branches < 1 or shape.steps < 1 or any(steps < 1 for steps in shape.menu.values()):
                raise ConfigError(f"task {task} of {self.model}: branches, steps and those of the menu are 1 or more, got {shape}")
            if lacking := {key[1] + "/" + key[2] for calls in self.rounds(task, 1) for key, _ in calls} - self.points.keys():
                raise ConfigError(f"task {task} of {self.model} runs {', '.join(sorted(lacking))}, for which there are no costs; add them to `programs`")

    def key(self, name: str) -> Key:
        program, profile = name.split("/")
        return self.model, program, profile

    @cached_property
    def limits(self) -> dict[Key, int]:
        """Rows that one batch may have, as an executor says it."""
        return {self.key(name): rows for name, rows in self.max_rows.items()}

    @cached_property
    def _by_rows(self) -> dict[Key, list[float]]:
        return {self.key(name): [0.0, *(along(self.points[name], rows) for rows in range(1, most + 1))] for name, most in self.max_rows.items()}

    def seconds(self, key: Key, rows: int) -> float:
        """Of one batch. More rows than a batch holds run in several, as the runner does it."""
        table = self._by_rows[key]
        whole, rest = divmod(rows, len(table) - 1)
        return whole * table[-1] + table[rest]

    def rounds(self, task: str, steps: int) -> tuple[Round, ...]:
        """All that a request asks for, in turn, as its pipeline does without previews and step caches. Raises NotFound for an unknown task."""
        if task not in self.tasks:
            raise unknown("task", task, self.tasks)
        shape = self.tasks[task]
        return rounds_of(self.model, shape.profile, steps, shape.branches * steps, picture=shape.picture)

    def alone_s(self, task: str, steps: int) -> float:
        """Of one request, one call at a time."""
        return sum(self.seconds(key, rows) for calls in self.rounds(task, steps) for key, rows in calls)

    def origins(self) -> list[str]:
        """Every number with its source, and what is made of them."""
        lines = []
        for name, points in self.points.items():
            lines += [f"{name}, {point.rows} rows: {point.seconds * 1e3:.4g} ms, {point.source}" for point in points]
            if points[-1].rows < self.max_rows[name]:
                how = "on the line of the last two" if len(points) > 1 else "in proportion to the rows"
                lines.append(f"{name}, {points[-1].rows + 1} to {self.max_rows[name]} rows: {how}, assumed: not measured")
            lines += [f"{name}, between {a.rows} and {b.rows} rows: on a line, assumed: not measured" for a, b in pairwise(points) if b.rows > a.rows + 1]
            if points[0].rows > 1:
                lines.append(f"{name}, below {points[0].rows} rows: as much as those, assumed: not measured")
        return lines


def along(points: tuple[Point, ...], rows: int) -> float:
    """Seconds on the line through the points; before the first as much as the first, after a lone one in proportion."""
    if rows <= points[0].rows:
        return points[0].seconds
    if len(points) == 1:
        return points[0].seconds * rows / points[0].rows
    a, b = next(((a, b) for a, b in pairwise(points) if rows <= b.rows), (points[-2], points[-1]))
    return a.seconds + (b.seconds - a.seconds) * (rows - a.rows) / (b.rows - a.rows)


def read_costs(path: Path) -> Costs:
    """From a JSON file: {"model", "sku", "programs": {"denoise/video": {"max_rows": 64, "points": [[rows, seconds, source], ...]}, ...},
    "tasks": {"text_to_video": {"profile", "branches", "picture", "steps", "menu"}, ...}}. Raises ConfigError.
    """
    try:
        data = json.loads(path.read_text())
        return Costs(
            data["model"], data["sku"], {name: each["max_rows"] for name, each in data["programs"].items()},
            {name: tuple(Point(*point) for point in each["points"]) for name, each in data["programs"].items()},
            {name: Task(**task) for name, task in data["tasks"].items()},
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(f"cannot read the costs {path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is no table of costs ({type(error).__name__}: {error}); see docs/simulation.md for its form") from error


REEL_TINY_ROWS = {
    "encode_text/any": 64, "encode_image/image": 16, "embed_time/any": 256, "denoise/video": 64, "denoise/image": 64, "decode/video": 16, "decode/image": 16,
}  # fmt: skip
"""Written out, so that a simulation builds no network; a test compares them with the model."""
REEL_TINY_TASKS = {"text_to_video": ("video", False), "text_to_image": ("image", False), "animate_sticker": ("video", True)}
"""Profile, and whether a picture is encoded."""


def shape_of(defaults: Defaults, profile: str, picture: bool) -> Task:
    """A task as a model's settings have it. Steps of the menu are as many as its forwards make with all branches."""
    branches = 1 if defaults.scale == 1 else 2
    menu = {quality: round(defaults.menu[quality].forwards / branches) for quality in defaults.qualities}
    return Task(profile, branches, picture, defaults.steps, menu)


def reel_tiny(results: Path = RESULTS) -> Costs:
    """reel-tiny on the CPU of our results: what they have was measured, the rest is assumed. Raises ConfigError where they are missing."""
    settings = MODELS["reel-tiny"].settings
    _, frames, _, _ = settings.latent_shape(settings.limits.frames[1], *settings.limits.sizes[0])
    quantised, sticker = (load_result(results / f"{name}.json") for name in ("quantised", "sticker"))
    plain = [r for r in quantised["rows"] if (r["model"], r["layers"]) == ("reel-tiny", "bfloat16")]
    denoise = tuple(Point(r["rows"], r["median_s"], "measured: median of `reelstep bench quantised`, bfloat16") for r in plain)
    stage = {r["stage"]: r["median_s"] for r in sticker["rows"]}

    def once(program: str, rows: int) -> tuple[Point, ...]:
        return (Point(rows, stage[program], "measured: median of `reelstep bench sticker`"),)

    def image(points: tuple[Point, ...]) -> tuple[Point, ...]:
        return tuple(Point(p.rows, p.seconds / frames, f"assumed: the video's, which has {frames} latent frames, by {frames}") for p in points)

    points = {
        "encode_text/any": once("encode_text", 2), "encode_image/image": once("encode_image", 1), "embed_time/any": once("embed_time", sticker["nfe"]),
        "denoise/video": denoise, "denoise/image": image(denoise),
        "decode/video": once("decode", 1), "decode/image": image(once("decode", 1)),
    }  # fmt: skip
    tasks = {task: shape_of(settings.defaults[task], *own) for task, own in REEL_TINY_TASKS.items()}
    return Costs("reel-tiny", "cpu", REEL_TINY_ROWS, points, tasks)


def load_result(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}, which the costs of reel-tiny come from ({error.strerror}); give other ones with --costs FILE") from error
