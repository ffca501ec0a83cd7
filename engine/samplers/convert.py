"""Every conversion between what denoisers give and the velocity that samplers want. The only place where they are written.

x = alpha * x1 + sigma * eps,  u = dx/dt = d_alpha * x1 + d_sigma * eps,  v = alpha * eps - sigma * x1.

Arguments: the quantity, the state x of the same shape, the time (one float for all rows), the path. Any linear quantity will
do: tensors, and the symbols that solver tables are derived with (`fold.Rule`). A conversion that would divide by zero at the
given time raises ConfigError. Shaul et al. 2024, arXiv:2403.01329, table 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from reelstep.engine.samplers.fold import Rule
from reelstep.engine.samplers.paths import Path, Point
from reelstep.errors import ConfigError
from reelstep.registry import Registry

Q = TypeVar("Q", Tensor, Rule)
ToVelocity = Callable[[Tensor, Tensor, float, Path], Tensor]


def _regular(path: Path, t: float) -> Point[float]:
    """The path at t, where its velocity is finite."""
    point = path.at(t)
    if not math.isfinite(point.determinant):
        raise ConfigError(f"path {path.name!r} has no finite velocity at t={t}; end at an earlier time, or use a solver that does not evaluate there")
    return point


def _divisor(value: float, what: str, path: Path, t: float) -> float:
    if value == 0:
        raise ConfigError(f"{what} says nothing of the velocity on path {path.name!r} at t={t}; stay inside (0, 1), or use a v or velocity model")
    return value


def velocity_to_velocity(u: Tensor, x: Tensor, t: float, path: Path) -> Tensor:
    """A velocity model's output, as it is."""
    return u


def x1_to_velocity(x1: Q, x: Q, t: float, path: Path) -> Q:
    """From predicted data. Raises ConfigError where sigma is 0 (t = 1)."""
    p = _regular(path, t)
    eps = (x - p.alpha * x1) / _divisor(p.sigma, "predicted data", path, t)
    return p.d_alpha * x1 + p.d_sigma * eps


def eps_to_velocity(eps: Q, x: Q, t: float, path: Path) -> Q:
    """From predicted noise. Raises ConfigError where alpha is 0 (t = 0 of every path with zero terminal SNR)."""
    p = _regular(path, t)
    x1 = (x - p.sigma * eps) / _divisor(p.alpha, "predicted noise", path, t)
    return p.d_alpha * x1 + p.d_sigma * eps


def v_to_velocity(v: Q, x: Q, t: float, path: Path) -> Q:
    """From v = alpha * eps - sigma * x1. Regular at both ends. Salimans and Ho 2022, arXiv:2202.00512, for any alpha, sigma."""
    p = _regular(path, t)
    norm = p.alpha * p.alpha + p.sigma * p.sigma
    x1 = (p.alpha * x - p.sigma * v) / norm
    eps = (p.sigma * x + p.alpha * v) / norm
    return p.d_alpha * x1 + p.d_sigma * eps


def velocity_to_x1(u: Q, x: Q, t: float, path: Path) -> Q:
    """The data that the velocity points to. Regular at both ends."""
    p = _regular(path, t)
    return (p.sigma * u - p.d_sigma * x) / p.determinant


def velocity_to_eps(u: Q, x: Q, t: float, path: Path) -> Q:
    """The noise that the velocity comes from. Regular at both ends."""
    p = _regular(path, t)
    return (p.d_alpha * x - p.alpha * u) / p.determinant


def velocity_to_v(u: Q, x: Q, t: float, path: Path) -> Q:
    """v = alpha * eps - sigma * x1. Regular at both ends."""
    p = _regular(path, t)
    return p.alpha * velocity_to_eps(u, x, t, path) - p.sigma * velocity_to_x1(u, x, t, path)


TO_VELOCITY: Registry[ToVelocity] = Registry(
    "prediction",
    {
        "velocity": "reelstep.engine.samplers.convert:velocity_to_velocity",
        "x1": "reelstep.engine.samplers.convert:x1_to_velocity",
        "eps": "reelstep.engine.samplers.convert:eps_to_velocity",
        "v": "reelstep.engine.samplers.convert:v_to_velocity",
    },
)
