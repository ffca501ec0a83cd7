"""The policy, on tickets alone; and what a request will ask for and how long that takes, against real pipelines and closed forms."""

import math
import subprocess
import sys

import numpy as np
import pytest

from reelstep.engine.loop import expected_rounds
from reelstep.engine.pipelines import PIPELINES
from reelstep.engine.pipelines.state import PipelineState
from reelstep.engine.scheduler import MARGIN, MEMORY, Estimate, Scheduler, expected_s, first_in_time, rounds_of, usual
from reelstep.tests.engine.conftest import PROGRAMS, SETTINGS, make_model, make_request
from reelstep.tests.engine.pipelines.test_latent import job_for

TEXT, STEP, DECODE = ("m", "encode_text", "any"), ("m", "denoise", "video"), ("m", "decode", "video")
OTHER = ("m", "denoise", "image")
INF = float("inf")


def scheduler() -> Scheduler:
    made = Scheduler({TEXT: 8, STEP: 4, DECODE: 2})
    for key, seconds in ((TEXT, 0.001), (STEP, 0.02), (DECODE, 0.01)):
        made.note(key, seconds, 1)
    return made


def names(batch):
    return [t.request_id for t in batch]


def test_calls_of_one_key_share_a_batch_and_others_wait():
    s = scheduler()
    for name in "abc":
        s.push(name, 0, STEP, 1, 0, INF, 0.0)
    s.push("d", 0, DECODE, 1, 0, INF, 0.0)
    assert names(s.next_batch(0.0)) == ["d"]
    assert names(s.next_batch(0.0)) == ["a", "b", "c"]
    assert s.next_batch(0.0) == []


def test_free_replicas_get_as_much_each_and_no_row_is_left_over():
    s = scheduler()
    for name in "abcdefg":
        s.push(name, 0, TEXT, 1, 0, INF, 0.0)
    assert [names(s.next_batch(0.0, free)) for free in (3, 2, 1)] == [["a", "b", "c"], ["d", "e"], ["f", "g"]]
    s.push("wide", 0, STEP, 4, 0, INF, 0.0)
    assert names(s.next_batch(0.0, 8)) == ["wide"], "a call is never split"


def test_a_replica_whose_mesh_runs_two_rows_at_once_gets_two_before_another_gets_any():
    s = scheduler()
    s.at_once = 2
    for name in "abcdefg":
        s.push(name, 0, TEXT, 1, 0, INF, 0.0)
    assert [names(s.next_batch(0.0, free)) for free in (3, 2, 1)] == [["a", "b", "c", "d"], ["e", "f"], ["g"]]
    for name in "ab":
        s.push(name, 0, STEP, 1, 0, INF, 0.0)
    assert names(s.next_batch(0.0, 2)) == ["a", "b"], "on one replica they take as long as on two, and the other is free"


def test_a_batch_never_holds_more_rows_than_its_key_takes():
    s = scheduler()
    for name, rows in (("a", 3), ("b", 2), ("c", 1)):
        s.push(name, 0, STEP, rows, 0, INF, 0.0)
    assert names(s.next_batch(0.0)) == ["a", "c"], "c fills the place that b is too wide for"
    assert names(s.next_batch(0.0)) == ["b"]


def test_a_call_wider_than_a_batch_runs_alone():
    s = scheduler()
    s.push("wide", 0, STEP, 9, 0, INF, 0.0)
    s.push("other", 0, STEP, 1, 0, INF, 0.0)
    assert names(s.next_batch(0.0)) == ["wide"]


def test_short_programs_go_first_so_that_newcomers_reach_the_denoiser():
    s = scheduler()
    s.push("old", 0, STEP, 1, 0, INF, 0.0)
    s.push("new", 0, TEXT, 1, 0, INF, 0.1)
    assert names(s.next_batch(0.1)) == ["new"]


def test_the_earlier_deadline_goes_first_within_a_key():
    s = scheduler()
    for name, deadline in (("a", INF), ("b", 9.0), ("c", 3.0), ("d", 5.0), ("e", INF)):
        s.push(name, 0, STEP, 1, 0, deadline, 0.0)
    assert names(s.next_batch(0.0)) == ["c", "d", "b", "a"]


def test_priority_goes_before_everything_but_patience():
    s = scheduler()
    s.push("low", 0, TEXT, 1, 2, 1.0, 0.0)
    s.push("high", 0, STEP, 1, 0, INF, 0.0)
    assert names(s.next_batch(0.0)) == ["high"]


def test_a_call_that_waited_too_long_is_not_starved():
    s = scheduler()
    s.push("patient", 0, STEP, 1, 9, INF, 0.0)
    s.push("urgent", 0, TEXT, 1, 0, INF, 1.5)
    assert names(s.next_batch(1.5)) == ["patient"]


def test_removing_a_request_removes_all_its_calls_and_no_others():
    s = scheduler()
    s.push("a", 0, STEP, 1, 0, INF, 0.0)
    s.push("a", 1, STEP, 1, 0, INF, 0.0)
    s.push("b", 0, STEP, 1, 0, INF, 0.0)
    s.remove("a")
    assert names(s.next_batch(0.0)) == ["b"]


