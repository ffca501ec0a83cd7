"""The loop, on a model whose answer is known."""

import logging
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from reelstep.engine import loop
from reelstep.engine.executors.inline import Inline
from reelstep.engine.loop import Engine, warm_up
from reelstep.engine.request import Preview, Progress, Queued
from reelstep.engine.resolve import Ask, resolve
from reelstep.engine.runner import Runner
from reelstep.engine.samplers.step_cache import STEP_CACHES
from reelstep.errors import (
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NotFound,
    Overloaded,
    StorageError,
    Unavailable,
    UnsupportedRequest,
)
from reelstep.tests.engine.conftest import Heard, make_request


def pixel(value: float) -> int:
    return round((value + 1) * 127.5)


def test_a_request_ends_at_the_models_target_whatever_the_steps(toy, closed_form):
    _, _, (target, _) = closed_form
    for steps in (1, 3, 10):
        frames = toy.submit(steps=steps).result().media.frames
        assert frames.shape == (1, 8, 16, 16, 3)
        assert frames.dtype == np.uint8
        assert (frames == pixel(target)).all()


def test_guidance_extrapolates_and_costs_two_forwards(toy, closed_form):
    _, _, (target, null) = closed_form
    result = toy.submit(steps=5, scale=1.5).result()
    assert (result.media.frames == pixel(null + 1.5 * (target - null))).all()
    assert (result.usage.nfe, result.usage.forwards) == (5, 10)
    plain = toy.submit(steps=5, scale=1.0).result()
    assert (plain.usage.nfe, plain.usage.forwards) == (5, 5)


def test_events_come_in_order_and_end_once(toy):
    heard = toy.submit(steps=3)
    heard.result()
    assert isinstance(heard.events[0], Queued)
    steps = [e.step for e in heard.events if isinstance(e, Progress) and e.stage == "denoise"]
    assert steps == [0, 1, 2]
    assert [e.stage for e in heard.events if isinstance(e, Progress)][-1] == "decode"


def test_requests_at_different_steps_share_batches(make_toy, closed_form):
    _, programs, _ = closed_form
    gate, entered = threading.Event(), threading.Event()

    def slow(inputs):
        entered.set()
        gate.wait(20)
        return programs["denoise", "video"](inputs)

    toy = make_toy({"denoise": slow})
    first = toy.submit(steps=6)
    assert entered.wait(20)
    others = [toy.submit(steps=4) for _ in range(3)]  # they come while the first is inside its first step
    time.sleep(0.05)
    gate.set()
    for heard in (first, *others):
        heard.result()
    assert [b.rows for b in toy.batches if b.key[1] == "denoise"] == [1, 4, 4, 4, 4, 1]


def fall(inputs):
    """Unlike the exact velocity, this one leaves every output its own noise."""
    return {"velocity": -inputs["x"]}


def test_an_output_does_not_depend_on_what_it_was_batched_with(make_toy):
    toy = make_toy({"denoise": fall})
    alone = toy.submit(seed=5, steps=3, preview_every=1)
    whole = alone.result()
    batched = [toy.submit(seed=s, steps=3, preview_every=1) for s in (4, 5, 6)]
    assert [np.array_equal(h.result().media.frames, whole.media.frames) for h in batched] == [False, True, False]
    previews = [[e.frames for e in h.events if isinstance(e, Preview)] for h in (alone, batched[1])]
    assert len(previews[0]) == 2
    for one, other in zip(*previews, strict=True):
        assert np.array_equal(one, other)


def test_each_output_of_a_count_has_its_own_seed(make_toy):
    toy = make_toy({"denoise": fall})
    several = toy.submit(seed=7, count=3, steps=2, preview_every=1)
    media = several.result().media
    assert media.seeds == (7, 8, 9)
    assert media.frames.shape[0] == 3
    second = toy.submit(seed=8, steps=2, preview_every=1)
    assert np.array_equal(media.frames[1], second.result().media.frames[0])
    assert not np.array_equal(media.frames[0], media.frames[1])
    halfway = [next(e.frames for e in h.events if isinstance(e, Preview)) for h in (several, second)]
    assert np.array_equal(halfway[0][1], halfway[1][0])


