"""Schedules: the increasing times, steps + 1 of them from 0 (noise) to 1 (data), at which a solver stops.

Two things are called sigma elsewhere: the noise level tau = 1 - t of flow models, and the noise / signal ratio sigma / alpha of
diffusion models. `karras` and `exponential` space tau; `from_sigmas` takes ratios, and so any spacing of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise

from reelstep.engine.samplers.paths import Path
from reelstep.errors import ConfigError
from reelstep.registry import Registry

Schedule = Callable[[int], tuple[float, ...]]
"""From the number of steps to steps + 1 times."""


def linear(steps: int) -> tuple[float, ...]:
    """Equal steps."""
    _check_steps(steps)
    return tuple(i / steps for i in range(steps + 1))


def linear_quadratic(steps: int, emulated: int = 250, linear_steps: int | None = None) -> tuple[float, ...]:
    """The first `linear_steps` of `emulated` equal steps, then steps that grow quadratically to 1, with no kink between.

    linear_steps: half of the steps unless given; none below 4 steps, where one call on 1 / emulated of the way is a call wasted.
    From steps = emulated on there is nothing to emulate: equal steps.
    Movie Gen, Polyak et al. 2024, arXiv:2410.13720, section 3.4.2; the quadratic part as in Mochi's public code.
    """
    _check_steps(steps)
    if steps >= emulated:
        return linear(steps)
    head = (steps // 2 if steps >= 4 else 0) if linear_steps is None else linear_steps
    if not 0 <= head < steps:
        raise ConfigError(f"linear_steps={head} of {steps} steps; 0..{steps - 1} leaves a step for the quadratic part")
    tail = steps - head
    curve = 1 - steps / emulated  # what steps of 1 / emulated alone would leave
    quadratic = ((head + j) / emulated + curve * (j / tail) ** 2 for j in range(1, tail))
    return (*(i / emulated for i in range(head + 1)), *quadratic, 1.0)


def shifted(steps: int, shift: float = 3.0) -> tuple[float, ...]:
    """Equal steps of noise level tau = 1 - t moved to shift * tau / (1 + (shift - 1) * tau). shift > 1 lingers near the noise; 1 is `linear`.

    The static shift of SD3 (Esser et al. 2024, arXiv:2403.03206, section 5.3.2), whose 1024-pixel models use 3.
    """
    if not (math.isfinite(shift) and shift > 0):
        raise ConfigError(f"shift={shift}; a finite number above 0, 1 for no shift")
    return tuple(t / (t + shift * (1 - t)) for t in linear(steps))


def late(steps: int) -> tuple[float, ...]:
    """`shifted` by 0.6, which lingers near the data: half of the steps reach t = 0.625.

    For guidance that is dropped after a share of the evaluations: it then holds for longer. With 5/3 of the steps the first ones, where solvers err most,
    are as small as those of `linear`. Ours.
    """
    return shifted(steps, 0.6)


def dynamic_shift(steps: int, tokens: int, low: tuple[int, float] = (256, 0.5), high: tuple[int, float] = (4096, 1.15)) -> tuple[float, ...]:
    """`shifted` by exp(mu), mu linear in the number of image tokens through the points (tokens, mu) `low` and `high`, and on beyond them.

    FLUX (black-forest-labs/flux, sampling.py), whose points are the defaults: a shift of 1.65 at 256 pixels and 3.16 at 1024.
    """
    if tokens < 1 or not low[0] < high[0]:
        raise ConfigError(f"tokens={tokens} on the line through {low} and {high}; at least 1 token, and points (tokens, mu) that increase in tokens")
    slope = (high[1] - low[1]) / (high[0] - low[0])
    return shifted(steps, math.exp(low[1] + slope * (tokens - low[0])))


def karras(steps: int, tau_min: float = 0.001, tau_max: float = 1.0, rho: float = 7.0) -> tuple[float, ...]:
    """Noise levels tau = 1 - t from tau_max down to tau_min as in `karras_sigmas`, then 0. As diffusers spaces those of flow models."""
    return _from_levels(karras_sigmas(steps, tau_min, tau_max, rho))


def exponential(steps: int, tau_min: float = 0.001, tau_max: float = 1.0) -> tuple[float, ...]:
    """Noise levels tau = 1 - t from tau_max down to tau_min in equal ratios, then 0. As diffusers spaces those of flow models."""
    return _from_levels(exponential_sigmas(steps, tau_min, tau_max))


def karras_sigmas(count: int, low: float, high: float, rho: float = 7.0) -> tuple[float, ...]:
    """`count` numbers from high down to low, equally spaced in their rho-th roots; one is high. Karras et al. 2022, arXiv:2206.00364, equation 5."""
    _check_spacing(count, low, high)
    if not (math.isfinite(rho) and rho > 0):
        raise ConfigError(f"rho={rho}; a finite number above 0, 7 as published")
    first, last = high ** (1 / rho), low ** (1 / rho)
    return tuple((first + q * (last - first)) ** rho for q in _fractions(count))


def exponential_sigmas(count: int, low: float, high: float) -> tuple[float, ...]:
    """`count` numbers from high down to low, equally spaced in their logarithms; one is high."""
    _check_spacing(count, low, high)
    return tuple(high * (low / high) ** q for q in _fractions(count))


def from_sigmas(sigmas: Iterable[float], path: Path) -> tuple[float, ...]:
    """The times at which `path` has these noise / signal ratios sigma / alpha, which decrease to 0 or above. Raises ConfigError.

    The first may be inf where the path has no signal at t = 0. If its time is above 0, the run starts there, from noise alone.
    """
    ratios = tuple(map(float, sigmas))
    noisiest = math.exp(-path.at(0.0).half_log_snr)
    if len(ratios) < 2 or not all(s > t for s, t in pairwise(ratios)) or ratios[-1] < 0 or ratios[0] > noisiest:
        raise ConfigError(f"a list of sigmas on path {path.name!r} has at least two, decreasing within [0, {noisiest:.6g}]; got {list(ratios)}")
    return tuple(max(0.0, path.time(ratio)) for ratio in ratios)  # the noisiest may round to below 0


ALIGN_YOUR_STEPS = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.0),
}
"""Noise / signal ratios of 10 steps, for `from_sigmas`, optimised for a model. Sabour et al. 2024, arXiv:2404.14507; 0 for the last, published as 0.029."""


def explicit(times: Iterable[float]) -> tuple[float, ...]:
    """A user's own list, checked: at least two finite times that increase within [0, 1]. Raises ConfigError."""
    checked = tuple(float(t) for t in times)
    inside = all(0 <= t <= 1 for t in checked)  # NaN is not
    if len(checked) < 2 or not inside or any(s >= t for s, t in pairwise(checked)):
        raise ConfigError(f"a list of times has at least two, increasing within [0, 1] (0 is noise, 1 data); got {list(checked)}")
    return checked


