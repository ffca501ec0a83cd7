"""What the benchmark of deadlines reports, from answers that are given."""

import pytest

from reelstep.benchmarks.deadlines import CHOICES, arrivals_of, main, row_of
from reelstep.benchmarks.simulate import Answered, live
from reelstep.errors import ConfigError
from reelstep.tests.engine.service.in_process import served as serving

PSNR_DB = {"draft": 30.0, "standard": 40.0, "best": 50.0}


def test_quality_is_of_what_was_done_in_time_and_shares_are_of_all():
    answers = [
        Answered(0.0, 1.0, "finished", True, "best"), Answered(0.0, 2.0, "finished", True, "draft"), Answered(0.0, 2.0, "finished", True, "draft"),
        Answered(0.0, 3.0, "finished", False, "best"), Answered(0.0, 4.0, "expired", False), Answered(0.0, 4.0, "refused", False),
        Answered(0.0, 4.0, "failed", False), Answered(0.0, 4.0, "expired", False),
    ]  # fmt: skip
    row = row_of("auto", 1.5, answers, PSNR_DB)
    assert (row["asked"], row["load"], row["attainment"], row["psnr_db"]) == ("auto", 1.5, 3 / 8, pytest.approx(110 / 3))
    assert (row["draft"], row["standard"], row["best"]) == (2 / 8, 0, 1 / 8)
    assert (row["late"], row["expired"], row["refused"], row["failed"]) == (1, 2, 1, 1)
    assert row_of("best", 1.5, answers[4:], PSNR_DB)["psnr_db"] is None


def test_every_choice_gets_the_same_arrivals_at_the_load_and_with_the_deadline_that_is_asked():
    one, *others = (arrivals_of(choice, 4000, 2.0, 3.0, 1) for choice in CHOICES)
    assert [(each.arrival_s, each.deadline_s) for each in one] == [(each.arrival_s, each.deadline_s) for each in others[0]]
    assert {each.deadline_s for each in one} == {3.0}
    assert len(one) / one[-1].arrival_s == pytest.approx(2.0, rel=0.05)  # 3 standard errors of 4,000 arrivals
    assert [each[0].quality for each in (one, *others)] == list(CHOICES)


def test_a_live_run_tells_which_quality_each_request_got():
    with serving() as server:
        answers = live(server.address, "fake", arrivals_of("auto", 3, 100.0, 10.0, 0))
    assert [(each.outcome, each.quality) for each in answers] == [("finished", "draft")] * 3


def test_numbers_that_are_none_are_refused_before_anything_is_built():
    with pytest.raises(ConfigError, match="all are above 0"):
        main(["--loads", "0"])