def test_each_output_of_a_count_is_guided_on_its_own(make_toy):
    """Where guidance ends depends on the noise; an output with others beside it must end where it ends alone."""

    def disagree(inputs):
        said, t = inputs["context"][:, 0, 0], inputs["modulation"][:, 0, 0]
        turned = torch.where((said > 0)[:, None, None, None, None], inputs["x"], inputs["x"].roll(1, -1))
        return {"velocity": -torch.lerp(turned, inputs["x"], t[:, None, None, None, None])}

    toy = make_toy({"denoise": disagree})
    options = {"steps": 12, "scale": 3.0, "guidance": "adaptive", "guidance_options": {"threshold": 0.6}}
    alone = [toy.submit(seed=s, **options).result() for s in range(20, 24)]
    together = toy.submit(seed=20, count=4, **options).result()
    forwards = [done.usage.forwards for done in alone]
    assert len(set(forwards)) > 1, "they latch at different steps"
    assert all(12 < n < 24 for n in forwards)
    assert together.usage.forwards == max(forwards)
    assert all(np.array_equal(together.media.frames[k], done.media.frames[0]) for k, done in enumerate(alone))


def test_mixed_traffic_gives_what_each_request_gives_alone(make_toy):
    gate = threading.Event()
    gate.set()
    toy = make_toy({"denoise": lambda inputs: gate.wait(20) and fall(inputs)})
    kinds = [
        {"solver": "euler", "steps": 3, "scale": 2.0},
        {"solver": "heun", "steps": 4, "scale": 5.0, "guidance": "delta_hold"},
        {"solver": "midpoint", "steps": 2, "guidance": "none"},
        {"solver": "lcm", "steps": 4, "scale": 3.0, "guidance": "apg"},
        {"solver": "dpmpp_2m_sde", "steps": 5, "scale": 1.5, "guidance": "picture_and_text", "guidance_options": {"picture": 2.0}},
    ]
    alone = [toy.submit(seed=k, **kind).result() for k, kind in enumerate(kinds)]
    toy.batches.clear()
    gate.clear()
    heard = [toy.submit(seed=k, **kind) for k, kind in enumerate(kinds)]
    gate.set()
    together = [each.result() for each in heard]
    assert max(b.calls for b in toy.batches if b.key[1] == "denoise") > 1, "they did share batches, of how many calls hangs on what earlier ones took"
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one.media.frames, other.media.frames)
        assert (one.usage.nfe, one.usage.forwards) == (other.usage.nfe, other.usage.forwards)


def test_a_fitted_solver_runs_its_own_times_whatever_the_schedule(toy, closed_form):
    _, _, (target, _) = closed_form
    done = toy.submit(solver="bns_2", steps=2, schedule="linear_quadratic").result()
    assert done.usage.nfe == 2
    assert abs(int(done.media.frames[0, 0, 0, 0, 0]) - pixel(target)) <= 1


def test_a_fitted_guidance_runs_with_fewer_forwards_and_its_result_is_its_own(make_toy):
    toy = make_toy({"denoise": lambda inputs: {"velocity": fall(inputs)["velocity"] + inputs["context"][:, :1, :1, None, None]}})
    options = {"steps": 4, "scale": 2.0, "seed": 3}
    fitted, full = (toy.submit(guidance=name, **options).result() for name in ("linear_4", "cfg"))
    plain = toy.submit(guidance="none", **{**options, "scale": 1.0}).result()
    assert (fitted.usage.forwards, full.usage.forwards) == (6, 8)
    assert np.array_equal(fitted.media.frames, full.media.frames), "the difference of the branches is constant here"
    assert not np.array_equal(fitted.media.frames, plain.media.frames)


