"""A rank may be killed at any time, and nobody who waits for a result is told: what ran is run again, bit for bit."""

from __future__ import annotations

import logging
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reelstep.engine.executors import restarting
from reelstep.engine.executors.inline import Inline
from reelstep.engine.executors.patience import Allowance
from reelstep.engine.executors.processes import Processes, World, start
from reelstep.engine.executors.restarting import Bounds, Restarting
from reelstep.engine.loop import Engine
from reelstep.engine.request import Call, Failed
from reelstep.errors import BundleError, ConfigError, Unavailable
from reelstep.parallel.mesh import Mesh
from reelstep.tests.engine.executors.toy_engine import Heard, ask, check_against_one_process, engine_on, point, until
from reelstep.tests.engine.executors.toy_ranks import MODEL, Toy, alone

FEW = Bounds(starts=3, window_s=60.0, reruns=2)


# The rules, on replicas that die when they are told to.


@dataclass
class Fake:
    """A replica whose next calls end as `fates` say: an error, or None for an answer."""

    fates: list[Exception | None] = field(default_factory=list)
    failure: str | None = None
    leaving: str | None = None
    inline: bool = False
    capacity: int = 1
    rows: int = 8
    keys: tuple[tuple[str, str, str], ...] = (("m", "p", "q"),)
    closed: int = 0
    ran: int = 0
    gate: threading.Event | None = None

    @property
    def max_rows(self) -> dict[tuple[str, str, str], int]:
        return dict.fromkeys(self.keys, self.rows)

    def run(self, model: str, calls: Any) -> list[Any]:
        self.ran += 1
        if self.gate is not None:
            assert self.gate.wait(20)
        fate = self.fates.pop(0) if self.fates else None
        if fate is not None:
            self.failure = str(fate) if isinstance(fate, Unavailable) else None
            raise fate
        return [{"y": call.inputs["x"] + 1} for call in calls]

    def give_up(self, why: str) -> str:
        self.failure = f"{why}: it hangs"
        return self.failure

    def close(self) -> None:
        self.closed += 1


def lost(words: str = "rank 1 is lost") -> Unavailable:
    return Unavailable(words, retry_after_s=1.0)


def call(value: float = 1.0) -> Call:
    return Call("p", "q", {"x": torch.tensor([value])})


def one_by_one(*replicas: Fake | Exception) -> Callable[[], Fake]:
    """Starts these, in order."""
    waiting = list(replicas)

    def start_next() -> Fake:
        replica = waiting.pop(0)
        if isinstance(replica, Exception):
            raise replica
        return replica

    return start_next


def test_calls_of_a_replica_that_dies_are_run_again_on_a_new_one(caplog: pytest.LogCaptureFixture) -> None:
    first, second = Fake([None, lost()]), Fake()
    executor = Restarting([one_by_one(first, second)], FEW)
    assert [output["y"].item() for output in executor.run("m", [call(1.0), call(2.0)])] == [2.0, 3.0]
    assert executor.run("m", [call(5.0), call(7.0)])[1]["y"].item() == 8.0
    assert (executor.restarts, executor.reruns) == (1, 2), "one start, two calls"
    assert (first.closed, second.ran, second.closed) == (1, 1, 0)
    executor.close()
    executor.close()
    assert second.closed == 1
    said = {record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING}
    assert said == {"replica 0 ended: rank 1 is lost", "2 calls of p are run again: rank 1 is lost", "replica 0 was started"}
    with pytest.raises(Unavailable, match="have been stopped"):
        executor.run("m", [call()])