def test_the_scheduler_needs_no_torch():
    code = "import sys, reelstep.engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def asked_by(request):
    """What the request's own pipeline asks for, in turn."""
    job = job_for(request, SETTINGS)
    pipeline, rounds, answers = PIPELINES[request.task](job, PipelineState()), [], None
    try:
        while True:
            calls = pipeline.send(answers)
            rounds.append(tuple(((request.model, *call.key), call.rows) for call in calls))
            answers = tuple({"velocity": -call.inputs["x"]} if call.program == "denoise" else PROGRAMS[call.key](call.inputs) for call in calls)
    except StopIteration:
        return job.table.n, tuple(rounds)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"scale": 2.0, "count": 3},
        {"scale": 2.0, "guidance": "cfg_zero", "solver": "heun", "steps": 3},
        {"scale": 0.0, "preview_every": 2, "steps": 5},
        {"scale": 2.0, "preview_every": 1, "count": 2, "solver": "midpoint", "steps": 2},
        {"guidance": "none", "task": "text_to_image", "frames": 1, "preview_every": 3, "steps": 6},
        {"task": "animate_sticker", "image": np.zeros((16, 16, 3), np.uint8)},
    ],
)
def test_the_expected_calls_of_a_request_are_those_that_its_pipeline_asks_for(changed):
    request = make_request(**changed)
    evaluations, rounds = asked_by(request)
    assert expected_rounds(make_model(), request, evaluations) == rounds


def test_measured_forwards_are_spread_over_the_evaluations_and_none_is_lost():
    rounds = rounds_of("m", "video", 8, 12.0, count=2)[1:-1]
    assert sum(len(calls) for calls in rounds) == 24
    assert {len(calls) for calls in rounds} == {2, 4}
    assert rounds_of("m", "video", 3, 3.0, denoiser="denoise_lora")[1] == ((("m", "denoise_lora", "video"), 1),)


def steps(n, key=STEP, rows=1):
    return (((key, rows),),) * n


def line(key, rows):
    return {STEP: 1.0, OTHER: 0.25}[key] + rows


def test_in_every_round_others_share_the_batch_of_their_key_or_have_one_of_their_own():
    (one,), (two,), (other,) = steps(1), steps(1, rows=2), steps(1, OTHER)
    assert expected_s(steps(4), [], line) == 4 * 2.0
    assert expected_s(steps(4), [one, two], line) == 4 * (1 + 4)
    assert expected_s(steps(4), [one, other, other], line) == 4 * (1 + 2 + 0.25 + 2)
    assert expected_s((((STEP, 1), (STEP, 1), (OTHER, 3)),), [], line) == 3.0 + 3.25
    assert expected_s(steps(4), [one + one], line) == 4 * (1 + 3), "two calls of one request"


def test_the_usual_round_of_a_request_is_its_denoisers():
    rounds = rounds_of("m", "video", 6, 12.0, count=2, tiles=3, preview_every=4)
    assert usual(rounds) == ((STEP, 1),) * 4
    assert usual(rounds_of("m", "image", 1, 1.0)) == ((OTHER, 1),)


def test_the_first_option_that_ends_in_time_is_taken_and_else_the_last():
    options = [steps(16), steps(8), steps(4)]
    for left_s, place in ((math.inf, 0), (32 * MARGIN, 0), (32 * MARGIN - 1e-9, 1), (16 * MARGIN, 1), (8 * MARGIN, 2), (0.1, 2), (-1.0, 2)):
        assert first_in_time(options, [], line, left_s) == place, left_s
    assert first_in_time(options, [*steps(1)] * 2, line, 16 * MARGIN) == 2, "beside two others even 4 steps take 16 s, and 8 take 32 s"


def test_what_nobody_knows_is_not_in_time_unless_there_is_no_deadline():
    learned = Scheduler({STEP: 8, OTHER: 8})
    learned.note(STEP, 1.0, 1)
    assert first_in_time([steps(2), steps(1)], [], learned.batch_s, 100.0) == 0
    assert first_in_time([steps(2, OTHER), steps(1, OTHER)], [], learned.batch_s, 100.0) == 1
    assert first_in_time([steps(2, OTHER), steps(1, OTHER)], [], learned.batch_s, math.inf) == 0


def test_seconds_over_rows_are_the_weighted_least_squares_line():
    drawn = np.random.default_rng(0)
    rows = drawn.integers(1, 17, 60)
    seconds = 0.01 + 0.004 * rows + 0.002 * drawn.standard_normal(60)
    estimate = Estimate()
    for r, s in zip(rows, seconds, strict=True):
        estimate.note(float(s), int(r))
    slope, start = np.polyfit(rows, seconds, 1, w=np.sqrt(MEMORY ** np.arange(60)[::-1]))
    for r in (1, 8, 40):
        assert estimate.of(r) == pytest.approx(start + slope * r, rel=1e-9)


def test_the_line_is_kept_while_all_batches_are_alike_and_then_is_in_proportion():
    estimate = Estimate()
    for rows in (1, 4, *[4] * 100):
        estimate.note(0.02 + 0.01 * rows, rows)
    assert estimate.of(16) == pytest.approx(0.18, rel=1e-3)
    for _ in range(1000):
        estimate.note(0.06, 4)
    assert [estimate.of(rows) for rows in (1, 4, 16)] == pytest.approx([0.06, 0.06, 0.24])


def test_neither_a_slope_nor_a_start_is_below_nothing():
    falling, steep = Estimate(), Estimate()
    for rows, seconds in ((1, 0.5), (4, 0.1)):
        falling.note(seconds, rows)
        steep.note(1.0 - seconds, rows)
    steep.note(30.0, 8)
    assert falling.of(1) == falling.of(16) > 0
    assert steep.of(1) == pytest.approx(steep.of(16) / 16)


def test_more_rows_than_a_batch_holds_run_in_several_and_replicas_take_their_parts():
    learned = Scheduler({STEP: 4})
    assert learned.batch_s(STEP, 1) == math.inf
    for rows in (1, 2, 4):
        learned.note(STEP, line(STEP, rows), rows)
    assert learned.batch_s(STEP, 10) == pytest.approx(2 * 5.0 + 3.0)
    assert learned.batch_s(STEP, 8) == pytest.approx(10.0)
    assert learned.batch_s(STEP, 10, replicas=3) == pytest.approx(5.0)