def test_what_is_fitted_is_offered_with_what_it_holds_for(make_toy):
    served = make_toy().engine.models["toy"]
    assert {"bns_2", "euler"} <= set(served.solvers)
    assert "linear_4" not in served.solvers
    assert set(served.fits) == {"bns_2", "linear_4"}
    assert served.guidance_rules["linear_4"] == {}
    assert served.guidance_rules["adaptive"] == {"threshold": 0.7, "guided": 1.0}, "as calibrated, and the rule's own"
    request = resolve(Ask("a cat", guidance="linear_4"), {"toy": served})
    assert (request.solver, request.schedule, request.steps, request.scale) == ("euler", "linear", 4, 2.0)
    with pytest.raises(InvalidRequest) as caught:
        resolve(Ask("a cat", guidance="linear_4", solver="bns_2"), {"toy": served})
    assert {v.field for v in caught.value.violations} == {"guidance"}


def rows_by_program(toy):
    found = {}
    for batch in toy.batches:
        found[batch.key[1]] = found.get(batch.key[1], 0) + batch.rows
    return found


def test_a_step_cache_skips_calls_and_usage_says_how_many_ran(toy):
    """The first block adds 1 + text + t, so after it ran whole at t' the network does so again where t - t' >= 0.19 (1 + text + t')."""
    usage = toy.submit(steps=8, scale=2.0, step_cache="first_block", step_cache_options={"threshold": 0.19}).result().usage
    whole = 2  # the last evaluation of each branch
    for text in (0, 1):
        last = -8
        for j in range(7):
            if (j - last) / 8 >= 0.19 * (1 + text + last / 8):
                last, whole = j, whole + 1
    assert whole == 7, "text at 0 and 4, null at 0, 2 and 4"
    ran = rows_by_program(toy)
    assert (ran["denoise_embed"], ran["denoise_rest"], ran["denoise"]) == (14, whole - 2, 2)
    assert ran["denoise_last"] == 16 - whole
    assert (usage.nfe, usage.forwards, usage.cached) == (8, whole, 16 - whole)


@pytest.mark.parametrize("step_cache", list(STEP_CACHES))
def test_threshold_0_is_no_step_cache_and_one_that_is_never_reached_changes_no_pixel(step_cache, toy):
    plain = toy.submit(steps=5, scale=2.0).result()
    toy.batches.clear()
    off = toy.submit(steps=5, scale=2.0, step_cache=step_cache, step_cache_options={"threshold": 0.0}).result()
    assert {name for name in rows_by_program(toy) if name.startswith("denoise")} == {"denoise"}
    never = toy.submit(steps=5, scale=2.0, step_cache=step_cache, step_cache_options={"threshold": 1e-30}).result()
    assert rows_by_program(toy)["denoise_rest"] == 8
    for other in (off, never):
        assert np.array_equal(other.media.frames, plain.media.frames)
        assert (other.usage.forwards, other.usage.cached) == (10, 0)


def test_adaptive_guidance_measures_fresh_branches_and_caches_after_it_has_let_go(make_toy):
    options = {"steps": 12, "scale": 3.0, "guidance": "adaptive", "guidance_options": {"threshold": -1.0, "guided": 6.0}}
    toy = make_toy({"denoise_rest": lambda inputs: {"velocity": -inputs["hidden"][:, :3], "residual": torch.zeros_like(inputs["hidden"])}})
    cache = {"step_cache": "first_block", "step_cache_options": {"threshold": 10.0}}
    usage = toy.submit(**options, **cache).result().usage
    assert (usage.nfe, usage.forwards, usage.cached) == (12, 13, 5), "6 guided evaluations run both branches; of the 6 others all but the last are skipped"
    plain = toy.submit(steps=12, scale=3.0, guidance="cfg", **cache).result().usage
    assert (plain.forwards, plain.cached) == (4, 20)