def _from_levels(levels: tuple[float, ...]) -> tuple[float, ...]:
    """The times of decreasing noise levels tau, and the data end."""
    if levels[0] > 1:
        raise ConfigError(f"tau_max={levels[0]}; at most 1, which is pure noise. For noise / signal ratios use from_sigmas")
    return (*(1 - tau for tau in levels), 1.0)


def _fractions(count: int) -> tuple[float, ...]:
    """0 to 1 in `count` points."""
    return tuple(i / (count - 1) for i in range(count)) if count > 1 else (0.0,)


def _check_spacing(count: int, low: float, high: float) -> None:
    _check_steps(count)
    if not 0 < low < high < math.inf:
        raise ConfigError(f"sigmas from {high} down to {low}; finite, the first above the last and both above 0")


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ConfigError(f"steps={steps}; at least 1")


SCHEDULES: Registry[Schedule] = Registry(
    "schedule",
    {
        "linear": "reelstep.engine.samplers.schedules:linear",
        "linear_quadratic": "reelstep.engine.samplers.schedules:linear_quadratic",
        "shifted": "reelstep.engine.samplers.schedules:shifted",
        "late": "reelstep.engine.samplers.schedules:late",
        "karras": "reelstep.engine.samplers.schedules:karras",
        "exponential": "reelstep.engine.samplers.schedules:exponential",
    },
)
