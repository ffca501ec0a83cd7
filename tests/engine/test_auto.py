"""Quality `auto` in the engine and over the wire: fewer steps where the deadline asks for it, and nothing else."""

import itertools
import math
import time
from dataclasses import replace

import numpy as np
import pytest

from reelstep.engine.client import Client
from reelstep.engine.executors.inline import Inline
from reelstep.engine.loop import Engine, warm_up, warmed_up
from reelstep.engine.request import Choice
from reelstep.engine.resolve import Ask, resolve
from reelstep.errors import DeadlineExceeded, InvalidRequest, NotFound
from reelstep.tests.engine.conftest import SETTINGS, Heard, make_model, make_request, make_runner
from reelstep.tests.engine.service.in_process import served

STEPS = {"draft": 1, "standard": 4, "best": 40}  # far apart, so that a busy machine changes no choice
MENU = {
    quality: Choice(solver="euler", steps=n, forwards=n, psnr_db=30.0 + n, ssim=0.9, frechet=None, command="nobody measures a toy")
    for quality, n in STEPS.items()
}
VIDEO = replace(SETTINGS.defaults["text_to_video"], menu=MENU)
MODEL = replace(make_model(), settings=replace(SETTINGS, tasks=("text_to_video",), defaults={"text_to_video": VIDEO}))
NUMBERS = itertools.count()


@pytest.fixture
def make_engine():
    """Engines whose denoiser takes so long for a batch and for each of its rows, warm unless that is not wanted."""
    made = []

    def make(batch_s, row_s=0.0, warm=True):
        def slow(inputs):
            time.sleep(batch_s + row_s * len(inputs["x"]))
            return {"velocity": -inputs["x"]}

        made.append(Engine({"toy": MODEL}, Inline({"toy": make_runner(denoise=slow)})))
        if warm:
            for several in (False, True):
                warm_up(made[-1], MODEL, "text_to_video", "", several)
        return made[-1]

    yield make
    for engine in made:
        engine.close(0)


def ask(engine, within_s=math.inf, **asked):
    return resolve(Ask("a cat", deadline=time.monotonic() + within_s, **{"quality": "auto", "seed": 3, **asked}), engine.models)


def run(engine, request):
    heard = Heard()
    engine.submit(request, heard)
    return heard


def test_a_tight_deadline_gets_fewer_steps_and_is_met_where_the_best_expires(make_engine):
    engine = make_engine(0.02)
    assert isinstance(run(engine, ask(engine, 0.75, quality="best")).error(), DeadlineExceeded), "40 steps take 0.8 s"
    usage = run(engine, ask(engine, 0.75)).result().usage
    assert (usage.quality, usage.nfe) == ("standard", 4)
    usage = run(engine, ask(engine, 9.0)).result().usage
    assert (usage.quality, usage.nfe) == ("best", 40)
    assert run(engine, ask(engine, 9.0, quality="draft")).result().usage.quality == "", "nothing was chosen for it"


def test_what_shares_the_device_leaves_fewer_steps(make_engine):
    engine = make_engine(0.0, row_s=0.005)
    began = time.monotonic()
    run(engine, ask(engine, quality="best")).result()
    within_s = 3 * (time.monotonic() - began)
    others = [run(engine, make_request(steps=20, seed=k)) for k in range(7)]
    assert run(engine, ask(engine, within_s)).result().usage.quality == "standard", "beside seven others the best takes eight times as long"
    for other in others:
        other.result()
    assert run(engine, ask(engine, within_s)).result().usage.quality == "best"


def test_the_choice_is_made_when_a_place_is_free_since_waiting_eats_the_time(make_engine):
    engine = make_engine(0.02)
    engine.max_running = 1
    first = run(engine, make_request(steps=20, seed=1))
    waited = run(engine, ask(engine, 1.2))  # 0.4 s go by before its turn; at its arrival 0.8 s of its own were in time
    first.result()
    assert waited.result().usage.quality == "standard"


def test_a_cold_engine_promises_nothing_and_no_deadline_is_no_reason_to_shorten(make_engine):
    engine = make_engine(0.0, warm=False)
    assert run(engine, ask(engine, 60.0)).result().usage.quality == "draft"
    assert run(make_engine(0.0, warm=False), ask(engine)).result().usage.quality == "best"


def test_what_the_first_calls_wait_for_is_not_expected_of_later_ones():
    """A program that is opened when it is first called, once for a lone row and once for several, as OpenVINO's are."""
    opened = set()

    def opens(inputs):
        if (several := len(inputs["x"]) > 1) not in opened:
            opened.add(several)
            time.sleep(0.5)
        return {"velocity": -inputs["x"]}

    engine = warmed_up(Engine({"toy": MODEL}, Inline({"toy": make_runner(denoise=opens)})))
    try:
        assert opened == {False, True}
        assert run(engine, ask(engine, 5.0)).result().usage.quality == "best", "40 calls of half a second would be 20 s"
    finally:
        engine.close(0)


def test_what_ran_can_be_sent_again_for_the_same_pixels(make_engine):
    engine = make_engine(0.01)
    request = ask(engine, 0.3)
    done = run(engine, request).result()
    assert done.usage.quality in ("draft", "standard")
    again = replace(request.settled(done.usage.quality), id="again", deadline=math.inf)
    assert (again.auto, again.steps) == ({}, STEPS[done.usage.quality])
    assert np.array_equal(run(engine, again).result().media.frames, done.media.frames)
    by_name = run(engine, ask(engine, quality=done.usage.quality)).result()
    assert np.array_equal(by_name.media.frames, done.media.frames)
    other = run(engine, ask(engine, quality="best")).result()
    assert not np.array_equal(other.media.frames, done.media.frames)


def test_over_the_wire_a_timeout_chooses_and_the_answer_says_so_and_gives_the_same_again(make_engine):
    engine = make_engine(0.04)
    with served(engine) as server, Client(server.address) as client:
        got = client.generate("a cat", quality="auto", timeout=1.5, seed=5, media_type="image/webp")
        assert (got.quality, got.auto, got.steps, got.solver) == ("standard", True, 4, "euler")
        again = client.generate(
            "a cat", solver=got.solver, schedule=got.schedule, steps=got.steps, guidance=got.guidance, scale=got.scale, seed=5, media_type="image/webp"
        )
        assert [each.data for each in again.artifacts] == [each.data for each in got.artifacts]
        assert (again.quality, again.auto) == ("", False)
        free = client.generate("a cat", quality="auto")
        assert (free.quality, free.auto, free.steps) == ("best", True, 40), "it has the server's own deadline, of minutes"
        with pytest.raises(InvalidRequest, match=r"quality: 'auto' chooses .* leave quality out, or else steps"):
            client.generate("a cat", quality="auto", steps=3)
        with pytest.raises(NotFound, match=r"no quality 'Auto' .* it has: draft, standard, best; auto is the best of them that the deadline allows;"):
            client.generate("a cat", quality="Auto")