def test_requests_with_different_step_caches_share_batches_and_each_gets_what_it_gets_alone(make_toy):
    toy = make_toy({"denoise": fall})
    kinds = [
        {"step_cache": "teacache", "step_cache_options": {"threshold": 0.5}, "scale": 2.0},
        {"step_cache": "first_block", "step_cache_options": {"threshold": 0.3}, "scale": 3.0, "count": 2},
        {"step_cache": "first_block", "step_cache_options": {"threshold": 0.1}, "guidance": "delta_hold", "scale": 2.0},
        {"scale": 2.0},
    ]
    alone = [toy.submit(seed=k, steps=7, **kind).result() for k, kind in enumerate(kinds)]
    toy.batches.clear()
    together = [heard.result() for heard in [toy.submit(seed=k, steps=7, **kind) for k, kind in enumerate(kinds)]]
    assert max(b.rows for b in toy.batches if b.key[1] == "denoise_embed") > 4, "they did share batches"
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one.media.frames, other.media.frames)
        assert (one.usage.forwards, one.usage.cached) == (other.usage.forwards, other.usage.cached)
    assert all(done.usage.cached > 0 for done in alone[:3])


def test_each_output_of_a_count_is_cached_on_its_own(make_toy):
    """TeaCache's signal depends on the noise, so outputs skip at different steps; usage is that of the one that ran most."""
    toy = make_toy({"denoise": fall})
    options = {"steps": 6, "step_cache": "teacache", "step_cache_options": {"threshold": 0.3}}
    alone = [toy.submit(seed=s, **options).result() for s in range(30, 34)]
    together = toy.submit(seed=30, count=4, **options).result()
    assert len({done.usage.cached for done in alone}) > 1
    assert together.usage.forwards == max(done.usage.forwards for done in alone)
    assert all(np.array_equal(together.media.frames[k], done.media.frames[0]) for k, done in enumerate(alone))


@pytest.mark.parametrize(
    ("asked", "field", "message"),
    [
        ({"steps": 1}, "step_cache", "there are 1; take more steps"),
        ({"steps": 2}, "step_cache", "there are 2; take more steps"),
        ({"solver": "heun", "steps": 1}, "step_cache", "there are 2; take more steps"),
        ({"step_cache_options": {"threshold": -1.0}}, "step_cache_options", "is -1.0; 0 to 10"),
        ({"step_cache_options": {"c1": 1.0}}, "step_cache_options", "known: first, last, threshold"),
        ({"guidance": "linear_4"}, "step_cache", "'linear_4' was fitted to the network's own outputs"),
    ],
)
def test_what_a_step_cache_does_not_take_is_refused_before_any_compute(asked, field, message, toy):
    with pytest.raises(InvalidRequest) as caught:
        resolve(Ask("a cat", step_cache="first_block", **asked), toy.engine.models)
    assert [violation.field for violation in caught.value.violations] == [field]
    assert message in str(caught.value)
    assert toy.batches == []


def test_a_step_cache_has_the_options_that_were_calibrated_and_goes_with_a_fitted_solver(toy):
    request = resolve(Ask("a cat", step_cache="first_block", step_cache_options={"last": 0.0}, solver="heun", steps=2), toy.engine.models)
    assert (request.step_cache, request.step_cache_options) == ("first_block", {"threshold": 0.2, "first": 1.0, "last": 0.0})
    assert toy.engine.models["toy"].step_caches["teacache"]["threshold"] == STEP_CACHES["teacache"].options["threshold"].default
    assert toy.engine.models["toy"].step_cache(request).evaluations == 4, "of heun, two a step"
    fitted = resolve(Ask("a cat", step_cache="first_block", step_cache_options={"last": 0.0}, solver="bns_2"), toy.engine.models)
    assert toy.engine.models["toy"].step_cache(fitted).evaluations == 2
    assert resolve(Ask("a cat"), toy.engine.models).step_cache == ""


def test_a_model_without_pieces_and_an_unknown_step_cache_are_refused(toy):
    served = toy.engine.models["toy"]
    with pytest.raises(UnsupportedRequest, match="'toy' was compiled without what a step cache needs; leave step_cache out"):
        resolve(Ask("a cat", step_cache="first_block"), {"toy": replace(served, in_pieces=False)})
    with pytest.raises(NotFound, match="unknown step cache 'magic'; known: first_block, teacache"):
        resolve(Ask("a cat", step_cache="magic"), {"toy": served})
    with pytest.raises(InvalidRequest, match="without a step cache; name one"):
        resolve(Ask("a cat", step_cache_options={"threshold": 0.1}), {"toy": served})


