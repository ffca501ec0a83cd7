"""Calibration of step caches, on a network whose signal and residual change as exponentials of time, so that all it records and skips is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reelstep.engine.samplers.guidance import GUIDANCE
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.schedules import linear
from reelstep.engine.samplers.step_cache import STEP_CACHES
from reelstep.engine.samplers.tables import SOLVERS
from reelstep.errors import ConfigError
from reelstep.training.step_cache import Split, built, calibrate, choose_threshold, fit_polynomial, record

N, FEWER = 12, 8
CONDOT = PATHS["condot"]
TABLE, SHORT = (SOLVERS["euler"].build(linear(n), CONDOT) for n in (N, FEWER))
RATES = np.random.default_rng(1).uniform(0.5, 2.0, 6)  # of a path's signal: it is exp(rate t), and the residual exp(2 rate t) + 1
NOISES = torch.randn(len(RATES), 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
PLAIN = GUIDANCE["none"].build(1.0, CONDOT, {})


def splits(index):
    """Tokens of x's shape that start at 0; the first block adds the signal, all blocks together the residual, which is the velocity."""
    rate = torch.from_numpy(RATES)[index, None, None]

    def run(program, inputs):
        t = inputs["modulation"]
        signal, residual = torch.exp(rate * t), torch.exp(2 * rate * t) + 1
        if program == "denoise_embed":
            return {"hidden": torch.zeros_like(inputs["x"]), "signal": signal.expand_as(inputs["x"])}
        if program == "denoise_first":
            return {"hidden": inputs["hidden"] + signal}
        if program == "denoise_last":
            return {"velocity": inputs["hidden"] + inputs["residual"]}
        if program == "denoise_rest":
            return {"residual": (residual - signal).expand_as(inputs["hidden"]), "velocity": residual.expand_as(inputs["hidden"])}
        return {"velocity": residual.expand_as(inputs["x"])}

    def inputs(x, t, branch):
        return {"x": x, "modulation": torch.full((len(x), 1, 1), t, dtype=torch.float64), "context": x}

    return Split(inputs, run, lambda output, x, t: output)


def changes_of(values):
    """[R, n, n] of values [R, n]."""
    before, now = values[:, :, None], values[:, None, :]
    return np.triu(np.abs(now - before) / np.abs(before))


def at_times(rate, n):
    return np.exp(np.multiply.outer(np.atleast_1d(rate), np.arange(n) / n))


def runs_of(name, signals, threshold, polynomial=lambda change: change):
    """Which evaluations of one path run, in plain Python."""
    runs, distance = [0], 0.0
    for j in range(1, len(signals)):
        since = j - 1 if name == "teacache" else runs[-1]
        change = polynomial(abs(signals[j] - signals[since]) / signals[since])
        distance = distance + max(change, 0) if name == "teacache" else change
        if j == len(signals) - 1 or distance >= threshold:
            runs.append(j)
            distance = 0.0
    return runs


@torch.no_grad()
def test_what_is_recorded_is_how_signal_and_residual_change_between_any_two_evaluations():
    for name, reused in (("teacache", lambda s: s**2 + 1), ("first_block", lambda s: s**2 + 1 - s)):
        records = record(name, TABLE, PLAIN, splits, NOISES, 4, lambda what, done, of: None)
        signals = at_times(RATES, N)
        assert np.allclose(records.signals, changes_of(signals), atol=1e-12)
        assert np.allclose(records.residuals, changes_of(reused(signals)), atol=1e-12)


