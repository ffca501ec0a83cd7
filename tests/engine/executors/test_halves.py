"""Guidance branches on halves of a mesh: once a request has dropped one, the half that ran it takes rows of another request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reelstep.engine.executors.inline import Inline
from reelstep.engine.executors.processes import World, start
from reelstep.engine.executors.restarting import Bounds, Restarting
from reelstep.engine.loop import Engine
from reelstep.engine.request import Request
from reelstep.parallel.mesh import Mesh
from reelstep.tests.engine.executors.toy_engine import Heard, ask, engine_on
from reelstep.tests.engine.executors.toy_ranks import MODEL, Halves, runner, worded

STEPS = 12
NULL = 1 / 32
"""The mean of the empty prompt's tokens: one that ends it, and 31 zeros."""

Row = tuple[float, float]
"""The mean of its words, and the first value of its latent."""


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Path]]:
    folder = tmp_path_factory.mktemp("halves")
    begin = partial(start, World(Mesh.parse("cfg=2"), "gloo", start_s=60.0, load_s=60.0, collective_s=20.0, silence_s=4.0), Halves(folder))
    engine = engine_on(Restarting([begin], Bounds(starts=3, window_s=60.0, reruns=2)))
    yield engine, folder
    engine.close(1.0)


def adaptive(number: int, prompt: str, guided: int) -> Request:
    """Guided for `guided` evaluations, and by the prompt alone for the others: the threshold is met at once."""
    options = {"threshold": -1.0, "guided": float(guided)}
    return replace(ask(number, STEPS), prompt=prompt, guidance="adaptive", guidance_options=options)


def results(engine: Engine, requests: list[Request]) -> list[np.ndarray[Any, Any]]:
    heard = [Heard() for _ in requests]
    for request, each in zip(requests, heard, strict=True):
        engine.submit(request, each)
    return [each.result().media.frames for each in heard]


def noted(folder: Path) -> list[tuple[list[Row], list[Row]]]:
    """Of every denoiser call, the rows of both halves; the second has none where it ran what the first did, for lack of another."""
    lines = zip(*((folder / f"rows-{rank}").read_text().splitlines() for rank in (0, 1)), strict=True)
    calls = [([tuple(row) for row in json.loads(first)], [tuple(row) for row in json.loads(second)]) for first, second in lines]
    return [(first, [] if second == first else second) for first, second in calls]


def spent(calls: list[tuple[list[Row], list[Row]]]) -> int:
    """Rows one after another: of the half that has more, since the other waits for it."""
    return sum(max(len(first), len(second)) for first, second in calls)


def spent_if_branches_had_halves(calls: list[tuple[list[Row], list[Row]]]) -> int:
    """The same calls with the prompt's rows always on one half and the null rows on the other."""
    rows = [[*first, *second] for first, second in calls]
    return sum(max(sum(words == NULL for words, _ in each), sum(words != NULL for words, _ in each)) for each in rows)


def test_rows_of_two_requests_that_dropped_a_branch_fill_both_halves_and_give_one_devices_numbers(halves: tuple[Engine, Path]) -> None:
    engine, folder = halves
    requests = [adaptive(1, "a cat", guided=3), adaptive(2, "a dog", guided=5)]
    found = results(engine, requests)
    alone = engine_on(Inline({MODEL: runner(worded)}))
    for frames, wanted in zip(found, results(alone, requests), strict=True):
        assert np.array_equal(frames, wanted)
    alone.close(1.0)

    calls = noted(folder)
    together = [index for index, (first, second) in enumerate(calls) if len({words for words, _ in (*first, *second) if words != NULL}) == 2]
    both = calls[together[0] : together[-1] + 1]
    assert len(both) >= STEPS - 2, "the second request comes at most a call or two later"
    assert all(second for _, second in both), "no half is idle while two requests run"
    dropped = [(first, second) for first, second in both if all(words != NULL for words, _ in (*first, *second))]
    assert len(dropped) >= STEPS - 7
    assert all(len(first) == len(second) == 1 and first[0][0] != second[0][0] for first, second in dropped), "one request's row on each half"
    assert spent(both) == 2 * (len(both) - len(dropped)) + len(dropped)
    assert spent_if_branches_had_halves(both) == 2 * len(both), "a half of its own for each branch would idle once a request has dropped one"