def test_cancelling_stops_between_calls(make_toy, closed_form):
    _, programs, _ = closed_form
    calls = []

    def counted(inputs):
        calls.append(1)
        time.sleep(0.01)
        return programs["denoise", "video"](inputs)

    toy = make_toy({"denoise": counted})
    heard = toy.submit(id="stop me", steps=100)
    while len(calls) < 3:
        time.sleep(0.005)
    toy.engine.cancel("stop me")
    assert isinstance(heard.error(), Cancelled)
    ran = len(calls)
    time.sleep(0.1)
    assert len(calls) == ran < 100


def test_a_deadline_ends_a_running_request_and_says_where(make_toy, closed_form):
    _, programs, _ = closed_form

    def slow(inputs):
        time.sleep(0.05)
        return programs["denoise", "video"](inputs)

    toy = make_toy({"denoise": slow})
    began = time.monotonic()
    heard = toy.submit(steps=100, deadline=began + 0.3)
    error = heard.error()
    assert isinstance(error, DeadlineExceeded)
    assert error.stage == "denoise"
    assert time.monotonic() - began < 0.3 + 0.05 + 0.2, "it ends within one call of the deadline"


def test_what_is_already_too_late_is_refused_before_any_compute(toy):
    with pytest.raises(DeadlineExceeded, match="queued"):
        toy.submit(deadline=time.monotonic() - 1)
    assert toy.batches == []


@pytest.fixture
def blocked(closed_form):
    """What lets the denoiser run, and the denoiser, which waits for it."""
    _, programs, _ = closed_form
    gate = threading.Event()

    def denoise(inputs):
        gate.wait(20)
        return programs["denoise", "video"](inputs)

    return gate, denoise


def test_requests_that_run_at_once_share_the_time_that_the_next_one_waits(make_toy, blocked):
    gate, denoise = blocked
    toy = make_toy({"denoise": denoise}, max_running=4, max_queued=16)
    heard = [toy.submit() for _ in range(20)]
    with pytest.raises(Overloaded, match="20 requests are running or queued, the limit; try again in 1 s"):
        toy.submit()
    gate.set()
    for each in heard:
        each.result()
    assert [next(e for e in each.events if isinstance(e, Queued)).estimated_wait_s for each in heard] == [0.0] * 4 + [k / 4 for k in range(1, 17)]


def test_a_full_queue_refuses_and_says_when_to_come_back(make_toy, blocked):
    gate, denoise = blocked
    toy = make_toy({"denoise": denoise}, max_running=1, max_queued=1)
    heard = [toy.submit(), toy.submit()]
    with pytest.raises(Overloaded) as caught:
        toy.submit()
    assert caught.value.retry_after_s == 1.0, "the first request's own time is taken for a second"
    gate.set()
    for each in heard:
        each.result()
    toy.submit().result()


def test_a_program_that_fails_fails_its_requests_only(make_toy, closed_form, caplog):
    _, programs, _ = closed_form
    broken = [True]

    def sometimes(inputs):
        if broken.pop() if broken else False:
            raise RuntimeError("device lost")
        return programs["denoise", "video"](inputs)

    toy = make_toy({"denoise": sometimes})
    error = toy.submit().error()
    assert isinstance(error, InternalError)
    assert "device lost" in str(error)
    toy.submit().result()


def test_an_error_of_ours_is_a_line_in_the_log_and_another_one_has_its_trace(make_toy, caplog):
    def fails(error):
        def program(inputs):
            raise error

        return make_toy({"decode": program}).submit().error()

    caplog.set_level(logging.INFO)
    assert isinstance(fails(StorageError("the cache is read-only")), StorageError)
    assert isinstance(fails(RuntimeError("device lost")), InternalError)
    ours, other = (record for record in caplog.records if record.name == "reelstep.engine.loop")
    assert (ours.levelno, ours.exc_info, ours.getMessage()) == (logging.INFO, None, "program decode of toy failed: the cache is read-only")
    assert other.levelno == logging.ERROR
    assert "RuntimeError: device lost" in other.exc_text


