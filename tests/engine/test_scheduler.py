"""The policy, on tickets alone."""

import subprocess
import sys

from reelstep.engine.scheduler import Scheduler

TEXT, STEP, DECODE = ("m", "encode_text", "any"), ("m", "denoise", "video"), ("m", "decode", "video")
INF = float("inf")


def scheduler() -> Scheduler:
    made = Scheduler({TEXT: 8, STEP: 4, DECODE: 2})
    for key, seconds in ((TEXT, 0.001), (STEP, 0.02), (DECODE, 0.01)):
        made.note(key, seconds)
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
