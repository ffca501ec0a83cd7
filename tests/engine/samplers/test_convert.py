"""All predictions give the same velocity, there and back, and singular ends are refused."""

from __future__ import annotations

import pytest
import torch

from reelstep.engine.samplers import convert
from reelstep.engine.samplers.paths import PATHS
from reelstep.errors import ConfigError, NotFound

GENERATOR = torch.Generator().manual_seed(0)
X1, EPS = torch.randn(2, 3, 5, generator=GENERATOR, dtype=torch.float64)


def quantities(path, t):
    """x and every prediction at t, from known data and noise."""
    p = path.at(t)
    return p.alpha * X1 + p.sigma * EPS, {"x1": X1, "eps": EPS, "v": p.alpha * EPS - p.sigma * X1, "velocity": p.d_alpha * X1 + p.d_sigma * EPS}


@pytest.mark.parametrize("t", [0.05, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", convert.TO_VELOCITY)
def test_every_prediction_gives_the_paths_velocity(prediction, path, t):
    x, known = quantities(PATHS[path], t)
    got = convert.TO_VELOCITY[prediction](known[prediction], x, t, PATHS[path])
    torch.testing.assert_close(got, known["velocity"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", ["x1", "eps", "v"])
def test_velocity_gives_every_prediction_wherever_it_is_finite(prediction, path):
    back = {"x1": convert.velocity_to_x1, "eps": convert.velocity_to_eps, "v": convert.velocity_to_v}[prediction]
    for t in (0.0, 0.05, 0.5, 0.95) + ((1.0,) if path != "vp" else ()):
        x, known = quantities(PATHS[path], t)
        torch.testing.assert_close(back(known["velocity"], x, t, PATHS[path]), known[prediction], rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", ["condot", "cosine"])
def test_v_is_regular_at_both_ends(path):
    for t in (0.0, 1.0):
        x, known = quantities(PATHS[path], t)
        torch.testing.assert_close(convert.v_to_velocity(known["v"], x, t, PATHS[path]), known["velocity"], rtol=0, atol=1e-12)


def test_predicted_data_starts_at_pure_noise_and_predicted_noise_on_vp_does():
    for prediction, path in (("x1", "condot"), ("x1", "cosine"), ("x1", "vp"), ("eps", "vp")):
        x, known = quantities(PATHS[path], 0.0)
        got = convert.TO_VELOCITY[prediction](known[prediction], x, 0.0, PATHS[path])
        torch.testing.assert_close(got, known["velocity"], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("prediction", "path", "t"), [("eps", "condot", 0.0), ("eps", "cosine", 0.0), ("x1", "condot", 1.0), ("x1", "cosine", 1.0)])
def test_a_prediction_that_says_nothing_of_the_velocity_is_refused(prediction, path, t):
    with pytest.raises(ConfigError, match="says nothing"):
        convert.TO_VELOCITY[prediction](X1, EPS, t, PATHS[path])


@pytest.mark.parametrize(
    "function", [convert.x1_to_velocity, convert.eps_to_velocity, convert.v_to_velocity, convert.velocity_to_x1, convert.velocity_to_eps, convert.velocity_to_v]
)
def test_the_end_of_vp_where_velocity_is_infinite_is_refused(function):
    with pytest.raises(ConfigError, match="no finite velocity at t=1"):
        function(X1, EPS, 1.0, PATHS["vp"])


def test_the_dtype_of_the_network_is_kept():
    x, known = quantities(PATHS["vp"], 0.4)
    assert convert.v_to_velocity(known["v"].float(), x.float(), 0.4, PATHS["vp"]).dtype == torch.float32


def test_an_unknown_prediction_is_answered_with_the_known_ones():
    with pytest.raises(NotFound, match="eps, v, velocity, x1"):
        convert.TO_VELOCITY["score"]
