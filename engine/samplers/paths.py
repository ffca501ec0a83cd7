"""Probability paths x_t = alpha_t * data + sigma_t * noise, with t = 0 noise and t = 1 data.

Shaul et al. 2024, arXiv:2403.01329, section 2. Times are floats (computed in float64) or tensors of any shape (in their dtype).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from reelstep.registry import Registry

T = TypeVar("T", float, Tensor)


def _exp(x: T) -> T:
    if isinstance(x, Tensor):
        return torch.exp(x)
    return math.exp(x)


def _expm1(x: T) -> T:
    if isinstance(x, Tensor):
        return torch.expm1(x)
    return math.expm1(x)


def _sqrt(x: T) -> T:
    if isinstance(x, Tensor):
        return torch.sqrt(x)
    return math.sqrt(x)


def _sin(x: T) -> T:
    if isinstance(x, Tensor):
        return torch.sin(x)
    return math.sin(x)


def _constant(value: float, like: T) -> T:
    if isinstance(like, Tensor):
        return torch.full_like(like, value)
    return value


def _log(x: T) -> T:
    """Natural logarithm with log(0) = -inf, for floats too."""
    if isinstance(x, Tensor):
        return torch.log(x)
    return math.log(x) if x > 0 else -math.inf


def _ratio(x: T, y: T) -> T:
    """x / y where x is not 0, with the signed infinity at y = 0, for floats too."""
    if isinstance(x, Tensor):
        return x / y
    return x / y if y else math.copysign(math.inf, x)


@dataclass(frozen=True)
class Point(Generic[T]):
    """A path at one time: alpha, sigma and their derivatives in t."""

    alpha: T
    sigma: T
    d_alpha: T
    d_sigma: T

    @property
    def half_log_snr(self) -> T:
        """lambda = log(alpha / sigma), the variable of the exponential solvers: -inf where alpha is 0, inf where sigma is 0."""
        return _log(self.alpha) - _log(self.sigma)

    @property
    def determinant(self) -> T:
        """d_alpha * sigma - d_sigma * alpha, of the map (data, noise) -> (x, velocity). Positive; inf or nan where d_sigma is infinite."""
        return self.d_alpha * self.sigma - self.d_sigma * self.alpha


class Path(Protocol):
    """A path by name, its values at a time, and the time at which it has a noise / signal ratio sigma / alpha."""

    @property
    def name(self) -> str: ...

    def at(self, t: T) -> Point[T]: ...

    def time(self, ratio: float) -> float: ...


@dataclass(frozen=True)
class CondOT:
    """Straight lines: alpha = t, sigma = 1 - t (flow matching, rectified flow)."""

    name: str = "condot"

    def at(self, t: T) -> Point[T]:
        return Point(t, 1 - t, _constant(1.0, t), _constant(-1.0, t))

    def time(self, ratio: float) -> float:
        return 1 / (1 + ratio)


@dataclass(frozen=True)
class Cosine:
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2), computed so that both ends are exact."""

    name: str = "cosine"

    def at(self, t: T) -> Point[T]:
        quarter = math.pi / 2
        alpha, sigma = _sin(quarter * t), _sin(quarter * (1 - t))
        return Point(alpha, sigma, quarter * sigma, -quarter * alpha)

    def time(self, ratio: float) -> float:
        return math.atan2(1, ratio) / (math.pi / 2)


@dataclass(frozen=True)
class VP:
    """Variance preserving, linear beta: alpha = exp(-S / 2), sigma = sqrt(1 - exp(-S)), S = (1-t)^2 (B-b)/2 + (1-t) b.

    alpha is 0.00657 at t = 0, not 0: a noise / signal ratio above 152 has a time below 0. At t = 1 sigma is 0 and its derivative -inf.
    Song et al. 2021, arXiv:2011.13456, appendix C.
    """

    name: str = "vp"
    beta_min: float = 0.1
    beta_max: float = 20.0

    def at(self, t: T) -> Point[T]:
        slope = self.beta_max - self.beta_min
        noise = 1 - t
        s = 0.5 * noise * noise * slope + noise * self.beta_min
        d_s = -noise * slope - self.beta_min
        alpha, sigma = _exp(-0.5 * s), _sqrt(-_expm1(-s))
        return Point(alpha, sigma, -0.5 * d_s * alpha, _ratio(0.5 * d_s * alpha * alpha, sigma))

    def time(self, ratio: float) -> float:
        s = math.log1p(ratio * ratio)
        return 1 - 2 * s / (self.beta_min + math.sqrt(self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * s))


PATHS: Registry[Path] = Registry(
    "path",
    {
        "condot": "reelstep.engine.samplers.paths:CONDOT",
        "cosine": "reelstep.engine.samplers.paths:COSINE",
        "vp": "reelstep.engine.samplers.paths:VARIANCE_PRESERVING",
    },
)
CONDOT = CondOT()
COSINE = Cosine()
VARIANCE_PRESERVING = VP()
