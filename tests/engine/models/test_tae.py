"""The temporal autoencoder: published sizes, shapes, tiling, and the linear solution that it starts from."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from reelstep.engine.models.reel_tiny import TAE_CONFIG
from reelstep.engine.models.tae import TAE, TAE_30B, TemporalConv, blend_ramp, outlier_penalty, tile_starts
from reelstep.errors import ConfigError


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_the_inflated_image_vae_has_the_parameters_of_the_specification():
    with torch.device("meta"):
        tae = TAE(TAE_30B)
    assert (count(tae), count(tae.encoder), count(tae.decoder)) == (114_062_049, 46_839_232, 67_222_817)


def test_the_papers_tae_compresses_eight_times_on_every_side():
    with torch.device("meta"):
        tae = TAE(replace(TAE_30B, channels=32))
        z = tae.encode(torch.empty(1, 3, 32, 64, 64))
        assert z.shape == (1, 16, 4, 8, 8)
        assert tae.decode(z).shape == (1, 3, 32, 64, 64)
    assert TAE_30B.latent_frames(256) == 32
    assert TAE_30B.latent_frames(1) == 1


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 8])
def test_any_number_of_frames_goes_in_and_the_surplus_comes_out(frames):
    tae = TAE(replace(TAE_CONFIG, channels=16))
    z = tae.encode(torch.randn(2, 3, frames, 16, 16))
    assert z.shape == (2, 16, -(-frames // 2), 2, 2)
    assert tae.decode(z).shape == (2, 3, 2 * -(-frames // 2), 16, 16)


def test_a_temporal_convolution_starts_as_the_identity_and_pads_by_repeating():
    layer = TemporalConv(4)
    x = torch.randn(1, 4, 5, 3, 3)
    assert torch.allclose(layer(x), x, atol=1e-6)
    torch.nn.init.ones_(layer.conv.weight)
    still = torch.ones(1, 4, 5, 3, 3)
    assert torch.allclose(layer(still), torch.full_like(still, 12.0)), "a still video stays still up to its ends"


@torch.no_grad()
def test_the_untrained_tae_with_components_is_pca():
    generator = np.random.default_rng(0)
    blocks = generator.standard_normal((500, 384)) @ generator.standard_normal((384, 384))
    mean = blocks.mean(0)
    _, _, components = np.linalg.svd(blocks - mean, full_matrices=False)
    tae = TAE(replace(TAE_CONFIG, channels=16))
    tae.skip.from_components(torch.from_numpy(mean).float(), torch.from_numpy(components[:16].copy()).float())
    block = blocks[7].reshape(3, 2, 8, 8)
    expected = (components[:16].T @ (components[:16] @ (blocks[7] - mean)) + mean).reshape(3, 2, 8, 8)
    video = torch.from_numpy(np.tile(block, (1, 1, 2, 2))).float()[None]
    assert torch.allclose(tae(video)[0], torch.from_numpy(np.tile(expected, (1, 1, 2, 2))).float(), atol=2e-3 * float(np.abs(expected).max()))


def test_tiles_cover_a_video_with_the_papers_counts():
    assert tile_starts(32, 4, 2) == list(range(0, 30, 2))  # 15 decode tiles of 4 latent frames for 256 frames
    assert len(tile_starts(32, 4, 0)) == 8
    assert tile_starts(1, 4, 2) == tile_starts(4, 4, 2) == [0]
    assert tile_starts(5, 4, 2) == [0, 2]
    with pytest.raises(ConfigError, match="overlap 4"):
        tile_starts(8, 4, 4)


def test_the_ramp_rises_and_is_symmetric():
    w = blend_ramp(16)
    assert bool((w.diff() > 0).all())
    assert torch.allclose(w + w.flip(0), torch.ones(16))


def test_the_outlier_penalty_counts_only_what_is_beyond_r_deviations():
    z = torch.zeros(1, 1, 1, 10, 10)
    z[0, 0, 0, 0, 0] = 1.0
    mean, std = 0.01, float(z.std())
    assert float(outlier_penalty(z, 3.0)) == pytest.approx((1 - mean - 3 * std) / 100, rel=1e-5)
    assert float(outlier_penalty(torch.rand(2, 3, 2, 8, 8), 3.0)) == 0.0


def test_more_temporal_than_spatial_halvings_are_refused():
    with pytest.raises(ConfigError, match="temporal_downs=2"):
        replace(TAE_CONFIG, temporal_downs=2)
