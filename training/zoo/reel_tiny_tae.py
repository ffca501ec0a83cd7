"""Recipe, stage 1 of `reel-tiny`: the temporal autoencoder, from its linear solution or from weights that were shipped.

`python -P -m reelstep.training.zoo.reel_tiny_tae --steps 5200`. Seeded; resumes from checkpoints/reel-tiny/tae.pt.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reelstep.engine.models.reel_tiny import TAE_CONFIG, load_weights
from reelstep.engine.models.tae import TAE, LinearSkip, outlier_penalty
from reelstep.errors import ConfigError
from reelstep.training import checkpoint
from reelstep.training.arguments import positive, whole
from reelstep.training.half import half_products
from reelstep.training.learning_rate import learning_rate
from reelstep.training.muon import Matrices, muon
from reelstep.training.recipe import check_paths, run
from reelstep.training.zoo.stickers import Clips, Sticker, load_stickers, make_clips

ADAMW_SHARE = 0.5  # of Muon's rate, for what is no inner matrix
LATENT_NOISE = 0.03  # of the latents' own standard deviation: the decoder must stand a denoiser's small errors


def components(skip: LinearSkip, video: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean [D] and first `count` principal components [count, D] of the pixel blocks of video, in float64."""
    x = skip.blocks(video).flatten(0, -2).double()
    mean = x.mean(0)
    _, vectors = torch.linalg.eigh((x - mean).T @ (x - mean))
    return mean.float(), vectors[:, -count:].T.flip(0).float()


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """PSNR in dB of each clip, for values in [-1, 1]. [B, ...] -> [B]. Identical clips give 100 dB."""
    mse = ((a - b) / 2).square().flatten(1).mean(1)
    return -10 * mse.clamp_min(1e-10).log10()


def clips_at(stickers: list[Sticker], seed: int, step: int, count: int) -> Clips:
    """The batch of one step, a function of (seed, step) alone, so that a resumed run sees what it would have seen."""
    return make_clips(stickers, np.random.default_rng((seed, step)), count)


@torch.no_grad()
def linear_psnr(skip: LinearSkip, video: Tensor) -> float:
    """What the linear part alone reaches; fitted to components and not yet trained, that is plain PCA at this rate."""
    return float(psnr(skip.to_pixels(skip.to_latent(video)), video).mean())


def channels_last(model: TAE) -> TAE:
    """The memory layout in which CPUs convolve about twice as fast. PyTorch's type stubs do not know this form of `to`."""
    move: Any = model.to
    return move(memory_format=torch.channels_last)


def load_shipped(model: TAE, weights: Path) -> None:
    """The autoencoder of a weights file; its latents as the networks give them, before they are normalised."""
    load_weights(model, weights, "tae.")
    model.scale.fill_(TAE_CONFIG.scale)
    model.shift.fill_(TAE_CONFIG.shift)


def train(steps: int, batch: int, seed: int, out: Path, decoder_only: bool, peak: float, weights: Path | None) -> None:
    torch.manual_seed(seed)
    stickers = load_stickers()
    known, held_out = [s for s in stickers if not s.held_out], [s for s in stickers if s.held_out]
    sample = make_clips(known, np.random.default_rng(seed), 1500).video
    test = make_clips(held_out, np.random.default_rng(seed + 1), 200).video
    model = channels_last(TAE(TAE_CONFIG))
    assert model.skip is not None
    model.skip.from_components(*components(model.skip, sample, TAE_CONFIG.latent_channels))
    pca = linear_psnr(model.skip, test)
    if weights is not None:
        load_shipped(model, weights)
    trained = {n: p for n, p in model.named_parameters() if not decoder_only or n.startswith(("decoder", "skip.decode"))}
    inner = {n for n, p in trained.items() if p.ndim in (2, 4) and not n.startswith("skip") and "conv_in" not in n and "conv_out" not in n}
    matrices = Matrices(trained[n] for n in sorted(inner))
    rest = [p for n, p in trained.items() if n not in inner]
    both = [muon(matrices.parameters, weight_decay=0.0), torch.optim.AdamW(rest, weight_decay=0.0, betas=(0.9, 0.98), fused=True)]
    path = out / ("tae_decoder.pt" if decoder_only else "tae.pt")
    if decoder_only and (base := checkpoint.load(out / "tae.pt")) is not None:
        model.load_state_dict(base["model"])
    elif decoder_only and weights is None:
        raise ConfigError(f"{out}/tae.pt is missing; run the first stage before the decoder's, or give --weights")
    asked = {"seed": seed, "batch": batch}
    start, elapsed = checkpoint.resume(path, {"model": model}, both, asked)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters; PCA at this rate {pca:.2f} dB; step {start} of {steps}", flush=True)
    began = time.monotonic() - elapsed
    for step in range(start, steps):
        video = clips_at(known, seed + 2, step, batch).video
        if step % 4 == 3:  # images and videos together, as in the paper (1 : 3)
            video = video[:, :, torch.arange(0, 8, 4)].transpose(1, 2).flatten(0, 1)[:, :, None]
        for optimizer, share in zip(both, (1.0, ADAMW_SHARE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = share * learning_rate(step, steps, peak, warmup=50)
        with half_products():
            z = model.encode(video)
            noisy = z + LATENT_NOISE * z.detach().std() * torch.randn_like(z)
            output = model.decode(noisy)[:, :, : video.shape[2]]
        # the root puts every clip's dB on about the same footing; the mean square alone is ruled by the few worst
        error = (output.float() - video).square().flatten(1).mean(1)
        loss = (error + 1e-5).sqrt().mean() + 0.1 * outlier_penalty(z.float())
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        matrices.take_gradients()
        for optimizer in both:
            optimizer.step()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            score = evaluate(model, test)
            print(f"step {step + 1} loss {loss.item():.4f} held-out {score:.2f} dB, {time.monotonic() - began:.0f} s", flush=True)
            checkpoint.keep(path, {"model": model}, both, step + 1, time.monotonic() - began, asked=asked)


@torch.no_grad()
def evaluate(model: TAE, video: Tensor) -> float:
    """Mean PSNR of the round trip, in dB."""
    with half_products():
        return float(torch.cat([psnr(model(v).float(), v) for v in video.split(20)]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=whole(1), default=5200)
    parser.add_argument("--batch", type=whole(1), default=8)
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--peak", type=positive, default=2e-3, help="highest learning rate")
    parser.add_argument("--decoder-only", action="store_true", help="stage 3: the latents stay, only the decoder learns on")
    parser.add_argument("--weights", type=Path, help="start from the autoencoder of this file, e.g. engine/models/weights/reel-tiny.safetensors")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/reel-tiny"))
    args = parser.parse_args()
    check_paths(args.out)
    train(args.steps, args.batch, args.seed, args.out, args.decoder_only, args.peak, args.weights)


if __name__ == "__main__":
    run(main)