def test_the_polynomial_is_that_of_least_squares():
    generator = np.random.default_rng(0)
    x = generator.uniform(0.02, 0.4, 200)
    for coefficients, noise in (((0.01, 0.5, 2.0, 0.3, 4.0), 0.0), ((0.02, 1.0, 1.0, 2.0, 10.0), 1e-3)):
        y = np.polyval(coefficients[::-1], x) + noise * generator.standard_normal(len(x))
        got = fit_polynomial(x, y)
        assert np.allclose(np.polyval(got[::-1], x), np.polyval(np.polyfit(x, y, 4), x), atol=1e-9)
        assert noise or np.allclose(got, coefficients, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "degree"),
    [
        (lambda x: 0.3 - (x - 0.25) ** 2, 1),  # turns down, and so does every degree above a line
        (lambda x: 0.05 + x / 5 + x**3, 4),
        (lambda x: np.maximum(x - 0.1, 0.0), 0),  # a line, but one that takes small changes for none
        (lambda x: 1 - x, 0),
    ],
)
def test_a_polynomial_that_falls_or_begins_below_0_gives_way_to_a_lower_degree(shape, degree):
    x = np.linspace(0.01, 0.4, 60)
    y = shape(x) + 1e-4 * np.sin(40 * x)
    got = fit_polynomial(x, y)
    far = np.polyval(got[::-1], np.linspace(0, 10, 5000))
    assert far[0] >= 0
    assert (np.diff(far) > 0).all()
    expected = np.polyval(np.polyfit(x, y, degree), x) if degree else (x @ y) / (x @ x) * x
    assert np.allclose(np.polyval(got[::-1], x), expected, atol=1e-9)


@pytest.mark.parametrize("name", list(STEP_CACHES))
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7])
def test_the_threshold_skips_as_near_the_share_as_any_does(name, share):
    signals = at_times(RATES, N)
    threshold, got = choose_threshold(built(name, N, {}), changes_of(signals), share)

    def skipped(threshold):
        return 1 - sum(len(runs_of(name, path, threshold)) for path in signals) / signals.size

    assert got == pytest.approx(skipped(threshold))
    assert abs(got - share) <= min(abs(skipped(other) - share) for other in np.geomspace(1e-3, 20, 3000)) + 1e-12


@pytest.mark.parametrize("name", list(STEP_CACHES))
def test_a_calibration_skips_and_misses_what_the_closed_form_says(name):
    found = calibrate(name, 0.4, TABLE, SHORT, PLAIN, (splits, NOISES), (splits, NOISES), rows=4)
    signals, options = at_times(RATES, N), found.options
    reused = signals**2 + 1 - (signals if name == "first_block" else 0)
    steps = np.array([np.abs(np.diff(values)) / values[:, :-1] for values in (signals, reused)]).reshape(2, -1)
    assert np.allclose(np.array(found.pairs).T, steps, atol=1e-12)
    coefficients = [options[f"c{k}"] for k in range(5)] if name == "teacache" else [0.0, 1.0]
    if name == "teacache":
        assert coefficients == pytest.approx(fit_polynomial(*steps), rel=1e-6)

    def grow(change):
        return np.polyval(coefficients[::-1], change)

    assert found.r2 == pytest.approx(1 - ((steps[1] - grow(steps[0])) ** 2).sum() / ((steps[1] - steps[1].mean()) ** 2).sum())
    runs = [runs_of(name, path, options["threshold"], grow) for path in signals]
    share = 1 - sum(map(len, runs)) / signals.size
    assert found.expected == pytest.approx(share)
    assert found.cached == pytest.approx(share), "the held-out paths are the same here"
    assert 0.3 < share < 0.5
    errors = []
    for path, ran in zip(signals, runs, strict=True):
        at = [max(j for j in ran if j <= k) for k in range(N)]
        velocity = path**2 + 1
        given = velocity[at] + (path - path[at] if name == "first_block" else 0)
        errors.append((given - velocity).sum() / N)
    assert found.score_db == pytest.approx(float(np.mean(-10 * np.log10(np.maximum(np.square(errors), 1e-30)))), abs=1e-6)
    short = (at_times(RATES, FEWER) ** 2 + 1).sum(1) / FEWER - (signals**2 + 1).sum(1) / N
    assert found.fewer_db == pytest.approx(float(np.mean(-20 * np.log10(np.abs(short)))), abs=1e-6)


@pytest.mark.parametrize("share", [0.0, -0.1, 0.9, float("nan")])
def test_a_share_that_cannot_be_is_refused_before_any_path_runs(share):
    def never(index):
        raise AssertionError

    with pytest.raises(ConfigError, match=r"above 0, and at most 0\.833"):
        calibrate("teacache", share, TABLE, SHORT, PLAIN, (never, NOISES), (never, NOISES))