def test_a_request_that_cannot_begin_and_a_listener_that_raises_leave_the_engine_at_work(make_toy, monkeypatch):
    def bad(*_):
        raise MemoryError("too little")

    toy = make_toy()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "expected_rounds", bad)
        error = toy.submit().error()
    assert isinstance(error, InternalError)
    assert "text_to_video could not begin: too little" in str(error)
    toy.engine.submit(make_request(), bad)
    assert toy.submit().result()


def nothing_finite(inputs):
    return {"video": torch.full((len(inputs["latent"]), 3, 4, 16, 16), float("nan"))}


def test_what_a_pipeline_refuses_is_a_line_in_the_log_too(make_toy, caplog):
    caplog.set_level(logging.INFO)
    assert isinstance(make_toy({"decode": nothing_finite}).submit().error(), InternalError)
    (record,) = (record for record in caplog.records if record.name == "reelstep.engine.loop")
    assert record.exc_info is None


def test_nan_from_the_decoder_is_an_error_not_a_picture(make_toy):
    toy = make_toy({"decode": nothing_finite})
    assert isinstance(toy.submit().error(), InternalError)


def test_bad_requests_never_reach_a_program(toy):
    for changed in ({"model": "nope"}, {"solver": "nope"}, {"schedule": "nope"}):
        with pytest.raises(NotFound, match=r"nope.*known"):
            toy.submit(**changed)
    for field, value in (("steps", 0), ("steps", 101), ("frames", 9), ("count", 5), ("scale", float("nan")), ("scale", -1.0), ("prompt", "  "), ("seed", -1)):
        with pytest.raises(InvalidRequest) as caught:
            toy.submit(**{field: value})
        assert len(caught.value.violations) == 1
    toy.submit(id="twice", steps=50)
    with pytest.raises(ConfigError, match="in use"):
        toy.submit(id="twice")
    assert {b.key[1] for b in toy.batches} <= {"encode_text", "embed_time", "denoise", "decode"}


def test_all_violations_are_reported_at_once(toy):
    with pytest.raises(InvalidRequest) as caught:
        toy.submit(steps=0, count=0, scale=float("inf"), width=17)
    assert [v.field for v in caught.value.violations] == ["width", "steps", "count", "scale"]


def test_a_closed_engine_finishes_what_runs_and_takes_nothing_new(make_toy):
    toy = make_toy()
    heard = toy.submit(steps=20)
    toy.engine.close(10)
    heard.result()
    with pytest.raises(Unavailable):
        toy.submit()


class Gated:
    """An executor of several replicas; each batch waits for a word of its own, and may be told to fail."""

    inline = False

    def __init__(self, runner, capacity):
        self.inner, self.capacity = Inline({"toy": runner}), capacity
        self.max_rows = self.inner.max_rows
        self.changed = threading.Condition()
        self.inside = []  # the calls of every batch that waits
        self.allowed = []

    def run(self, model, calls):
        with self.changed:
            self.inside.append(calls)
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: any(calls is each for each, _ in self.allowed), 20)
            fate = next(fate for each, fate in self.allowed if each is calls)
        if fate is not None:
            raise fate
        return self.inner.run(model, calls)

    def wait_for(self, batches):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.inside) >= batches, 20), f"{len(self.inside)} batches run, not {batches}"

    def let(self, position=0, fate=None):
        """The batch at this position of those that wait goes on, or fails."""
        with self.changed:
            self.allowed.append((self.inside.pop(position), fate))
            self.changed.notify_all()

    def let_all(self):
        with self.changed:
            while self.inside:
                self.allowed.append((self.inside.pop(), None))
            self.changed.notify_all()


