"""Fields whose velocity, and for one Gaussian whose whole flow, is known in closed form; and a guided run that is broken off.

Independent of the code under test but for alpha and sigma.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from reelstep.engine.samplers.guidance import GuidanceState, guided
from reelstep.engine.samplers.ns import SamplerState, drive, sample, start
from reelstep.engine.samplers.paths import PATHS, Path


@dataclass(frozen=True)
class Mixture:
    """Data from equally likely Gaussians. means: [K, D] float64; std: of every one in every direction."""

    means: Tensor
    std: float
    path: Path

    def x1(self, x: Tensor, t: float) -> Tensor:
        """E[data | x]. x: [B, D]."""
        return self._mix(x, t)[0]

    def eps(self, x: Tensor, t: float) -> Tensor:
        """E[noise | x]."""
        return self._mix(x, t)[1]

    def velocity(self, x: Tensor, t: float) -> Tensor:
        """E[d_alpha data + d_sigma noise | x]."""
        p = self.path.at(t)
        return p.d_alpha * self.x1(x, t) + p.d_sigma * self.eps(x, t)

    def _mix(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        p = self.path.at(t)
        variance = p.alpha**2 * self.std**2 + p.sigma**2
        off = x[:, None] - p.alpha * self.means  # [B, K, D]
        weight = torch.softmax(-off.square().sum(-1) / (2 * variance), dim=1)[..., None]
        data = self.means + p.alpha * self.std**2 / variance * off
        return (weight * data).sum(1), (weight * p.sigma / variance * off).sum(1)

    def reference(self, x: Tensor, start: float = 0.0, end: float = 1.0) -> Tensor:
        """The flow from `start` to `end` by DOP853 at rtol 1e-9."""

        def field(t: float, y: np.ndarray) -> np.ndarray:
            return self.velocity(torch.from_numpy(y).view_as(x), t).numpy().ravel()

        y = solve_ivp(field, (start, end), x.numpy().ravel(), method="DOP853", rtol=1e-9, atol=1e-9).y[:, -1]
        return torch.from_numpy(y.copy()).view_as(x)

    def exact(self, x: Tensor, start: float, end: float) -> Tensor:
        """The flow of a single Gaussian: it keeps (x - alpha mean) in units of the standard deviation at its time."""
        (mean,) = self.means
        p, q = self.path.at(start), self.path.at(end)
        spread = [(r.alpha**2 * self.std**2 + r.sigma**2) ** 0.5 for r in (p, q)]
        return q.alpha * mean + spread[1] / spread[0] * (x - p.alpha * mean)


def gaussian(path: str) -> Mixture:
    return Mixture(torch.tensor([[1.5, -0.5]], dtype=torch.float64), 0.6, PATHS[path])


def four_gaussians(path: str) -> Mixture:
    return Mixture(torch.tensor([[2, 0], [-2, 0], [0, 2], [0, -2]], dtype=torch.float64), 0.3, PATHS[path])


@pytest.fixture(scope="session", name="gaussian")
def _gaussian():
    """By path name, one Gaussian."""
    return gaussian


@pytest.fixture(scope="session", name="four_gaussians")
def _four_gaussians():
    """By path name, the toy of the BNS solvers: four Gaussians of std 0.3 at (+-2, 0), (0, +-2)."""
    return four_gaussians


@pytest.fixture(scope="session")
def noise() -> Tensor:
    """[1024, 2], float64."""
    return torch.from_numpy(np.random.default_rng(1).standard_normal((1024, 2)))


def run_interrupted(table, x, rule, network, stop, fresh=None):
    """A guided run that is saved at its query number `stop`, and goes on from the file alone. Returns its end and the state of guidance."""
    sampler, guidance = start(table, x), GuidanceState()
    generator = guided(sample(table, sampler, fresh), rule, guidance)
    query = next(generator)
    for _ in range(stop):
        query = generator.send(network(*query))
    file = io.BytesIO()
    torch.save([vars(sampler), vars(guidance)], file)
    file.seek(0)
    saved_sampler, saved_guidance = torch.load(file, weights_only=True)
    guidance = GuidanceState(**saved_guidance)
    return drive(guided(sample(table, SamplerState(**saved_sampler), fresh), rule, guidance), network), guidance


@pytest.fixture(scope="session")
def interrupted():
    """`run_interrupted`."""
    return run_interrupted