def test_a_call_that_never_returns_ends_its_replica_and_runs_on_another(caplog: pytest.LogCaptureFixture) -> None:
    hanging, second = Fake(), Fake()
    bounds = Bounds(starts=3, window_s=60.0, reruns=2, calls=Allowance(first_s=20.0, least_s=0.2))
    executor = Restarting([one_by_one(hanging, second)], bounds)
    executor.run("m", [call()])
    hanging.gate = threading.Event()  # from now on it waits 20 s
    began = time.monotonic()
    assert executor.run("m", [call(4.0)])[0]["y"].item() == 5.0
    assert 0.2 <= time.monotonic() - began < 2.0
    assert (executor.restarts, executor.reruns, hanging.closed, second.ran) == (1, 1, 1, 1)
    words = r"replica 0 ended: p q of 'm' with 1 rows has run for 0\.[2-9] s on replica 0 \(usually \S+ s, at most \S+ s in 1 calls\): it hangs"
    assert re.search(words, caplog.text)
    hanging.gate.set()
    executor.close()


def test_another_replica_goes_on_while_one_is_started() -> None:
    gate = threading.Event()
    dying, healthy, again = Fake([lost()]), Fake(), Fake()

    def slowly(replicas: list[Fake]) -> Fake:
        replica = replicas.pop(0)
        if replica is again:
            assert gate.wait(20)
        return replica

    waiting = [dying, again]
    executor = Restarting([lambda: slowly(waiting), lambda: healthy], FEW)
    for value in range(3):
        assert executor.run("m", [call(value)])[0]["y"].item() == value + 1
    assert (dying.ran, healthy.ran, executor.restarts, executor.reruns) == (1, 3, 0, 1), "the healthy one ran them all"
    gate.set()
    until(lambda: executor.restarts == 1)
    executor.run("m", [call()])
    executor.run("m", [call()])
    assert (healthy.ran, again.ran) == (4, 1), "both take their turns"
    executor.close()


def test_two_callers_use_two_replicas_at_once() -> None:
    gate = threading.Event()
    replicas = [Fake(gate=gate), Fake(gate=gate)]
    executor = Restarting([lambda: replicas[0], lambda: replicas[1]], FEW)
    threads = [threading.Thread(target=executor.run, args=("m", [call()]), daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: [replica.ran for replica in replicas] == [1, 1])
    gate.set()
    for thread in threads:
        thread.join(20)
    executor.close()


def test_calls_that_end_every_replica_are_given_up_and_others_run() -> None:
    replicas = [Fake([lost(f"death {number}")]) for number in range(3)]
    executor = Restarting([one_by_one(*replicas, Fake())], FEW)
    with pytest.raises(Unavailable, match=r"'p' ran 3 times and each time the replica ended: \(1\) death 0, \(2\) death 1, \(3\) death 2$"):
        executor.run("m", [call()])
    assert executor.run("m", [call(1.0)])[0]["y"].item() == 2.0
    assert (executor.restarts, executor.reruns) == (3, 2)
    executor.close()


def test_a_replica_that_cannot_start_is_given_up_with_all_that_was_tried_and_tried_again_later(caplog: pytest.LogCaptureFixture) -> None:
    executor = Restarting([one_by_one(Fake([lost()]), lost("port in use"), BundleError("no file"), Fake())], Bounds(starts=2, window_s=1.0, reruns=2))
    with pytest.raises(Unavailable, match=r"replica 0 ended 3 times in 1 s: \(1\) rank 1 is lost, \(2\) did not start: port in use, \(3\) did not start: no"):
        executor.run("m", [call()])
    assert executor.restarts == 0
    assert "replica 0 has ended 3 times in 1 s and is left alone for now" in caplog.text
    until(lambda: executor.restarts == 1)
    assert executor.run("m", [call(1.0)])[0]["y"].item() == 2.0
    executor.close()


def test_errors_of_the_caller_harm_nothing() -> None:
    replica = Fake([ConfigError("x is missing"), ValueError("a bug")])
    executor = Restarting([one_by_one(replica)], FEW)
    with pytest.raises(ConfigError, match="x is missing"):
        executor.run("m", [call()])
    with pytest.raises(ValueError, match="a bug"):
        executor.run("m", [call()])
    assert executor.run("m", [call()])
    assert (executor.restarts, executor.reruns, replica.closed) == (0, 0, 0)
    executor.close()


def test_replicas_must_run_the_same_and_what_was_started_is_closed() -> None:
    replicas = [Fake(), Fake(rows=4)]
    with pytest.raises(ConfigError, match="give all the same programs"):
        Restarting([lambda: replicas[0], lambda: replicas[1]], FEW)
    assert [replica.closed for replica in replicas] == [1, 1]
    with pytest.raises(BundleError, match="no file"):
        Restarting([lambda: replicas[0], one_by_one(BundleError("no file"))], FEW)
    assert replicas[0].closed == 2
    with pytest.raises(ConfigError, match="no replica"):
        Restarting([], FEW)
    with pytest.raises(ConfigError, match="reruns are at least 0"):
        Bounds(1, 1.0, -1)


def test_capacity_is_what_lives_and_at_least_one() -> None:
    gate = threading.Event()
    first, second = Fake(), Fake()
    waiting = [first, Fake()]

    def slowly() -> Fake:
        if len(waiting) == 1:
            assert gate.wait(20)
        return waiting.pop(0)

    executor = Restarting([slowly, one_by_one(second)], FEW)
    assert executor.capacity == 2
    first.failure = "gone"
    until(lambda: executor.capacity == 1)
    gate.set()
    until(lambda: executor.capacity == 2)
    executor.close()


def test_closing_does_not_wait_for_a_start_which_then_ends_what_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarting, "LAST_START_S", 0.1)
    gate = threading.Event()
    late = Fake()
    first = Fake()
    waiting = [first, late]

    def begin() -> Fake:
        if len(waiting) == 1:
            assert gate.wait(20)
        return waiting.pop(0)

    executor = Restarting([begin], FEW)
    first.failure = "gone"
    until(lambda: first.closed == 1)
    executor.close()
    assert late.closed == 0
    gate.set()
    until(lambda: late.closed == 1)


