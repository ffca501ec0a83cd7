"""The one loop: its bits, its memory, its resumption, and the tables it refuses."""

from __future__ import annotations

import copy
import io
import itertools
import json
from dataclasses import replace

import pytest
import torch

from reelstep.engine.samplers.ns import SamplerState, Table, drive, sample, start
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.schedules import linear, linear_quadratic
from reelstep.engine.samplers.tables import SOLVERS
from reelstep.errors import ConfigError

TABLE = Table("two", "condot", 1, (0.0, 0.4, 1.0), (1.0, 0.9), ((0.4,), (0.3, 0.7)))
NOISY = replace(TABLE, noise=((0.5,), (0.2, 0.1)))


def wild(x: torch.Tensor, t: float) -> torch.Tensor:
    """A field without structure, so that no error cancels."""
    return torch.sin(3 * x + t) * 2 + x.roll(1, -1) * (t - 0.3)


def float_noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(seed))


def fresh(step: int) -> torch.Tensor:
    """Noise of a step, the same whenever it is asked for."""
    return float_noise(1000 + step)


def naive(table: Table, x0: torch.Tensor) -> torch.Tensor:
    """Equation 11 as it stands, left to right, everything kept."""
    x, us = x0, []
    for i in range(table.n):
        us.append(wild(x, table.times[i]))
        x = x0 * table.a[i]
        for j, (b, u) in enumerate(zip(table.b[i], us, strict=True)):
            x = x + b * u
            if table.noise:
                x = x + table.noise[i][j] * fresh(j)
    return x


@pytest.mark.parametrize("schedule", [linear(13), linear_quadratic(20)], ids=["linear", "linear_quadratic"])
def test_euler_as_a_table_is_euler_bit_for_bit_in_float32(schedule):
    x = float_noise()
    table = SOLVERS["euler"].build(schedule, PATHS["condot"])
    got = drive(sample(table, start(table, x)), wild)
    for s, t in itertools.pairwise(schedule):
        x = x + (t - s) * wild(x, s)
    assert torch.equal(got, x)


@pytest.mark.parametrize("path", list(PATHS))
@pytest.mark.parametrize("name", list(SOLVERS))
def test_forgetting_settled_terms_changes_no_bit(name, path):
    table = SOLVERS[name].build(linear(9), PATHS[path])
    assert torch.equal(drive(sample(table, start(table, float_noise()), fresh), wild), naive(table, float_noise()))


@pytest.mark.parametrize("path", list(PATHS))
@pytest.mark.parametrize("name", list(SOLVERS))
def test_a_run_saved_at_any_step_continues_bit_for_bit(name, path):
    table = SOLVERS[name].build(linear(5), PATHS[path])
    whole = drive(sample(table, start(table, float_noise()), fresh), wild)
    for stop in range(table.n + 1):
        state = start(table, float_noise())
        run = sample(table, state, fresh)
        ask = next(run)
        for _ in range(stop):
            try:
                ask = run.send(wild(*ask))
            except StopIteration:
                break
        file = io.BytesIO()
        torch.save(vars(state), file)
        file.seek(0)
        assert state.step == stop
        continued = SamplerState(**torch.load(file, weights_only=True))
        assert torch.equal(drive(sample(table, continued, fresh), wild), whole)


def test_a_table_with_noise_is_refused_without_a_function_to_draw_it_before_any_velocity_is_asked():
    with pytest.raises(ConfigError, match="fresh noise"):
        next(sample(NOISY, start(NOISY, float_noise())))


@pytest.mark.parametrize("name", [name for name in SOLVERS if not SOLVERS[name].stochastic])
def test_a_deterministic_table_has_no_noise_and_asks_for_none(name):
    def never(step):
        raise AssertionError(f"asked for noise of step {step}")

    table = SOLVERS[name].build(linear(4), PATHS["condot"])
    assert table.noise == ()
    drive(sample(table, start(table, float_noise()), never), wild)


def test_noise_that_all_later_rows_share_is_asked_for_once():
    # a random walk on top of Euler: x[i+1] = x[i] + u[i] / 5 + z[i]
    rows = tuple((1.0,) * (i + 1) for i in range(5))
    table = Table("walk", "condot", 1, linear(5), (1.0,) * 5, tuple(tuple(v / 5 for v in row) for row in rows), rows)
    asked = []

    def counted(step):
        asked.append(step)
        return fresh(step)

    state = start(table, float_noise())
    got = drive(sample(table, state, counted), wild)
    assert asked == [0, 1, 2, 3, 4]
    assert torch.equal(got, naive(table, float_noise()))


def test_noise_is_asked_for_no_earlier_than_its_step_and_taken_in_the_dtype_of_x():
    state, asked = start(NOISY, float_noise()), []

    def halves(step):
        asked.append((state.step, step))
        return fresh(step).bfloat16()

    assert drive(sample(NOISY, state, halves), wild).dtype == torch.float32
    assert asked == [(0, 0), (1, 0), (1, 1)]


