"""Calibration of Adaptive Guidance, on velocities whose cosine, switch and error are known in closed form."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from reelstep.engine.samplers.guidance import GUIDANCE
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.schedules import linear
from reelstep.engine.samplers.tables import SOLVERS
from reelstep.errors import ConfigError, InternalError, NotFound
from reelstep.training.adaptive_guidance import Calibration, calibrate, choose_threshold, nearest_stop

N, SCALE, CONDOT = 20, 7.5, PATHS["condot"]
TABLE = SOLVERS["euler"].build(linear(N), CONDOT)
SLOPES = np.random.default_rng(0).permutation(np.linspace(0.2, 1.0, 32))  # path k's cosine is 1 - slope (1 - t)
NOISES = torch.zeros(len(SLOPES), 2, dtype=torch.float64)


def turning(slopes):
    """Unit velocities that turn towards each other with time, at a speed of each path's own; the state does not matter."""

    def networks(index):
        slope = torch.from_numpy(slopes)[index]

        def network(x, t, branches):
            c = 1 - slope * (1 - t)
            both = {"text": torch.stack([torch.ones_like(c), torch.zeros_like(c)], 1), "null": torch.stack([c, (1 - c * c).sqrt()], 1)}
            return tuple(both[b] for b in branches)

        return network

    return networks


def guided_evaluations(slopes, threshold, least):
    """1 - slope (1 - j / N) reaches the threshold first at the whole j from N (1 - (1 - threshold) / slope) on."""
    first = np.ceil(N * (1 - (1 - threshold) / slopes)).astype(int)
    return np.clip(first + 1, least, N)


def scores(slopes, evaluations):
    """Of Euler's method with guidance left out after so many evaluations: it misses h (SCALE - 1) (text - null) at each of the rest."""
    c = 1 - slopes[:, None] * (1 - np.arange(N) / N)
    missed = np.stack([1 - c, -np.sqrt(1 - c * c)], 2) * (np.arange(N) >= np.broadcast_to(evaluations, len(slopes))[:, None])[:, :, None]
    square = np.square(missed.sum(1) / N * (SCALE - 1)).mean(1)
    return pytest.approx(float((-10 * np.log10(np.maximum(square, 1e-30))).mean()), abs=1e-6), pytest.approx(-10 * math.log10(square.mean()), abs=1e-6)


@pytest.fixture(scope="module")
def calibration():
    return calibrate(turning(SLOPES), TABLE, "adaptive", CONDOT, SCALE, NOISES)


def test_the_cosines_under_full_guidance_are_kept(calibration):
    np.testing.assert_allclose(calibration.cosines, 1 - SLOPES[:, None] * (1 - np.arange(N) / N), rtol=0, atol=1e-12)


def test_the_mean_switch_is_at_half_of_the_evaluations_and_no_path_switches_before_a_quarter(calibration):
    counts = guided_evaluations(SLOPES, calibration.threshold, 5)
    assert calibration.guided == 5
    assert abs(counts.mean() - N / 2) <= 1 / len(SLOPES)
    assert calibration.expected == N + counts.mean() == calibration.adaptive.forwards
    assert (counts.min(), counts.max()) == (5, 15), "paths differ, and the slowest is held back by the guard"