@pytest.fixture
def make_gated(make_toy, closed_form):
    """Engines whose batches wait; everything is let go at the end."""
    _, programs, _ = closed_form
    made = []

    def make(capacity, max_batch=1):
        executor = Gated(Runner(programs, dict.fromkeys(programs, max_batch)), capacity)
        toy = make_toy()
        toy.engine.close(0)
        toy.engine = Engine({"toy": toy.engine.models["toy"]}, executor, on_batch=toy.batches.append)
        made.append((toy, executor))
        return made[-1]

    yield make
    done = threading.Event()

    def open_gates(executor):
        while not done.wait(0.01):
            executor.let_all()

    openers = [threading.Thread(target=open_gates, args=(executor,)) for _, executor in made]
    for opener in openers:
        opener.start()
    for toy, _ in made:
        toy.engine.close(0)
    done.set()
    for opener in openers:
        opener.join()


@pytest.fixture
def gated(make_gated):
    return make_gated(2)


def until_heard(heard):
    """The loop knows of them."""
    while not all(each.events for each in heard):
        time.sleep(0.001)


def run_freely(executor, heard):
    while not all(each.ended.is_set() for each in heard):
        executor.let_all()
        time.sleep(0.001)


def test_as_many_batches_run_as_there_are_replicas_and_no_more(gated, closed_form):
    toy, executor = gated
    heard = [toy.submit(seed=k, steps=2) for k in range(3)]
    executor.wait_for(2)
    time.sleep(0.05)
    assert len(executor.inside) == 2, "the third waits for a replica"
    executor.let(1)
    executor.wait_for(2)
    run_freely(executor, heard)
    assert all((each.result().media.frames == pixel(closed_form[2][0])).all() for each in heard)


def test_results_that_overtake_each_other_reach_their_own_requests(make_gated, make_toy):
    plain = make_toy({"denoise": fall})
    wanted = [plain.submit(seed=k, steps=3, preview_every=1).result().media.frames for k in range(4)]
    toy, executor = make_gated(3)
    executor.inner.runners["toy"].executables = {**executor.inner.runners["toy"].executables, ("denoise", "video"): fall}
    heard = [toy.submit(seed=k, steps=3, preview_every=1) for k in range(4)]
    while not all(each.ended.is_set() for each in heard):
        with executor.changed:
            if executor.inside:
                executor.let(-1)  # the one that came last ends first
        time.sleep(0.001)
    for each, want in zip(heard, wanted, strict=True):
        assert np.array_equal(each.result().media.frames, want)


def test_one_replica_runs_one_batch_at_a_time_and_those_that_come_meanwhile_go_together(make_gated):
    toy, executor = make_gated(1, max_batch=8)
    heard = [toy.submit(steps=2, scale=2.0)]
    executor.wait_for(1)
    heard += [toy.submit(steps=2, scale=2.0) for _ in range(2)]
    until_heard(heard)
    while not all(each.ended.is_set() for each in heard):
        assert len(executor.inside) <= 1
        executor.let_all()
        time.sleep(0.001)
    assert {(b.key[1], b.rows) for b in toy.batches} >= {("encode_text", 2), ("encode_text", 4)}


def test_what_a_request_will_call_is_opened_beside_its_first_calls(toy):
    opened = []

    def opens(key, rows):
        if threading.current_thread().name.startswith("reelstep-batch"):  # else it is before the call itself
            opened.append((key, rows))
            if key[1] == "decode":
                raise OSError("the blob is gone: the call itself will say so")

    engine = Engine(toy.engine.models, toy.engine._executor, opens=opens, on_batch=toy.batches.append)
    try:
        heard = Heard()
        engine.submit(make_request(scale=3.0, guidance="cfg", steps=2), heard)
        heard.result()
    finally:
        engine.close(0)
    assert [(key, rows) for key, rows in opened if key[1] != "decode"] == [(("toy", "denoise", "video"), 2)]
    assert opened[-1] == (("toy", "decode", "video"), 3), "all tiles"
    assert {*opened} <= {(batch.key, batch.rows) for batch in toy.batches}, "nothing is opened that is not called"


