"""Schedules: the increasing times, steps + 1 of them from 0 (noise) to 1 (data), at which a solver stops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise

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


def explicit(times: Iterable[float]) -> tuple[float, ...]:
    """A user's own list, checked: at least two finite times that increase within [0, 1]. Raises ConfigError."""
    checked = tuple(float(t) for t in times)
    inside = all(0 <= t <= 1 for t in checked)  # NaN is not
    if len(checked) < 2 or not inside or any(s >= t for s, t in pairwise(checked)):
        raise ConfigError(f"a list of times has at least two, increasing within [0, 1] (0 is noise, 1 data); got {list(checked)}")
    return checked


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ConfigError(f"steps={steps}; at least 1")


SCHEDULES: Registry[Schedule] = Registry(
    "schedule",
    {
        "linear": "reelstep.engine.samplers.schedules:linear",
        "linear_quadratic": "reelstep.engine.samplers.schedules:linear_quadratic",
        "shifted": "reelstep.engine.samplers.schedules:shifted",
    },
)
