"""Tensor parallelism: linear layers split by column (outputs) or row (inputs), with the one sum behind a row (Shoeybi et al. 2019, arXiv:1909.08053).

A network's own `forward` stays as it is: it finds narrower layers, and hooks add the collectives. Heads and FFN units may divide unevenly. A layer keeps
its cut, so that whatever else is made for its weight (an adapter) is cut alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from reelstep.errors import ConfigError
from reelstep.parallel.mesh import Axis, bounds, shares
from reelstep.parallel.rules import Axes, Rules, axis_of

if TYPE_CHECKING:  # one device is spared torch's collectives
    from reelstep.parallel.collectives import Communicator


@dataclass(frozen=True)
class Cut:
    """This rank's part of a tensor: `ranges` of one dim, joined. axis: the mesh axis that the dim lies on."""

    dim: int
    axis: Axis
    ranges: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        return sum(stop - start for start, stop in self.ranges)

    def of(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of a whole tensor whose `dim` lies as the one that was cut."""
        parts = [x.narrow(dim, start, stop - start) for start, stop in self.ranges]
        return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def cut_of(name: str, shape: tuple[int, ...], axes: Axes, rules: Rules, units: Mapping[str, int], comm: Communicator) -> Cut | None:
    """Which part of a parameter this rank has; None for all of it. units: how many of a logical axis there are, where it splits in whole ones.

    Raises ConfigError if the table has another number of dims, if two dims are split, or if there are fewer units than ranks.
    """
    if axes and len(axes) != len(shape):
        raise ConfigError(f"parameter {name!r} has shape {list(shape)} and the axes {axes} of its rule; give one axis per dim")
    cuts = []
    for dim, text in enumerate(axes):
        runs, logical = axis_of(text)
        axis = rules.axes[logical] if logical else None
        if axis is None or comm.size(axis) == 1:
            continue
        count = units.get(logical, shape[dim] // runs)
        unit, rest = divmod(shape[dim], runs * count)
        if rest:
            raise ConfigError(f"dim {dim} of parameter {name!r} has size {shape[dim]}, which is not {runs} x {count} {logical}")
        start, stop = bounds(shares(count, comm.size(axis), logical))[comm.at[axis]]
        cuts.append(Cut(dim, axis, tuple(((run * count + start) * unit, (run * count + stop) * unit) for run in range(runs))))
    if len(cuts) > 1:
        raise ConfigError(f"parameter {name!r} would be split along dims {[cut.dim for cut in cuts]}; a layer is split by column or by row, not both")
    return cuts[0] if cuts else None


def split_layer(path: str, layer: nn.Module, cuts: Mapping[str, Cut], comm: Communicator) -> nn.Module:
    """What stands in the layer's place once its parameters are this rank's part: the same on it, with the sum that its split needs.

    Raises ConfigError for a layer that is neither Linear nor RMSNorm, and for a bias that is not split as its columns are.
    """
    cut = cuts.get("weight")
    if isinstance(layer, nn.Linear) and cut is not None and cut.dim == 1:
        return RowLinear(layer, cut, comm)
    if isinstance(layer, nn.Linear) and cut is not None:
        if "bias" in dict(layer.named_parameters()) and "bias" not in cuts:
            raise ConfigError(f"{path}.weight is split by column and {path}.bias is not; give both the same axis")
        return SplitLinear(layer, cut)
    if isinstance(layer, nn.RMSNorm) and cut is not None:
        return SplitRMSNorm(layer, comm, cut.axis)
    raise ConfigError(f"{path} is a {type(layer).__name__}, and a rule splits its {', '.join(cuts)}; only Linear and RMSNorm can be split")


class SplitLinear(nn.Module):
    """A Linear of some of the outputs. cut: of its weight [outputs, inputs]."""

    def __init__(self, part: nn.Linear, cut: Cut) -> None:
        super().__init__()
        self.weight = part.weight
        self.bias: Tensor | None = part.bias
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class RowLinear(SplitLinear):
    """A Linear over this rank's inputs: partial sums, added up over the axis, then the bias once.

    All that comes behind the partial sums is a hook: one that is put before it adds to them, and needs no sum of its own.
    """

    def __init__(self, part: nn.Linear, cut: Cut, comm: Communicator) -> None:
        super().__init__(part, cut)
        self.comm = comm
        self.register_forward_hook(_add_up)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


def _add_up(row: nn.Module, _: tuple[Tensor, ...], partial_sums: Tensor) -> Tensor:
    assert isinstance(row, RowLinear)
    y = row.comm.all_reduce(partial_sums, row.cut.axis)
    return y if row.bias is None else y + row.bias


class SplitRMSNorm(nn.Module):
    """RMSNorm over a split dim, as for queries and keys that are normed before their heads are taken apart: squares are summed over the axis."""

    def __init__(self, whole: nn.RMSNorm, comm: Communicator, axis: Axis) -> None:
        super().__init__()
        self.weight, self.width = whole.weight, whole.normalized_shape[-1]
        self.eps = torch.finfo(torch.float32).eps if whole.eps is None else whole.eps
        self.comm, self.axis = comm, axis

    def forward(self, x: Tensor) -> Tensor:
        squares = self.comm.all_reduce(x.float().square().sum(-1, keepdim=True), self.axis)
        return ((x.float() * torch.rsqrt(squares / self.width + self.eps)).to(x.dtype)) * self.weight