def test_what_is_opened_first_is_not_counted_as_compute(toy):
    opened = []

    def opens(key, rows):
        opened.append((key[1], rows))
        time.sleep(0.1)

    engine = Engine(toy.engine.models, toy.engine._executor, opens=opens, on_batch=toy.batches.append)
    try:
        heard = Heard()
        engine.submit(make_request(scale=3.0, guidance="cfg", steps=2), heard)
        usage = heard.result().usage
    finally:
        engine.close(0)
    assert {(batch.key[1], batch.rows) for batch in toy.batches} <= {*opened}
    assert max(usage.compute_s.values()) < 0.1


def test_what_cannot_be_opened_fails_the_call_by_its_own_name(toy):
    def opens(key, rows):
        if key[1] == "decode":
            raise StorageError("the cache is read-only")

    engine = Engine(toy.engine.models, toy.engine._executor, opens=opens)
    try:
        heard = Heard()
        engine.submit(make_request(), heard)
        assert str(heard.error()) == "the cache is read-only"
    finally:
        engine.close(0)


def test_a_request_that_is_cancelled_while_its_call_runs_hears_so_at_once_and_the_output_is_dropped(gated):
    toy, executor = gated
    first, other = toy.submit(id="again", steps=2), toy.submit(steps=2)
    executor.wait_for(2)
    toy.engine.cancel("again")
    assert isinstance(first.error(), Cancelled), "its call still runs"
    second = toy.submit(id="again", steps=3)  # the same id, while a call of the first one is still out
    executor.let(0)
    run_freely(executor, [other, second])
    assert second.result().usage.nfe == 3
    assert other.result().usage.nfe == 2
    assert len([e for e in first.events if isinstance(e, Progress)]) <= 1


def test_a_deadline_ends_a_request_while_its_call_runs(gated):
    toy, executor = gated
    heard = toy.submit(deadline=time.monotonic() + 0.15)
    executor.wait_for(1)
    assert isinstance(heard.error(), DeadlineExceeded)
    assert executor.inside, "its calls still run"


def test_a_batch_that_fails_leaves_those_on_other_replicas_alone(gated, caplog):
    toy, executor = gated
    doomed, fine = toy.submit(), toy.submit()
    executor.wait_for(2)
    executor.let(0, Unavailable("node lost", retry_after_s=1.0))
    run_freely(executor, [doomed, fine])
    ends = [type(each.last()).__name__ for each in (doomed, fine)]
    assert sorted(ends) == ["Failed", "Finished"]


def test_closing_waits_for_batches_that_cannot_be_stopped_and_lets_go_of_the_executor_first(make_gated):
    toy, executor = make_gated(2)
    freed = []
    toy.engine.release = lambda: freed.append(len(executor.inside))
    heard = [toy.submit(steps=50) for _ in range(2)]
    executor.wait_for(2)
    closer = threading.Thread(target=toy.engine.close, args=(0.0,))
    closer.start()
    assert all(isinstance(each.error(), Unavailable) for each in heard)
    time.sleep(0.05)
    assert closer.is_alive()
    assert freed == [2], "one of its batches may wait for a replica that never comes, and only the executor can end that"
    executor.let_all()
    closer.join(20)
    assert not closer.is_alive()


def test_a_replica_that_is_there_later_is_used(gated):
    toy, executor = gated
    executor.capacity = 1
    heard = [toy.submit(steps=2) for _ in range(2)]
    executor.wait_for(1)
    time.sleep(0.05)
    assert len(executor.inside) == 1
    executor.capacity = 2
    executor.wait_for(2)
    run_freely(executor, heard)


@pytest.mark.parametrize("several", [False, True])
def test_a_warm_up_is_of_one_row_or_of_several_in_every_call(toy, several):
    """A backend may run one row by another engine than several."""
    warm_up(toy.engine, toy.engine.models["toy"], "text_to_video", "", several)
    ran = {(batch.key[1], batch.rows > 1) for batch in toy.batches}
    assert {("denoise", several), ("decode", True)} <= ran, "the tiles of one video are several rows too"
    assert ("denoise", not several) not in ran
