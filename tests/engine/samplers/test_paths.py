"""Paths: ends, derivatives, and floats against tensors."""

from __future__ import annotations

import math

import pytest
import torch

from reelstep.engine.samplers.paths import PATHS
from reelstep.errors import NotFound

FIELDS = ("alpha", "sigma", "d_alpha", "d_sigma", "half_log_snr", "determinant")


@pytest.mark.parametrize("name", PATHS)
def test_a_path_carries_the_name_it_is_found_by(name):
    assert PATHS[name].name == name


@pytest.mark.parametrize("name", PATHS)
def test_the_derivatives_are_those_of_autograd(name):
    t = torch.linspace(0.02, 0.98, 41, dtype=torch.float64, requires_grad=True)
    p = PATHS[name].at(t)
    for value, slope in ((p.alpha, p.d_alpha), (p.sigma, p.d_sigma)):
        (want,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(slope.detach(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PATHS)
def test_tensors_of_times_and_single_times_agree(name):
    times = [0.0, 0.1, 0.5, 0.9, 1.0]
    many = PATHS[name].at(torch.tensor(times, dtype=torch.float64))
    for i, t in enumerate(times):
        one = PATHS[name].at(t)
        for field in FIELDS:
            got, want = getattr(many, field)[i].item(), getattr(one, field)
            assert (math.isnan(got) and math.isnan(want)) or got == pytest.approx(want, rel=1e-14, abs=1e-15), (field, t)


@pytest.mark.parametrize("name", PATHS)
def test_the_data_end_is_exact(name):
    end = PATHS[name].at(1.0)
    assert (end.alpha, end.sigma, end.half_log_snr) == (1.0, 0.0, math.inf)


@pytest.mark.parametrize("name", ["condot", "cosine"])
def test_the_noise_end_has_no_signal_at_all(name):
    begin = PATHS[name].at(0.0)
    assert (begin.alpha, begin.sigma, begin.half_log_snr) == (0.0, 1.0, -math.inf)


def test_vp_has_the_published_remainder_of_signal_at_the_noise_end():
    assert PATHS["vp"].at(0.0).alpha == pytest.approx(0.00657, abs=5e-6)


@pytest.mark.parametrize("name", ["cosine", "vp"])
def test_variance_is_preserved(name):
    for t in (0.0, 0.2, 0.7, 1.0):
        p = PATHS[name].at(t)
        assert p.alpha**2 + p.sigma**2 == pytest.approx(1, abs=1e-15)


def test_lambda_is_the_logarithm_of_the_ratio():
    assert PATHS["condot"].at(0.8).half_log_snr == pytest.approx(math.log(4))


@pytest.mark.parametrize("name", PATHS)
def test_a_noise_to_signal_ratio_leads_back_to_its_time(name):
    path = PATHS[name]
    for t in (0.001, 0.1, 0.5, 0.9, 0.999):
        assert path.time(path.at(t).sigma / path.at(t).alpha) == pytest.approx(t, rel=1e-12)
    assert path.time(0.0) == 1
    assert path.time(math.exp(-path.at(0.0).half_log_snr)) == pytest.approx(0, abs=1e-12)  # inf but on VP


def test_an_unknown_path_is_answered_with_the_known_ones():
    with pytest.raises(NotFound, match="condot, cosine, vp"):
        PATHS["linear"]
