"""What a call may take, by what calls took: numbers alone, on no clock."""

from __future__ import annotations

import random
import threading
import time

import pytest

from reelstep.engine.executors.patience import RECENT, Allowance, Hand, Usual
from reelstep.errors import ConfigError

KIND = ("m", "denoise", "video", 2)


def test_the_first_call_may_compile_and_later_ones_are_compared_with_the_slowest() -> None:
    usual = Usual(Allowance(first_s=600.0, least_s=5.0, times=20.0))
    assert usual.limit_s(KIND, fresh=True) == 600.0
    usual.note(KIND, True, 90.0)
    assert usual.limit_s(KIND, fresh=False) == 600.0, "nothing but a call that compiled is known, and 20 times that is no limit"
    usual.note(KIND, False, 0.02)
    assert usual.limit_s(KIND, fresh=False) == 5.0
    usual.note(KIND, False, 0.7)
    usual.note(KIND, False, 0.1)
    assert usual.limit_s(KIND, fresh=False) == pytest.approx(14.0)
    assert usual.limit_s(KIND, fresh=True) == 600.0, "another replica compiles as long"
    assert usual.limit_s((*KIND[:3], 3), fresh=False) == 600.0, "other rows are another kind"


def test_a_replica_that_is_started_again_is_compared_with_the_first_calls_of_others() -> None:
    usual = Usual(Allowance())
    usual.note(KIND, True, 1.5)
    usual.note(KIND, False, 0.01)
    assert usual.limit_s(KIND, fresh=True) == pytest.approx(30.0)


def test_a_slow_call_is_forgotten_after_many_others() -> None:
    usual = Usual(Allowance())
    usual.note(KIND, False, 10.0)
    for _ in range(RECENT - 1):
        usual.note(KIND, False, 0.5)
    assert usual.limit_s(KIND, fresh=False) == 200.0
    usual.note(KIND, False, 0.5)
    assert usual.limit_s(KIND, fresh=False) == 10.0


def test_no_false_alarm_on_a_loaded_machine_and_no_hang_that_is_not_found() -> None:
    """A day of calls of 0.3 s, each up to 8 times slower, as beside 8 other programs on a core; then one that does not end."""
    usual, draw = Usual(Allowance()), random.Random(0)
    usual.note(KIND, True, 4.0)
    for _ in range(10_000):
        seconds = 0.3 * draw.uniform(1.0, 8.0)
        assert seconds < usual.limit_s(KIND, fresh=False)
        usual.note(KIND, False, seconds)
    assert 20 * 0.3 <= usual.limit_s(KIND, fresh=False) <= 20 * 8 * 0.3


def test_limits_that_were_too_short_double_until_a_call_ends() -> None:
    usual = Usual(Allowance())
    usual.note(KIND, True, 0.03)
    usual.note(KIND, False, 0.02)
    assert usual.note_cut(KIND, fresh=True) == "usually 0.03 s, at most 0.03 s in 1 calls"
    usual.note_cut(KIND, fresh=True)
    assert (usual.limit_s(KIND, fresh=True), usual.limit_s(KIND, fresh=False)) == (20.0, 5.0)
    usual.note(KIND, True, 0.03)
    assert usual.limit_s(KIND, fresh=True) == 5.0
    assert usual.note_cut((*KIND[:3], 1), fresh=True) == "and none like it has ended before"


@pytest.mark.parametrize("times", [(0.0, 600.0, 20.0), (5.0, 4.0, 20.0), (5.0, 600.0, 0.5)])
def test_times_out_of_order_are_refused(times: tuple[float, float, float]) -> None:
    least_s, first_s, factor = times
    with pytest.raises(ConfigError, match="a call may take more than 0 s"):
        Allowance(first_s=first_s, least_s=least_s, times=factor)


def test_a_hand_gives_results_and_errors_and_can_be_left() -> None:
    hand, gate = Hand("test"), threading.Event()
    assert hand.run(lambda: 3, 5.0).result(0) == 3
    error = TimeoutError("of the work itself")
    assert hand.run(lambda: (_ for _ in ()).throw(error), 5.0).exception(0) is error
    began = time.monotonic()
    left = hand.run(lambda: gate.wait(20), 0.05)
    assert not left.done()
    assert time.monotonic() - began < 1.0
    gate.set()
    assert left.result(5.0) is True
    hand.close()
    hand.close()