def test_closing_waits_for_a_call_that_is_under_way() -> None:
    replica = Fake(gate=threading.Event())
    executor = Restarting([lambda: replica], FEW)
    with ThreadPoolExecutor(2) as pool:
        ran = pool.submit(executor.run, "m", [call(3.0)])
        until(lambda: replica.ran == 1)
        closed = pool.submit(executor.close)
        time.sleep(0.3)
        assert not closed.done()
        assert replica.closed == 0
        replica.gate.set()  # type: ignore[union-attr]  # given above
        assert ran.result(20)[0]["y"].item() == 4.0
        closed.result(20)
    assert replica.closed == 1


def test_a_batch_that_waits_for_a_replica_that_never_comes_keeps_no_server_from_its_end() -> None:
    replica = Fake([lost()], keys=tuple(Inline({MODEL: alone()}).max_rows))
    more = threading.Event()

    def begin() -> Fake:
        if replica.ran:
            more.set()
            raise lost("no room")
        return replica

    engine = engine_on(Restarting([begin], Bounds(starts=1_000_000, window_s=60.0, reruns=2)))
    heard = Heard()
    engine.submit(ask(1, 4), heard)
    assert more.wait(20)
    closer = threading.Thread(target=engine.close, args=(0.0,))
    closer.start()
    closer.join(20)
    assert not closer.is_alive()
    assert isinstance(heard.last, Failed)
    assert isinstance(heard.last.error, Unavailable)
    assert replica.closed == 1


