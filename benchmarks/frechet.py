"""What is a Frechet distance of so many clips worth? Between sets of real clips, and between real clips and what spoils them.

|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of Gaussians fitted to the clips' features, in float64 (Dowson and Landau 1982; Heusel et al. 2017,
arXiv:1706.08500, equation 6). The features are those of `sticker-features` (training/zoo/sticker_features.py; card beside the weights), so the
numbers compare with no FID or FVD of other networks. `reelstep bench frechet` measures with clips of held-out stickers. Needs the
font of Debian's package fonts-noto-color-emoji and the `training` extra.

N samples, F frames, H W pixels, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import gaussian_filter

from reelstep.benchmarks.harness import Row, parser, report
from reelstep.engine.pipelines.latent import to_pixels
from reelstep.errors import ConfigError
from reelstep.training.zoo.sticker_features import StickerFeatures, load
from reelstep.training.zoo.stickers import FRAMES, load_stickers, make_clips

Array = npt.NDArray[np.float64]
Frames = npt.NDArray[np.uint8]
WEIGHTS = Path(__file__).parent / "weights" / "sticker-features.safetensors"
GROUP = 32  # clips at once


@cache
def network() -> StickerFeatures:
    """The shipped one."""
    return load(WEIGHTS)[0]


@torch.no_grad()
def features(videos: Sequence[Frames] | Frames) -> Array:
    """[N, D] of clips [F, H, W, 3]. Raises ConfigError unless all have one such shape."""
    shapes = {video.shape for video in videos}
    if len(shapes) != 1 or any(len(shape) != 4 or shape[3] != 3 or 0 in shape for shape in shapes):
        raise ConfigError(f"features of clips of shapes {sorted(shapes)}; they are of clips of one shape [frames, height, width, 3]: make them alike")
    batches = [torch.from_numpy(np.stack([*videos[k : k + GROUP]])).permute(0, 4, 1, 2, 3) for k in range(0, len(videos), GROUP)]
    return torch.cat([network()(batch.float() / 127.5 - 1) for batch in batches]).double().numpy()


def root(covariance: Array) -> Array:
    """The symmetric square root; eigenvalues that rounding made negative count as zero."""
    values, vectors = np.linalg.eigh(covariance)
    found: Array = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return found


def between_gaussians(mean_a: Array, covariance_a: Array, mean_b: Array, covariance_b: Array) -> float:
    """tr (C1 C2)^(1/2) is the sum of the singular values of C1^(1/2) C2^(1/2): exact for singular C too, where a matrix square root may not exist."""
    overlap = np.linalg.svd(root(covariance_a) @ root(covariance_b), compute_uv=False).sum()
    return max(0.0, float(np.square(mean_a - mean_b).sum() + np.trace(covariance_a) + np.trace(covariance_b) - 2 * overlap))


def frechet(a: Array, b: Array) -> float:
    """Of features [N, D] each. Raises ConfigError for unequal N, as the bias depends on it, and below 2."""
    if len(a) != len(b) or len(a) < 2:
        raise ConfigError(f"a Frechet distance of {len(a)} and {len(b)} samples; its bias depends on their number: take as many of each, at least 2")
    return between_gaussians(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))


def frechet_sd(a: Array, b: Array) -> float:
    """The jackknife's standard deviation of `frechet(a, b)`: how much other samples of the same kind would change it.

    Sample i is left out of both sets at once: pairs stay pairs, and where there are none any order will do. Efron and Stein 1981. Raises ConfigError
    below 3 samples.
    """
    if len(a) < 3:
        raise ConfigError(f"the spread of a Frechet distance of {len(a)} samples; leaving one out must leave 2: take at least 3")
    without = [frechet(np.delete(a, i, 0), np.delete(b, i, 0)) for i in range(len(a))]
    return float(np.std(without) * np.sqrt(len(a) - 1))


def halves(samples: Array) -> float:
    """The noise floor of N / 2 samples: between the even and the odd ones of [N, D]."""
    usable = samples[: len(samples) // 2 * 2]
    return frechet(usable[::2], usable[1::2])


def blurred(videos: Frames, sigma_px: float) -> Frames:
    """A Gaussian blur of each frame, [..., H, W, 3]."""
    still = (0.0,) * (videos.ndim - 3)
    soft: Frames = gaussian_filter(videos.astype(np.float32), (*still, sigma_px, sigma_px, 0.0), mode="nearest").round().astype(np.uint8)
    return soft


def noisy(videos: Frames, sd: float, seed: int = 0) -> Frames:
    """White noise of `sd` of 255, cut to what a pixel can be."""
    grain = np.random.default_rng(seed).standard_normal(videos.shape, dtype=np.float32)
    return (videos + sd * grain).round().clip(0, 255).astype(np.uint8)


CHANGES: Mapping[str, Callable[[Frames], Frames]] = {
    **{f"blurred, sigma {sigma} px": partial(blurred, sigma_px=sigma) for sigma in (0.5, 1, 2, 4)},
    **{f"noisy, sd {sd} of 255": partial(noisy, sd=sd) for sd in (4, 8, 16, 32)},
    "moved right by 8 px": lambda videos: np.roll(videos, 8, -2),
    "backwards": lambda videos: videos[:, ::-1],
    "frozen at the rest pose": lambda videos: videos[:, [FRAMES // 2] * FRAMES],
}


def floors(pool: Array, counts: Sequence[int], repeats: int, rng: np.random.Generator) -> list[Row]:
    """Between two disjoint sets of each count, drawn from `pool` [M, D] `repeats` times; mean and standard deviation."""
    rows = list[Row]()
    for count in counts:
        orders = [rng.permutation(len(pool)) for _ in range(repeats)]
        found = [frechet(pool[order[:count]], pool[order[count : 2 * count]]) for order in orders]
        rows.append({"compared": "other clips", "samples": count, "frechet": float(np.mean(found)), "frechet_sd": float(np.std(found))})
    return rows


def changed(clips: Frames) -> list[Row]:
    """Clips [N, F, H, W, 3] with themselves after each of CHANGES; the spread is the jackknife's."""
    seen, rows = features(clips), list[Row]()
    for name, change in CHANGES.items():
        other = features(change(clips))
        rows.append({"compared": name, "samples": len(clips), "frechet": frechet(seen, other), "frechet_sd": frechet_sd(seen, other)})
    return rows


def main(argv: Sequence[str]) -> None:
    options = parser("frechet", __doc__ or "")
    options.add_argument("--counts", type=int, nargs="+", default=[16, 32, 64, 128, 256], metavar="N", help="samples of a set (16 32 64 128 256)")
    options.add_argument("--repeats", type=int, default=20, metavar="N", help="pairs of sets of each count (%(default)s)")
    args = options.parse_args(argv)
    held_out = [sticker for sticker in load_stickers() if sticker.held_out]
    clips = to_pixels(make_clips(held_out, np.random.default_rng(args.seed), 4 * max(args.counts)).video)
    rows = [*floors(features(clips), args.counts, args.repeats, np.random.default_rng(args.seed)), *changed(clips[:64])]
    report("frechet", rows, args.seed, args.json, {"held_out_stickers": len(held_out), "repeats": args.repeats})