def test_the_scores_of_the_rule_and_of_an_interval_of_its_cost_are_the_closed_forms(calibration):
    counts = guided_evaluations(SLOPES, calibration.threshold, 5)
    assert (calibration.adaptive.score_db, calibration.adaptive.pooled_db) == scores(SLOPES, counts)
    assert (calibration.stop, calibration.interval.forwards) == (0.5, 30)
    assert (calibration.interval.score_db, calibration.interval.pooled_db) == scores(SLOPES, N // 2)
    assert calibration.adaptive.score_db > calibration.interval.score_db + 0.8, "where paths need guidance for times of their own, the cosine is worth it"
    assert calibration.adaptive.pooled_db > calibration.interval.pooled_db + 0.2


def test_where_all_paths_are_alike_the_cosine_is_worth_nothing():
    alike = calibrate(turning(np.full(8, 0.7)), TABLE, "adaptive", CONDOT, SCALE, NOISES[:8], share=0.4)
    assert alike.adaptive == alike.interval
    assert (alike.adaptive.forwards, alike.expected, alike.stop) == (28, 28, 0.4)


def test_the_rule_built_from_its_options_is_the_one_that_was_tried(calibration):
    assert GUIDANCE["adaptive"].complete(calibration.options) == {"threshold": calibration.threshold, "guided": 5.0}


def test_it_is_tried_on_the_paths_held_out():
    others = np.linspace(0.3, 0.9, 10)
    heard = []
    found = calibrate(
        turning(SLOPES), TABLE, "adaptive", CONDOT, SCALE, NOISES, least=1, held_out=(turning(others), NOISES[:10]), progress=lambda *step: heard.append(step)
    )
    counts = guided_evaluations(others, found.threshold, 1)
    assert found.expected == N + guided_evaluations(SLOPES, found.threshold, 1).mean()
    assert found.adaptive.forwards == pytest.approx(N + counts.mean())
    assert (found.adaptive.score_db, found.adaptive.pooled_db) == scores(others, counts)
    assert found.interval.forwards == N + round(counts.mean())
    cfg = [("cfg", done, 32) for done in (8, 16, 24, 32)]
    assert heard == [*cfg, ("cfg", 8, 10), ("cfg", 10, 10), *(("adaptive", k, 10) for k in range(1, 11)), ("interval", 8, 10), ("interval", 10, 10)]


def test_predicted_data_are_compared_along_the_guided_path():
    noise = torch.from_numpy(np.random.default_rng(1).standard_normal((4, 6)))

    def network(x, t, branches):
        return tuple(torch.cos(2 * x) * (1 + t) if b == "text" else torch.sin(x) - t for b in branches)

    found = calibrate(lambda index: network, TABLE, "adaptive_x1", CONDOT, 2.0, noise, rows=3)
    x, h = noise.numpy(), 1 / N
    for j in range(N):
        text, null = np.cos(2 * x) * (1 + j * h), np.sin(x) - j * h
        p, q = x + (1 - j * h) * text, x + (1 - j * h) * null
        np.testing.assert_allclose([row[j] for row in found.cosines], (p * q).sum(1) / np.linalg.norm(p, axis=1) / np.linalg.norm(q, axis=1), atol=1e-10)
        x = x + h * (null + 2 * (text - null))


def latched(cosines, threshold, least):
    """The mean evaluations that are guided, from the rule's words."""
    counts = []
    for row in cosines.tolist():
        reaching = [j + 1 for j, c in enumerate(row) if j + 1 >= least and c >= threshold]
        counts.append(reaching[0] if reaching else len(row))
    return sum(counts) / len(counts)


@pytest.mark.parametrize("seed", range(8))
def test_no_threshold_comes_nearer_to_the_wanted_mean_even_where_cosines_fall_again(seed):
    draw = np.random.default_rng(seed)
    cosines = torch.from_numpy(draw.uniform(-1, 1, (5, 7)))
    least, wanted = int(draw.integers(1, 4)), float(draw.uniform(3, 7))
    threshold, mean = choose_threshold(cosines, least, wanted)
    assert mean == pytest.approx(latched(cosines, threshold, least))
    assert abs(mean - wanted) <= min(abs(latched(cosines, other, least) - wanted) for other in (-1.0, *cosines.flatten().tolist(), 2.0)) + 1e-12


def test_the_interval_stops_at_the_time_with_the_nearest_count_where_times_repeat():
    heun = SOLVERS["heun"].build(linear(4), CONDOT)  # evaluations at 0, 1/4, 1/4, 1/2, 1/2, 3/4, 3/4, 1
    assert [nearest_stop(heun, count) for count in (0.0, 1.2, 2.8, 5.4, 7.9)] == [0.25, 0.25, 0.5, 0.75, 1.0]


def test_json_keeps_every_bit(calibration):
    assert Calibration.from_json(json.loads(json.dumps(calibration.to_json()))) == calibration


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"rule": "cfg"}, NotFound, "known: adaptive, adaptive_x1"),
        ({"threshold": 3.0}, ConfigError, "-1 to 2"),
        ({"threshold": math.nan}, ConfigError, "-1 to 2"),
        ({"guided": 0}, ConfigError, "1 to 1000"),
        ({"cosines": []}, ConfigError, "every path has as many"),
        ({"cosines": [[0.5], [0.5, 0.6]]}, ConfigError, "every path has as many"),
        ({"cosines": [[math.nan]]}, ConfigError, "not finite"),
        ({"expected": math.inf}, ConfigError, "not finite"),
        ({"cosines": 3}, ConfigError, "another type"),
        ({"adaptive": {"forwards": 30.0}}, ConfigError, "another type"),
        ({"interval": None}, ConfigError, "another type"),
        ({"date": "today"}, ConfigError, "has the fields"),
    ],
)
def test_a_damaged_artifact_is_refused(calibration, change, error, match):
    with pytest.raises(error, match=match):
        Calibration.from_json({**calibration.to_json(), **change})


def test_what_cannot_be_calibrated_is_refused():
    def attempt(rule="adaptive", path="condot", scale=SCALE, network=None, **options):
        calibrate(turning(SLOPES) if network is None else lambda index: network, TABLE, rule, PATHS[path], scale, NOISES, **options)

    with pytest.raises(NotFound, match="known: adaptive, adaptive_x1"):
        attempt(rule="apg")
    with pytest.raises(ConfigError, match="for path 'condot'"):
        attempt(path="vp")
    with pytest.raises(ConfigError, match="no guidance to save"):
        attempt(scale=1.0)
    for options in ({"share": 0.2}, {"share": 1.1}, {"share": math.nan}, {"least": 0}, {"least": 11}):
        with pytest.raises(ConfigError, match="guided in any case"):
            attempt(**options)
    with pytest.raises(InternalError, match="not finite"):
        attempt(network=lambda x, t, branches: (x * math.nan,) * len(branches))


def test_full_guidance_never_dropped_scores_as_itself():
    whole = calibrate(turning(SLOPES), TABLE, "adaptive", CONDOT, SCALE, NOISES, share=1.0)
    assert (whole.adaptive, whole.stop) == (whole.interval, 1.0)
    assert (whole.adaptive.forwards, whole.adaptive.pooled_db) == (40, pytest.approx(300))
    assert replace(whole, threshold=0.5).options == {"threshold": 0.5, "guided": 5.0}