def test_replicas_are_added_and_the_idle_ones_taken_away() -> None:
    made: list[Fake] = []

    def begin() -> Fake:
        made.append(Fake())
        return made[-1]

    executor = Restarting([begin], FEW)
    executor.resize(3)
    until(lambda: executor.capacity == 3)
    assert executor.wanted == len(made) == 3
    gates = [threading.Event() for _ in range(3)]
    for fake, gate in zip(made, gates, strict=True):
        fake.gate = gate
    threads = [threading.Thread(target=executor.run, args=("m", [call()]), daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: sum(fake.ran for fake in made) == 2)
    executor.resize(1)
    until(lambda: sum(fake.closed for fake in made) == 1)
    assert [fake.closed for fake in made] == [1 - fake.ran for fake in made], "the idle one first"
    for gate in gates:
        gate.set()
    until(lambda: sum(fake.closed for fake in made) == 2)
    for thread in threads:
        thread.join(20)
    executor.run("m", [call()])
    with pytest.raises(ConfigError, match="0 replicas; at least 1"):
        executor.resize(0)
    executor.close()
    assert [fake.closed for fake in made] == [1, 1, 1]


def test_a_replica_that_shall_go_works_until_another_lives_and_then_gets_nothing_more() -> None:
    gate = threading.Event()
    old, new = Fake(), Fake()
    waiting = [old, new]

    def begin() -> Fake:
        if len(waiting) == 1:
            assert gate.wait(20)
        return waiting.pop(0)

    executor = Restarting([begin], FEW)
    old.leaving = "node a is drained"
    time.sleep(0.3)
    executor.run("m", [call()])
    assert (old.ran, old.closed) == (1, 0), "there is no other yet"
    gate.set()
    until(lambda: old.closed == 1)
    executor.run("m", [call()])
    assert (old.ran, new.ran, executor.capacity, executor.reruns) == (1, 1, 1, 0)
    executor.close()


# The same, with processes that are killed.


@dataclass
class Killable:
    """An executor over two gloo ranks, and every replica it ever had."""

    folder: Path
    made: list[Processes] = field(default_factory=list)

    def restarting(self, bounds: Bounds = FEW, then: Toy | None = None, **options: Any) -> Restarting:
        """then: what is started after the first, if another."""

        def begin() -> Processes:
            ranks = then if then and self.made else Toy(self.folder, **options)
            replica = start(World(Mesh.parse("tp=2"), "gloo", start_s=60.0, load_s=60.0, collective_s=20.0, silence_s=4.0), ranks)
            self.made.append(replica)
            return replica

        return Restarting([begin], bounds)

    def kill(self) -> None:
        pid = self.made[-1].children[1].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def kill_in_call(self, number: int) -> threading.Thread:
        """As soon as rank 1 hangs in a call for the `number`-th time."""

        def wait_and_kill() -> None:
            until((self.folder / f"stop-{number}").exists, 60.0)
            self.kill()

        thread = threading.Thread(target=wait_and_kill, daemon=True)
        thread.start()
        return thread


@pytest.fixture
def killable(tmp_path: Path) -> Iterator[Killable]:
    made = Killable(tmp_path)
    yield made
    for replica in made.made:
        replica.close()


def test_a_rank_killed_twice_in_the_middle_of_a_call_and_once_while_idle_changes_no_bit(killable: Killable) -> None:
    calls = [point(0), point(1)]
    wanted = Inline({MODEL: alone()}).run(MODEL, calls)
    executor = killable.restarting(stops=2)
    killers = [killable.kill_in_call(0), killable.kill_in_call(1)]
    outputs = executor.run(MODEL, calls)
    for killer in killers:
        killer.join(20)
    assert (executor.restarts, executor.reruns) == (2, 4), "two calls, each run again twice"
    for output, want in zip(outputs, wanted, strict=True):
        assert torch.equal(output["velocity"], want["velocity"])
    killable.kill()
    until(lambda: killable.made[-1].failure is not None or executor.restarts == 3, 5.0)
    until(lambda: executor.restarts == 3)  # without a call that asks for it
    assert torch.equal(executor.run(MODEL, calls)[0]["velocity"], wanted[0]["velocity"])
    assert (executor.restarts, executor.reruns) == (3, 4), "the call after a death while idle met a living replica"
    executor.close()


# Through the engine.


@pytest.mark.parametrize(("rank", "allowance"), [(1, Allowance()), (0, Allowance(least_s=1.0))])
def test_a_rank_that_hangs_while_its_heart_beats_is_named_in_time_and_no_bit_changes(
    rank: int, allowance: Allowance, killable: Killable, caplog: pytest.LogCaptureFixture
) -> None:
    executor = killable.restarting(replace(FEW, calls=allowance), stops=1, rank=rank, first=3, stop_s=3600.0)
    engine = engine_on(executor)
    found: list[float] = []

    def look() -> None:
        until((killable.folder / "stop-0").exists, 60.0)
        began = time.monotonic()
        until(lambda: killable.made[0].failure is not None)
        found.append(time.monotonic() - began)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    heard = Heard()
    engine.submit(ask(2, steps_of(2)), heard)  # its denoiser calls are of one kind
    check_against_one_process([heard], steps_of, first=2)
    looking.join(20)
    assert allowance.least_s - 0.5 < found[0] < allowance.least_s + 0.5
    assert executor.restarts == 1
    what = r"denoise video of 'toy' with 2 rows has run for [15]\.\d s on replica 0 \(usually \S+ s, at most \S+ s in \d calls\)"
    assert re.search(rf"replica 0 ended: {what}: rank {rank} of 2 computes and does not come to an end; start", caplog.text)
    engine.close(0)


def steps_of(number: int) -> int:
    return 3 + number % 3


def submitted(engine: Engine, count: int) -> list[Heard]:
    heard = [Heard() for _ in range(count)]
    for number, listener in enumerate(heard):
        engine.submit(ask(number, steps_of(number)), listener)
    return heard


def test_no_running_request_is_lost_to_a_kill_and_results_and_counts_are_those_without_it(killable: Killable) -> None:
    executor = killable.restarting(stops=1)
    engine = engine_on(executor)
    killer = killable.kill_in_call(0)
    heard = submitted(engine, 5)
    check_against_one_process(heard, steps_of)
    killer.join(20)
    assert executor.restarts == 1
    assert executor.reruns >= 2, "both branches of at least one request"
    children = list(killable.made[-1].children.values())
    engine.close(0)
    assert [child.exitcode for child in children] == [0], "the engine's end is the ranks' end"


def test_requests_fail_clearly_where_no_replica_starts_and_the_engine_lives(killable: Killable) -> None:
    executor = killable.restarting(Bounds(starts=2, window_s=600.0, reruns=2), then=Toy(killable.folder, broken=True), stops=1)
    engine = engine_on(executor)
    killer = killable.kill_in_call(0)
    for number in range(2):
        heard = Heard()
        engine.submit(ask(number, 3), heard)
        assert heard.ended.wait(120)
        assert isinstance(heard.last, Failed)
        assert isinstance(heard.last.error, Unavailable)
        for words in ("replica 0 ended 3 times in 600 s", "(1) rank 1 of 2 was killed by SIGKILL", "(3) did not start: rank 1 of 2 failed at 'loaded'"):
            assert words in str(heard.last.error)
    killer.join(20)
    assert executor.restarts == 0
    engine.close(0)


@pytest.mark.slow
def test_of_60_requests_none_is_lost_to_20_random_kills(killable: Killable) -> None:
    executor = killable.restarting(Bounds(starts=40, window_s=600.0, reruns=10))
    engine = engine_on(executor)
    draw = random.Random(0)
    done = threading.Event()

    def kill_at_random() -> None:
        for number in range(20):
            until(lambda number=number: executor.restarts == number or done.is_set(), 120.0)
            if done.wait(draw.uniform(0.0, 0.3)):
                return
            killable.kill()

    killer = threading.Thread(target=kill_at_random, daemon=True)
    killer.start()
    heard: list[Heard] = []
    while len(heard) < 60 or killer.is_alive():  # 60, and more where they are done before the last kill
        number = len(heard)
        heard.append(Heard())
        engine.submit(ask(number, steps_of(number)), heard[-1])
        if number % 3 == 2:
            heard[-1].result()
    done.set()
    killer.join(20)
    until(lambda: executor.restarts == 20, 60.0)
    check_against_one_process(heard, steps_of)
    engine.close(0)
