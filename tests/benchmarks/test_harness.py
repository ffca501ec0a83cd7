"""What the benchmarks share."""

import json
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from reelstep.benchmarks.animation import psnr
from reelstep.benchmarks.contact_sheet import sheet, strip
from reelstep.benchmarks.harness import command, interleave, report, timing


def test_a_command_is_given_without_the_folder_of_its_cache():
    assert command(["bench", "steps", "--cache", "/somewhere", "--nfe", "4"]) == "reelstep bench steps --nfe 4"
    assert command(["bench", "steps"]) == "reelstep bench steps"


def test_psnr_is_ten_log_of_the_squared_range_over_the_mean_square():
    a = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(a, a) == 100
    assert psnr(a, a + 255) == pytest.approx(0)
    assert psnr(a, a + 51) == pytest.approx(20 * np.log10(5))


def test_each_contender_runs_once_a_round_and_follows_every_other():
    def order_of(rounds):
        order = []
        result = interleave({name: lambda name=name: order.append(name) for name in "abc"}, rounds=rounds, warmup=1)
        assert [t.rounds for t in result.values()] == [rounds] * 3
        return order[3:]  # after one run each to warm up

    order = order_of(30)
    assert all(sorted(order[i : i + 3]) == ["a", "b", "c"] for i in range(0, 90, 3))
    assert order == order_of(30), "seeded"
    neighbours = Counter(pairwise(order))
    assert all(neighbours[one, other] >= 8 for one in "abc" for other in "abc" if one != other), neighbours


def test_a_timing_is_the_median_with_its_spread():
    t = timing([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (t.median_s, t.p10_s, t.p90_s) == (3.0, 1.0, 5.0)


def test_a_report_writes_rows_and_conditions(tmp_path, capsys):
    report("title", [{"name": "x", "seconds": 0.123456}], 7, tmp_path / "deep" / "rows.json", {"more": 1})
    written = json.loads((tmp_path / "deep" / "rows.json").read_text())
    assert written["rows"] == [{"name": "x", "seconds": 0.123456}]
    assert written["more"] == 1
    assert {"machine", "arch", "sku", "versions", "commit", "seed", "command"} <= written["conditions"].keys()
    assert "0.1235" in capsys.readouterr().out


def test_a_contact_sheet_shows_every_frame(tmp_path):
    clip = np.zeros((3, 8, 8, 3), np.uint8)
    clip[1] = (255, 0, 0)
    assert strip(clip).shape == (8, 27, 3)
    sheet([("words", [clip, clip])], tmp_path / "sheet.png")
    from PIL import Image

    pixels = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    assert (np.all(pixels == (255, 0, 0), axis=-1)).sum() == 2 * 64
