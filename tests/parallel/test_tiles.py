from __future__ import annotations

from typing import Any

import numpy as np
import on_ranks
import pytest
import torch
import torch.nn.functional as F

from reelstep.engine.models.tae import TAE
from reelstep.engine.pipelines.latent import blend_tiles
from reelstep.errors import ConfigError
from reelstep.parallel.tiles import halo_tiles, run_tiles, with_halo


class Alone:
    """Rank 0's links where none is needed."""

    def __init__(self, ranks: int = 1) -> None:
        self.ranks, self.at = ranks, {"cp": 0}

    def size(self, axis: str) -> int:
        return self.ranks

    def all_gather(self, x: torch.Tensor, *_: Any) -> torch.Tensor:
        return x


@pytest.mark.parametrize(("length", "kept", "halo"), [(12, 4, 2), (13, 4, 2), (3, 4, 2), (9, 2, 0)])
def test_halo_tiles_keep_every_position_once_and_have_one_size(length: int, kept: int, halo: int) -> None:
    tiles = halo_tiles(length, kept, halo)
    assert [i for tile in tiles for i in range(tile.first, tile.last)] == list(range(length))
    assert {tile.end - tile.begin for tile in tiles} == {min(length, kept + 2 * halo)}
    for tile in tiles:
        assert tile.begin == 0 or tile.first - tile.begin >= halo
        assert tile.end == length or tile.end - tile.last >= halo


def test_a_halo_of_what_a_function_reads_gives_the_whole() -> None:
    x, weight = torch.randn(1, 2, 17, 5), torch.randn(2, 2, 5, 3)

    def convolve(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, weight, padding=(2, 1))

    assert torch.allclose(with_halo(convolve, x, 2, halo_tiles(17, 4, 2), Alone(), "cp"), convolve(x), atol=1e-5)
    assert not torch.allclose(with_halo(convolve, x, 2, halo_tiles(17, 4, 1), Alone(), "cp"), convolve(x), atol=1e-5)
    doubled = with_halo(lambda x: convolve(x).repeat_interleave(2, 2), x, 2, halo_tiles(17, 4, 2), Alone(), "cp", up=2)
    assert torch.allclose(doubled, convolve(x).repeat_interleave(2, 2), atol=1e-5)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_an_autoencoder_by_tiles_is_that_of_one_device(world: Any, ranks: int) -> None:
    torch.manual_seed(0)
    tae = TAE(on_ranks.SMALL_TAE).eval()
    weights = {name: w.numpy().copy() for name, w in tae.state_dict().items()}
    tae = tae.double()
    begins, size = [0, 2, 4, 6, 7], 3
    latent, video = torch.randn(1, 4, 10, 2, 2), torch.randn(1, 3, 20, 8, 8)
    with torch.no_grad():
        decoded = [tae.decode(latent[:, :, b : b + size].double()) for b in begins]
        encoded = [tae.encode(video[:, :, 2 * b : 2 * (b + size)].double()) for b in begins]
    mesh = f"cp={ranks}"
    for found in world.run(ranks, on_ranks.tae_tiles, weights, mesh, [latent[:, :, b : b + size].numpy() for b in begins], False):
        joined, wanted = blend_tiles([torch.from_numpy(y) for y in found], begins, 2), blend_tiles(decoded, begins, 2)
        assert joined.shape == (1, 3, 20, 8, 8)
        assert np.linalg.norm(joined - wanted) < 1e-5 * np.linalg.norm(wanted)
    for found in world.run(ranks, on_ranks.tae_tiles, weights, mesh, [video[:, :, 2 * b : 2 * (b + size)].numpy() for b in begins], True):
        for y, wanted in zip(found, encoded, strict=True):
            assert np.linalg.norm(y - wanted.numpy()) < 1e-5 * np.linalg.norm(wanted)


def test_tiles_that_cannot_be_spread_are_refused() -> None:
    two = Alone(2)
    with pytest.raises(ConfigError, match="1 tiles for 2 ranks of cp"):
        run_tiles(lambda x: x, [torch.zeros(1)], two, "cp")
    with pytest.raises(ConfigError, match="cut them to one shape"):
        run_tiles(lambda x: x, [torch.zeros(1), torch.zeros(2)], two, "cp")
    with pytest.raises(ConfigError, match="keep at least 1"):
        halo_tiles(4, 0, 1)
    with pytest.raises(ConfigError, match="multiples of 2"):
        with_halo(lambda x: x[::2], torch.zeros(6), 0, halo_tiles(6, 3, 0), Alone(), "cp", down=2)