def test_noise_of_another_shape_is_refused_although_it_would_broadcast():
    run = sample(NOISY, start(NOISY, float_noise()), lambda step: torch.zeros(1, 4, 5))
    with pytest.raises(ConfigError, match=r"noise of step 0.*\[1, 4, 5\].*\[3, 4, 5\]"):
        run.send(wild(*next(run)))


def test_a_saved_state_is_not_changed_by_the_run_it_was_copied_from():
    table = SOLVERS["heun"].build(linear(3), PATHS["condot"])
    state = start(table, float_noise())
    run = sample(table, state)
    ask = run.send(wild(*next(run)))
    saved = copy.copy(state)
    before = copy.deepcopy(saved)
    run.send(wild(*ask))
    assert torch.equal(saved.x, before.x)
    assert torch.equal(saved.base, before.base)
    assert saved.velocities.keys() == before.velocities.keys()
    assert all(torch.equal(saved.velocities[j], before.velocities[j]) for j in saved.velocities)


@pytest.mark.parametrize(
    ("name", "path", "most"), [("euler", "condot", 0), ("midpoint", "condot", 0), ("heun", "condot", 1), ("ab2", "condot", 1), ("ddim", "cosine", 8)]
)
def test_velocities_that_no_later_row_needs_are_forgotten(name, path, most):
    table = SOLVERS[name].build(linear(9), PATHS[path])
    state = start(table, float_noise())
    held = []

    def field(x, t):
        held.append(len(state.velocities))
        return wild(x, t)

    drive(sample(table, state), field)
    assert max(held) == most
    assert state.velocities == {}


def test_the_algebra_runs_in_float32_for_half_precision_noise_and_float64_for_double():
    for given, used in [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]:
        assert drive(sample(TABLE, start(TABLE, float_noise().to(given))), lambda x, t: wild(x, t).bfloat16()).dtype == used


def test_a_velocity_of_another_shape_is_refused_although_it_would_broadcast():
    run = sample(TABLE, start(TABLE, float_noise()))
    next(run)
    with pytest.raises(ConfigError, match=r"\[1, 4, 5\].*\[3, 4, 5\]"):
        run.send(torch.zeros(1, 4, 5))


def test_a_state_of_another_table_is_refused():
    other = replace(TABLE, a=(1.0, 0.8))
    with pytest.raises(ConfigError, match="belongs to solver table"):
        next(sample(other, start(TABLE, float_noise())))


@pytest.mark.parametrize("name", list(SOLVERS))
def test_a_table_survives_json_with_every_bit_and_its_hash(name):
    table = SOLVERS[name].build(linear_quadratic(7), PATHS["cosine"])
    again = Table.from_json(json.loads(json.dumps(table.to_json())))
    assert again == table
    assert again.hash == table.hash
    assert torch.equal(drive(sample(again, start(table, float_noise()), fresh), wild), naive(table, float_noise()))


def test_the_hash_tells_any_two_tables_apart_and_stays_over_time():
    others = [replace(TABLE, name="x"), replace(TABLE, path="vp"), replace(TABLE, a=(1.0, 0.9 + 1e-16 * 2)), NOISY]
    assert len({table.hash for table in (TABLE, *others)}) == 5
    assert TABLE.hash == "1109b1b0e8174f526fa8fedd9f770e5babc330ab5ff1dcf508342267d4fbbd10"


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"times": (0.0, 1.0)}, "n \\+ 1 times"),
        ({"a": (1.0,)}, "n \\+ 1 times"),
        ({"b": ((0.4,), (0.3,))}, "rows of 1, 2"),
        ({"b": ((0.4,),)}, "rows of 1, 2"),
        ({"times": (0.0,), "a": (), "b": ()}, "n \\+ 1 times"),
        ({"a": (1.0, NAN)}, "not finite"),
        ({"b": ((INF,), (0.3, 0.7))}, "not finite"),
        ({"times": (0.0, NAN, 1.0)}, "not finite"),
        ({"times": (0.5, 0.4, 1.0)}, "must not decrease"),
        ({"times": (-0.1, 0.4, 1.0)}, "\\[0, 1\\]"),
        ({"times": (0.0, 0.4, 1.1)}, "\\[0, 1\\]"),
        ({"noise": ((0.5,),)}, "rows of noise"),
        ({"noise": ((0.5,), (0.2,))}, "rows of noise"),
        ({"noise": ((NAN,), (0.2, 0.1))}, "not finite"),
        ({"noise": None}, "not a number"),
        ({"order": -1}, "order -1"),
        ({"a": (1.0, "x")}, "not a number"),
        ({"b": 3}, "not a number"),
        ({"times": None}, "not a number"),
        ({"extra": 1}, "fields"),
    ],
)
def test_a_bad_table_is_refused_with_the_reason(change, words):
    with pytest.raises(ConfigError, match=words):
        Table.from_json({**TABLE.to_json(), **change})


@pytest.mark.parametrize("missing", ["a", "noise"])
def test_a_table_with_a_missing_field_is_refused(missing):
    with pytest.raises(ConfigError, match="fields"):
        Table.from_json({k: v for k, v in TABLE.to_json().items() if k != missing})


def test_a_time_may_repeat():
    assert replace(TABLE, times=(0.0, 0.0, 1.0)).n == 2
