"""Fit of LinearAG: one least squares problem for each evaluation, from inner products alone.

Full guidance gives each path 2n outputs, the text and the null ones; of them only their 2n x 2n inner products are kept, divided by the
path's energy and averaged. Castillo et al. 2023, arXiv:2312.12487, equation 10.

P paths, B of them at once, n evaluations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reelstep.engine.samplers.linear_ag import LinearAG, alternate
from reelstep.engine.samplers.ns import Table
from reelstep.engine.samplers.paths import PATHS
from reelstep.training.adaptive_guidance import full_guidance
from reelstep.training.field import Network, Networks


@torch.no_grad()
def fit_linear_ag(
    networks: Networks,
    table: Table,
    scale: float,
    noises: Tensor,
    policy: str | None = None,
    ridge: float = 1e-8,
    rows: int = 8,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> LinearAG:
    """Fit to full guidance from noises [P, ...].

    policy: `alternate` unless given; it has no part in the fit. ridge: added to the diagonal, as a share of its mean, since neighbouring
    outputs are almost the same and tell little apart. rows: paths of one forward. progress hears how many paths are done, of how many.
    """
    total = torch.zeros(2 * table.n, 2 * table.n, dtype=torch.float64)
    for index in torch.arange(len(noises)).split(rows):
        total += inner_products(networks(index), table, scale, noises[index]).sum(0)
        progress(int(index[-1]) + 1, len(noises))
    text, null, r2 = zip(((), (), 1.0), *(solve(total / len(noises), j, ridge) for j in range(1, table.n)), strict=True)
    return LinearAG(alternate(table.n) if policy is None else policy, text, null, scale, table.hash, ridge, len(noises), r2)


def inner_products(network: Network, table: Table, scale: float, noise: Tensor) -> Tensor:
    """[B, 2n, 2n] float64: of the outputs text 0..n-1, null 0..n-1 of each path, divided by their total energy."""
    _, seen = full_guidance(network, table, PATHS[table.path], scale, noise, lambda x, t, text, null: torch.stack([text, null], 1).flatten(2).double())
    outputs = torch.stack(seen, 2).flatten(1, 2)
    products = outputs @ outputs.mT
    return products / products.diagonal(dim1=1, dim2=2).sum(1).clamp_min(1e-300)[:, None, None]


def solve(products: Tensor, j: int, ridge: float) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """Least squares of null j on text 0..j and null 0..j-1: their coefficients, and the share of null j that they explain."""
    n = len(products) // 2
    known, wanted = [*range(j + 1), *range(n, n + j)], n + j
    system, target, energy = products[known][:, known], products[known, wanted], products[wanted, wanted]
    ridged = system + ridge * system.diagonal().mean() * torch.eye(len(known), dtype=system.dtype)
    beta = torch.linalg.lstsq(ridged, target, driver="gelsd").solution
    missed = energy - 2 * beta @ target + beta @ system @ beta
    return tuple(beta[: j + 1].tolist()), tuple(beta[j + 1 :].tolist()), float(1 - missed / energy.clamp_min(1e-300))
