"""Tiles of a long tensor on several ranks: each runs some of them, and all get all results.

For autoencoders, whose activations fill a device long before their weights do. Tiles that overlap are blended by who asks for them; a halo instead is
cut off, and where it covers what the function reads around each value, the result is that of the whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reelstep.errors import ConfigError
from reelstep.parallel.collectives import Communicator
from reelstep.parallel.mesh import Axis


@dataclass(frozen=True)
class Tile:
    """Positions begin to end of a dim go in; those from first to last are kept of the result."""

    begin: int
    end: int
    first: int
    last: int


def halo_tiles(length: int, kept: int, halo: int) -> tuple[Tile, ...]:
    """Tiles of one size, min(length, kept + 2 halo), whose kept parts cover 0 to `length` once. Edge tiles reach further inwards instead of out.

    Raises ConfigError for kept below 1 or a negative halo.
    """
    if kept < 1 or halo < 0:
        raise ConfigError(f"tiles that keep {kept} with a halo of {halo}; keep at least 1, with a halo of at least 0")
    size = min(length, kept + 2 * halo)
    tiles = []
    for first in range(0, length, kept):
        begin = min(max(first - halo, 0), length - size)
        tiles.append(Tile(begin, begin + size, first, min(first + kept, length)))
    return tuple(tiles)


def run_tiles(function: Callable[[Tensor], Tensor], tiles: Sequence[Tensor], comm: Communicator, axis: Axis) -> list[Tensor]:
    """`function` of every tile, on every rank: rank i of the axis computes tiles i, i + p, ... and the results are gathered.

    Raises ConfigError for tiles of different shapes, or fewer tiles than ranks.
    """
    shapes = {tuple(tile.shape) for tile in tiles}
    if len(shapes) != 1:
        raise ConfigError(f"tiles have shapes {sorted(shapes)}; cut them to one shape, the last ones further back")
    ranks, place = comm.size(axis), comm.at[axis]
    if len(tiles) < ranks:
        raise ConfigError(f"{len(tiles)} tiles for {ranks} ranks of {axis}; cut smaller tiles, or use at most {len(tiles)} ranks")
    mine = torch.stack([function(tile) for tile in tiles[place::ranks]])
    counts = [len(tiles[i::ranks]) for i in range(ranks)]
    parts = comm.all_gather(mine, axis, 0, counts).split(counts)
    return [parts[i % ranks][i // ranks] for i in range(len(tiles))]


def with_halo(
    function: Callable[[Tensor], Tensor], x: Tensor, dim: int, tiles: Sequence[Tile], comm: Communicator, axis: Axis, up: int = 1, down: int = 1
) -> Tensor:
    """`function` of x by tiles along `dim`, each rank some of them. The function gives `up` positions for every `down` of x.

    Raises ConfigError for a tile that does not begin and end at multiples of `down`.
    """
    for tile in tiles:
        if any(edge % down for edge in (tile.begin, tile.end, tile.first, tile.last)):
            raise ConfigError(f"{tile} of a function that turns {down} positions into {up}; its edges must be multiples of {down}")
    results = run_tiles(function, [x.narrow(dim, tile.begin, tile.end - tile.begin) for tile in tiles], comm, axis)
    kept = [
        result.narrow(dim, (tile.first - tile.begin) * up // down, (tile.last - tile.first) * up // down)
        for result, tile in zip(results, tiles, strict=True)
    ]  # fmt: skip
    return torch.cat(kept, dim=dim)
