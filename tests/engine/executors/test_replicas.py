"""How many replicas there shall be: the decision on a simulated clock, and what an engine does with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from reelstep import __main__ as cli
from reelstep.compiler.bundle import Bundle
from reelstep.engine.commands import serve
from reelstep.engine.executors.replicas import Decision, Load, Scaler, Scaling
from reelstep.engine.executors.restarting import Restarting
from reelstep.errors import ConfigError
from reelstep.tests.engine.executors.test_restarting import FEW, Fake
from reelstep.tests.engine.executors.toy_engine import until

BETWEEN = Scaling(1, 4, rows=8.0, window_s=10.0, idle_s=100.0)


def simulate(scaling: Scaling, load: Callable[[float, int], Load], seconds: int, start_s: float = 0.0, room: int = 9, first: int = 1) -> list[tuple[int, int]]:
    """(second, replicas) of every change, looking once a second; a new replica lives `start_s` after it was wanted."""
    decision, replicas, changes, starts = Decision(scaling), first, [], -1.0
    for now in range(seconds):
        living = replicas if now - starts >= start_s else first
        wanted = decision.wanted(float(now), load(float(now), replicas), replicas, living, room)
        if wanted != replicas:
            changes.append((now, wanted))
            replicas, starts = wanted, float(now)
    return changes


def test_rows_that_wait_through_a_whole_window_get_as_many_replicas_as_the_fewest_of_them_need() -> None:
    assert simulate(BETWEEN, lambda now, n: Load(20 if now < 5 else 17, n), 12) == [(9, 3)], "17 rows at 8 each"
    assert simulate(BETWEEN, lambda now, n: Load(1000, n), 30) == [(9, 4)], "never above the most"
    assert simulate(BETWEEN, lambda now, n: Load(1000, n), 12, room=1) == [(9, 2)], "no more than there is room for"
    assert simulate(BETWEEN, lambda now, n: Load(1000, n), 300, room=0) == []


def test_a_burst_that_is_over_within_the_window_and_rows_below_the_limit_change_nothing() -> None:
    assert simulate(BETWEEN, lambda now, n: Load(0 if now % 8 == 0 else 500, n), 300) == []
    assert simulate(BETWEEN, lambda now, n: Load(8, n), 300) == []


def test_while_a_replica_is_started_nobody_asks_for_another() -> None:
    changes = simulate(BETWEEN, lambda now, n: Load(17 + int(now), n), 100, start_s=60.0)
    assert changes == [(9, 3), (69, 4)]


def test_one_replica_after_the_other_ends_when_one_fewer_would_have_done_for_long() -> None:
    assert simulate(BETWEEN, lambda now, n: Load(0, min(1, n)), 500, first=4) == [(99, 3), (199, 2), (299, 1)], "one is busy, one is enough"
    assert simulate(BETWEEN, lambda now, n: Load(0, n), 400, first=4) == [], "all are busy"
    assert simulate(BETWEEN, lambda now, n: Load(0, n if now % 50 == 0 else 0), 400, first=4) == [], "all are needed now and then"
    assert simulate(BETWEEN, lambda now, n: Load(int(now % 90 == 0), 0), 400, first=4) == []


def test_numbers_are_read_and_checked() -> None:
    assert Scaling.parse("3") == Scaling(3, 3)
    assert Scaling.parse("1:4") == Scaling(1, 4)
    for text in ("", "x", "1:", ":2", "1:2:3", "-1", "0", "0:2", "1:0", "2:1"):
        with pytest.raises(ConfigError, match=f"^replicas '{text}'; a number of at least 1, or LEAST:MOST from 1 upwards, such as 2 or 1:4$"):
            Scaling.parse(text)
    for rows, window_s, idle_s in ((0.0, 10.0, 300.0), (8.0, 0.0, 300.0), (8.0, 10.0, 9.0)):
        with pytest.raises(ConfigError, match=rf"1 to 2 replicas, one more above {rows:g} rows each .* more than 0 rows, and the second time is no shorter"):
            Scaling(1, 2, rows, window_s, idle_s)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--replicas", "2:1"], "replicas '2:1'; a number of at least 1, or LEAST:MOST"),
        (["--replicas", "-1"], "replicas '-1'; a number of at least 1"),
        (["--rank-cpus", "2"], "--rank-cpus is of replicas; add --replicas or --cluster"),
        (["--replicas", "2", "--rank-cpus", "0"], "--rank-cpus 0; a number above 0"),
        (["--replicas", "2", "--mesh", "dp=2"], "unknown mesh axis 'dp'"),
        (["--checkpoint-every", "0", "--checkpoints", "states"], "--checkpoint-every 0; at least 1 step"),
    ],
)
def test_the_command_line_refuses_what_does_not_fit_before_it_listens(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "absent.reel", "--port", "0", *options]) == 2
    assert words in capsys.readouterr().err


def test_without_ray_the_command_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert cli.main(["serve", "absent.reel", "--replicas", "2"]) == 2
    assert "pip install 'reelstep[cluster]'" in capsys.readouterr().err


class Fakes:
    """Replicas elsewhere that cost nothing."""

    scaling = Scaling(1, 3, rows=1.0, window_s=0.2, idle_s=0.4)

    def __init__(self) -> None:
        self.made: list[Fake] = []

    def open(self, bundles: Sequence[Bundle]) -> Restarting:
        def start() -> Fake:
            self.made.append(Fake())
            return self.made[-1]

        return Restarting([start], FEW)

    def room(self) -> int:
        return 5


def test_an_engines_load_adds_replicas_and_idleness_ends_them() -> None:
    fakes = Fakes()
    replicas = fakes.open([])
    loads = [Load(30, 1)]
    scaler = Scaler(fakes, replicas, lambda: loads[0])
    until(lambda: replicas.capacity == 3)
    loads[0] = Load(0, 0)
    until(lambda: sum(fake.closed for fake in fakes.made) == 2)
    assert (replicas.wanted, replicas.capacity) == (1, 1)
    scaler.close()
    scaler.close()
    assert all(fake.closed for fake in fakes.made)
