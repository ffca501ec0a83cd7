"""The Frechet distance against closed forms, scipy's matrix square root and the true spread; the shipped features against what they must order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from reelstep.benchmarks.frechet import WEIGHTS, between_gaussians, blurred, features, floors, frechet, frechet_sd, halves, noisy
from reelstep.engine.pipelines.latent import to_pixels
from reelstep.errors import ConfigError
from reelstep.training.zoo import stickers
from reelstep.training.zoo.stickers import FRAMES, Sticker, load_stickers, make_clips

needs_font = pytest.mark.skipif(not stickers.FONT.exists(), reason="needs Debian's package fonts-noto-color-emoji")


def rotation(rng: np.random.Generator, size: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((size, size)))[0]


def spread_out(rng: np.random.Generator, size: int) -> np.ndarray:
    """A covariance."""
    scale = rng.standard_normal((size, 2 * size))
    return scale @ scale.T / size


def test_of_equal_covariances_only_the_means_count():
    rng = np.random.default_rng(0)
    one, two, covariance = rng.standard_normal(16), rng.standard_normal(16), spread_out(rng, 16)
    assert between_gaussians(one, covariance, two, covariance) == pytest.approx(np.square(one - two).sum(), rel=1e-10)


def test_of_commuting_covariances_each_axis_counts_by_itself():
    rng = np.random.default_rng(1)
    axes, one, two, mean = rotation(rng, 24), rng.uniform(0, 9, 24), rng.uniform(0, 9, 24), rng.standard_normal(24)
    one[:6] = two[3:9] = 0  # some directions have no spread
    closed = np.square(mean).sum() + np.square(np.sqrt(one) - np.sqrt(two)).sum()
    assert between_gaussians(mean, axes * one @ axes.T, 0 * mean, axes * two @ axes.T) == pytest.approx(closed, rel=1e-6), "a root of rounding is 1e-8"


def test_in_general_it_is_the_formula_with_a_matrix_square_root():
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((80, 32)) @ spread_out(rng, 32), rng.standard_normal((80, 32)) + 0.3
    one, two = np.cov(a.T), np.cov(b.T)
    formula = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(one + two - 2 * sqrtm(one @ two).real)
    assert frechet(a, b) == pytest.approx(formula, rel=1e-8)


def test_fewer_samples_than_features_are_no_trouble():
    a, b = np.random.default_rng(3).standard_normal((2, 6, 64))
    one, two = a - a.mean(0), b - b.mean(0)  # C1 C2 has the eigenvalues of (one two^T) (one two^T)^T / 25
    overlap = np.linalg.svd(one @ two.T, compute_uv=False).sum() / 5
    closed = np.square(a.mean(0) - b.mean(0)).sum() + (np.square(one).sum() + np.square(two).sum()) / 5 - 2 * overlap
    assert frechet(a, b) == pytest.approx(closed, rel=1e-6)


def test_it_is_symmetric_zero_for_itself_and_blind_to_order_shift_and_rotation():
    rng = np.random.default_rng(4)
    a, b = rng.standard_normal((2, 50, 20)) * rng.uniform(0, 3, 20)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-12)
    assert 0 <= frechet(a, a[::-1]) < 1e-8
    turn, shift = rotation(rng, 20), rng.standard_normal(20)
    assert frechet(a @ turn + shift, b @ turn + shift) == pytest.approx(frechet(a, b), rel=1e-8)


def test_unequal_or_too_few_samples_are_refused():
    a = np.zeros((5, 4))
    with pytest.raises(ConfigError, match=r"5 and 4 samples; .* take as many of each"):
        frechet(a, a[:4])
    with pytest.raises(ConfigError, match="at least 2"):
        frechet(a[:1], a[:1])
    with pytest.raises(ConfigError, match="at least 3"):
        frechet_sd(a[:2], a[:2])


@pytest.mark.parametrize("paired", [False, True])
def test_the_jackknife_finds_the_spread_that_new_samples_have(paired):
    rng = np.random.default_rng(5)

    def draw() -> tuple[np.ndarray, np.ndarray]:
        a, b = rng.standard_normal((2, 48, 8))
        return (a, a * 0.8 + 0.3 + 0.2 * b) if paired else (a, b * 0.6 + 0.3)

    found = [(frechet(a, b), frechet_sd(a, b) if k < 16 else np.nan) for k, (a, b) in enumerate(draw() for _ in range(250))]
    distances, spreads = np.array(found).T
    assert np.nanmean(spreads) == pytest.approx(distances.std(), rel=0.25), "250 draws know the deviation to 5 %, 16 jackknives their mean to about 8 %"


def test_the_noise_floor_is_that_of_the_even_and_the_odd_samples():
    a, b = np.random.default_rng(6).standard_normal((2, 10, 4))
    assert halves(np.stack([a, b], 1).reshape(20, 4)) == frechet(a, b)


def test_the_noise_floor_falls_with_the_number_of_samples_as_theory_says():
    rng = np.random.default_rng(7)
    rows = floors(rng.standard_normal((8000, 8)), [200, 800], 20, rng)
    # near C = 1 the distance is |m1 - m2|^2 + |C1 - C2|^2 / 4, whose means for N(0, 1) in D dimensions are 2 D / N and D (D + 1) / (2 N)
    assert [row["frechet"] for row in rows] == pytest.approx([8 * (2 + 9 / 2) / n for n in (200, 800)], rel=0.15)


def drawn() -> Sticker:
    """A disc with a bar through it."""
    y, x = torch.meshgrid(torch.arange(48) - 24, torch.arange(48) - 24, indexing="ij")
    inside = (x**2 + y**2 < 300).float()
    return Sticker(1, "disc", True, torch.stack([inside, inside * (x.abs() < 5), inside * (y > 0), inside]))


@pytest.fixture(scope="module")
def pictures() -> list[Sticker]:
    """All of the font where it is, else a drawn one."""
    return load_stickers() if stickers.FONT.exists() else [drawn()]


@pytest.fixture(scope="module")
def clips(pictures) -> np.ndarray:
    """[64, F, H, W, 3] of held-out stickers."""
    things = [s for s in pictures if s.held_out]
    return to_pixels(make_clips(things, np.random.default_rng(0), 64).video)


@pytest.mark.parametrize(("change", "strengths"), [(blurred, (0.5, 1, 2, 4)), (noisy, (4, 8, 16, 32))], ids=["blur", "noise"])
def test_a_stronger_change_is_farther_away(clips, change, strengths):
    seen = features(clips)
    distances = [frechet(seen, features(change(clips, strength))) for strength in strengths]
    assert all(later > 1.2 * earlier for earlier, later in zip([0.0, *distances], distances, strict=False)), distances


def test_motion_counts(clips):
    seen = features(clips)
    backwards, frozen, shuffled = clips[:, ::-1], clips[:, [FRAMES // 2] * FRAMES], clips[:, [3, 0, 5, 2, 7, 4, 1, 6]]
    assert min(frechet(seen, features(other)) for other in (backwards, frozen, shuffled)) > 2 * frechet(seen, features(blurred(clips, 0.5)))


@pytest.mark.parametrize("frames", [1, 2, 5, 8])
def test_a_clip_has_the_same_features_in_any_company(clips, frames):
    found = features(clips[:40, :frames])
    assert found.shape == (40, 64)
    assert found.dtype == np.float64
    assert np.allclose(found[37:38], features(clips[37:38, :frames]), rtol=1e-4, atol=1e-4)


def test_another_size_is_seen_at_the_size_that_was_trained_on(clips):
    larger = clips.repeat(2, 2).repeat(2, 3)
    assert frechet(features(larger), features(clips)) < 0.1 * frechet(features(clips), features(blurred(clips, 1)))


def test_clips_of_different_shapes_are_refused(clips):
    for wrong in ([clips[0], clips[0, :4]], [clips[0, 0]], [clips[0, ..., :2]], []):
        with pytest.raises(ConfigError, match="make them alike"):
            features(wrong)


@needs_font
def test_features_of_trained_stickers_are_standardised(pictures):
    known = [s for s in pictures if not s.held_out]
    found = features(to_pixels(make_clips(known, np.random.default_rng(1), 256).video))
    assert np.abs(found.mean(0)).max() < 5 / 16, "five deviations of a mean of 256"
    assert found.std(0) == pytest.approx(1.0, abs=0.3)


def test_the_weights_are_small():
    assert WEIGHTS.stat().st_size < 1_000_000
    assert WEIGHTS.with_suffix(".md").exists()
