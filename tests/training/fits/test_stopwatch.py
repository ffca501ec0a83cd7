"""Seconds of a fit in parts, and which rule a fitted field is guided by."""

from __future__ import annotations

import pytest

from reelstep.errors import ConfigError
from reelstep.training import fits
from reelstep.training.fits import Stopwatch, field_guidance, progress_bar


@pytest.fixture
def clock(monkeypatch):
    """Moves on by what is appended to it."""
    gone = [100.0]
    monkeypatch.setattr(fits.time, "monotonic", lambda: sum(gone))
    return gone


def test_a_resumed_fit_counts_the_seconds_of_all_its_parts(tmp_path, clock):
    saved, heard = tmp_path / "bns_4.pt", []
    first = Stopwatch(saved)
    hear = first.heard(lambda done, loss: heard.append((done, loss)))
    clock.append(30.0)
    saved.touch()
    hear(1, loss=0.5)
    clock.append(7.0)  # after the last call: lost with the process
    second = Stopwatch(saved)
    clock.append(12.0)
    assert second.seconds() == pytest.approx(30 + 12)
    second.heard(lambda: None)()
    clock.append(50.0)
    assert Stopwatch(saved).seconds() == pytest.approx(42)
    assert heard == [(1, 0.5)]


def test_a_fit_that_begins_anew_counts_from_nothing(tmp_path, clock):
    saved = tmp_path / "bns_4.pt"
    watch = Stopwatch(saved)
    clock.append(5.0)
    watch.heard(lambda: None)()
    assert Stopwatch(saved).seconds() == 0, "nothing was saved to go on from"


def test_one_of_many_processes_keeps_the_seconds(tmp_path, clock):
    saved = tmp_path / "bns_4.pt"
    saved.touch()
    watch = Stopwatch(saved, keeps=False)
    clock.append(5.0)
    watch.heard(lambda: None)()
    assert list(tmp_path.iterdir()) == [saved]


def test_the_scale_of_a_picture_brings_its_rule():
    assert field_guidance("cfg", None, "animate_sticker") == ("cfg", {"rescale": 0.0})
    assert field_guidance("cfg", 1.5, "animate_sticker") == ("picture_and_text", {"picture": 1.5})


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("cfg", 1.5, "text_to_video"), r"--picture 1.5 with text_to_video"),
        (("interval", 1.5, "animate_sticker"), "under guidance 'interval'"),
        (("cfg", 99.0, "animate_sticker"), "scale of the picture"),
        (("adaptive", None, "text_to_video"), "depends on what came before"),
    ],
)
def test_a_rule_that_makes_no_field_is_refused(asked, message):
    with pytest.raises(ConfigError, match=message):
        field_guidance(*asked)


def test_half_a_file_loses_the_seconds_and_nothing_else(tmp_path):
    saved = tmp_path / "fit.pt"
    saved.write_bytes(b"state")
    saved.with_suffix(".seconds").write_bytes(b"")
    assert Stopwatch(saved).seconds() < 60


def test_where_there_is_no_terminal_progress_is_lines_some_twenty_of_them(capsys):
    with progress_bar(45) as progress:
        for done in range(1, 46):
            progress(done, 1 / done, float(done))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("iteration")]
    assert (lines[0], lines[-1], len(lines)) == (
        "iteration 2 of 45, loss 0.500, best 2.00 dB",
        "iteration 45 of 45, loss 0.022, best 45.00 dB",
        23,
    )
    with progress_bar(45, shown=False) as progress:
        progress(45, 0.0, 0.0)
    assert capsys.readouterr().out == ""
