"""What fits of solvers are made against: velocity fields, exact ends, and the score that compares them.

B samples, any shape behind. All in the dtype of the noise.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from reelstep.errors import InternalError

Field = Callable[[Tensor, Tensor], Tensor]
"""The velocity u [B, ...] at x [B, ...] and time t [], differentiable in both. A field of many conditions knows which rows are asked."""


def score_db(x: Tensor, truth: Tensor) -> Tensor:
    """-10 log10 of each sample's mean square error, [B]: PSNR for a range of 1, whatever the range. Higher is better."""
    return -10 * (x - truth).square().flatten(1).mean(1).clamp_min(1e-30).log10()


def solve(field: Field, noise: Tensor, tolerance: float = 1e-5) -> Tensor:
    """The end of the path from `noise` at t = 0 to t = 1, by scipy's adaptive RK45 with this relative and absolute tolerance."""

    def slope(t: float, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        u = field(torch.from_numpy(x).to(noise.dtype).view_as(noise), torch.tensor(t, dtype=noise.dtype))
        return u.double().numpy().ravel()

    with torch.no_grad():
        found = solve_ivp(slope, (0.0, 1.0), noise.double().numpy().ravel(), rtol=tolerance, atol=tolerance, t_eval=(1.0,))
    if not found.success:
        raise InternalError(f"the reference solve failed: {found.message}")
    return torch.from_numpy(found.y[:, -1].copy()).to(noise.dtype).view_as(noise)
