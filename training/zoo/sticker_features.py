"""Recipe of `sticker-features`: what a Frechet distance between sets of sticker clips looks at.

`python -P -m reelstep.training.zoo.sticker_features`. Seeded; resumes from checkpoints/sticker-features/features.pt. A small network learns to
tell which sticker it sees, on which background, and how it moves; the 64 numbers from which it tells all three are the features.

B batch, F frames, S side in pixels, W channels of a frame, D features.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from reelstep.training import checkpoint
from reelstep.training.arguments import positive, whole
from reelstep.training.half import half_products
from reelstep.training.learning_rate import learning_rate
from reelstep.training.muon import Matrices, muon
from reelstep.training.recipe import check_paths, run, write_weights
from reelstep.training.zoo.stickers import BACKGROUNDS, FRAMES, MOTIONS, NAMES, SIDE, Clips, load_stickers, make_clips

WIDTH, FEATURES = 128, 64
EVERYDAY_COPIES = 32  # of each sticker of NAMES: about half of the clips, so that they are told apart within minutes; over a thousand names are not
WHOLE_CLIPS = 0.5  # share of steps on all frames; the others see 1 to 7 of them, so that shorter clips and pictures have features too
SAVE_EVERY = 100  # steps
SCORED = 1024  # clips that set the features' scale, and that each accuracy is of


def convolution(channels_in: int, channels_out: int, side: int, stride: int, padding: int) -> nn.Sequential:
    kernel = nn.Conv2d(channels_in, channels_out, side, stride, padding, bias=False)
    kernel.weight.data = kernel.weight.data.contiguous(memory_format=torch.channels_last)  # about twice as fast on CPUs, and what Muon asks for
    return nn.Sequential(kernel, nn.BatchNorm2d(channels_out), nn.ReLU())


class StickerFeatures(nn.Module):
    """[B, 3, F, S, S] in -1..1, any F and S -> [B, D]; once trained, each has mean 0 and deviation 1 over clips of its own stickers.

    A frame goes in with its difference to the next one, so that a direction is seen where it happens. Its channels are pooled over space; their mean
    over the frames, and the mean size of their changes, make the features. Another S is resized to SIDE first: no other was trained on.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(convolution(6, 64, 4, 4, 0), convolution(64, 96, 3, 2, 1), convolution(96, WIDTH, 3, 1, 1))
        self.mix = nn.Linear(2 * WIDTH, FEATURES)
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("deviation", torch.ones(FEATURES))

    def forward(self, video: Tensor) -> Tensor:
        frames = video.transpose(1, 2)
        if video.shape[-2:] != (SIDE, SIDE):
            sized = F.interpolate(frames.flatten(0, 1), (SIDE, SIDE), mode="bilinear", antialias=True)
            frames = sized.unflatten(0, frames.shape[:2])
        moved = F.pad(frames.diff(dim=1), (0, 0, 0, 0, 0, 0, 0, 1))  # the last frame has no next one
        pairs = torch.cat([frames, moved], 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        pooled = self.tower(pairs).mean((2, 3)).unflatten(0, frames.shape[:2])  # [B, F, W]
        changes = pooled.diff(dim=1).abs().sum(1) / max(1, frames.shape[1] - 1)
        return (self.mix(torch.cat([pooled.mean(1), changes], 1)).float() - self.mean) / self.deviation


class Heads(nn.Module):
    """What the features must be enough for: logits of the name, the background and the motion."""

    def __init__(self, names: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(FEATURES, n) for n in (names, len(BACKGROUNDS), len(MOTIONS)))

    def forward(self, features: Tensor) -> list[Tensor]:
        return [head(features) for head in self.heads]


def truth_of(clips: Clips, names: Sequence[str]) -> list[Tensor]:
    """Name, background and motion of each clip, [B] each; -100, which counts for nothing, for a name that is not among `names`."""
    rank = {name: i for i, name in enumerate(names)}
    places, motions = list(BACKGROUNDS), list(MOTIONS)
    return [
        torch.tensor([rank.get(name, -100) for name in clips.names]),
        torch.tensor([places.index(place) for place in clips.backgrounds]),
        torch.tensor([motions.index(motion) for motion in clips.motions]),
    ]


def window(rng: np.random.Generator) -> slice:
    """The frames that a step sees: all, or some in a row with the rest pose among them."""
    if rng.random() < WHOLE_CLIPS:
        return slice(0, FRAMES)
    length, rest = int(rng.integers(1, FRAMES)), FRAMES // 2
    begin = int(rng.integers(max(0, rest + 1 - length), min(rest, FRAMES - length) + 1))
    return slice(begin, begin + length)


def loss_of(guesses: Sequence[Tensor], truth: Sequence[Tensor], frames: int) -> Tensor:
    """The cross-entropies, added; of one frame nobody can tell the motion, and names that are not known count nothing."""
    losses = [F.cross_entropy(guess.float(), label, reduction="sum") / len(label) for guess, label in zip(guesses, truth, strict=True)]
    return torch.stack(losses[:2] if frames == 1 else losses).sum()


@torch.no_grad()
def accuracies(model: StickerFeatures, heads: Heads, clips: Clips, names: Sequence[str]) -> list[float]:
    """Share of right names, backgrounds and motions. NaN where no name is known."""
    guesses = heads(torch.cat([model(video) for video in clips.video.split(64)]))
    right = [(guess.argmax(1) == label)[label >= 0] for guess, label in zip(guesses, truth_of(clips, names), strict=True)]
    return [float(each.float().mean()) for each in right]


@torch.no_grad()
def standardise(model: StickerFeatures, heads: Heads, video: Tensor) -> None:
    """Scale the features so that those of `video` have mean 0 and deviation 1, and the heads so that they say what they said."""
    features = torch.cat([model(part) for part in video.split(64)])
    mean, deviation = features.mean(0), features.std(0)
    model.mean.add_(mean * model.deviation)
    model.deviation.mul_(deviation)
    for head in heads.heads:
        assert isinstance(head, nn.Linear)
        head.bias.add_(head.weight @ mean)
        head.weight.mul_(deviation)


def export(model: StickerFeatures, heads: Heads, target: Path) -> None:
    """Kernels and matrices in bfloat16, the rest in float32; names begin with `features.` or `heads.`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    state = nn.ModuleDict({"features": model, "heads": heads}).state_dict()
    write_weights(target, {name: value.to(torch.bfloat16) if value.ndim > 1 else value for name, value in state.items()})


def load(file: Path) -> tuple[StickerFeatures, Heads]:
    """From a file of `export`, in float32, ready to be asked."""
    weights = load_file(file)
    model, heads = StickerFeatures(), Heads(len(weights["heads.heads.0.bias"]))
    nn.ModuleDict({"features": model, "heads": heads}).load_state_dict(weights)
    return model.eval(), heads.eval()


def train(steps: int, batch: int, seed: int, peak: float, out: Path, target: Path) -> None:
    torch.manual_seed(seed)
    stickers = load_stickers()
    known, held_out = [s for s in stickers if not s.held_out], [s for s in stickers if s.held_out]
    everyday = [s for s in known if s.codepoint in NAMES]
    names, drawn = sorted(s.name for s in everyday), known + everyday * (EVERYDAY_COPIES - 1)
    model, heads = StickerFeatures(), Heads(len(names))
    parameters = [*model.parameters(), *heads.parameters()]
    matrices = Matrices(p for n, p in model.named_parameters() if p.ndim > 1 and not n.startswith("tower.0"))
    ids = {id(p) for p in matrices.kernels}
    both = [muon(matrices.parameters, weight_decay=0.0), torch.optim.AdamW([p for p in parameters if id(p) not in ids], weight_decay=0.01, betas=(0.9, 0.98))]
    path, modules = out / "features.pt", {"model": model, "heads": heads}
    start, elapsed = checkpoint.resume(path, modules, both)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(names)} names; step {start} of {steps}", flush=True)
    began = time.process_time() - elapsed
    for step in range(start, steps):
        rng = np.random.default_rng((seed, step))
        clips, shown = make_clips(drawn, rng, batch, varied=True), window(rng)
        for optimizer in both:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak, warmup=50)
        with half_products():
            guesses = heads(model(clips.video[:, :, shown]))
        loss = loss_of(guesses, truth_of(clips, names), shown.stop - shown.start)
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        matrices.take_gradients()
        for optimizer in both:
            optimizer.step()
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            print(f"step {step + 1} loss {loss.item():.3f}, {time.process_time() - began:.0f} s of CPU", flush=True)
            checkpoint.keep(path, modules, both, step + 1, time.process_time() - began)
    standardise(model.eval(), heads, make_clips(known, np.random.default_rng((seed, steps, 1)), SCORED).video)
    export(model, heads, target)
    print(f"{target}: {target.stat().st_size:,} bytes", flush=True)
    for who, things in (("everyday", everyday), ("held-out", held_out)):
        shares = accuracies(*load(target), make_clips(things, np.random.default_rng((seed, steps, 2)), SCORED, varied=True), names)
        print(f"{SCORED} new clips of {who} stickers: name, background, motion right {' '.join(f'{share:.3f}' for share in shares)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=whole(1), default=1600)
    parser.add_argument("--batch", type=whole(1), default=32)
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--peak", type=positive, default=6e-3, help="highest learning rate")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/sticker-features"))
    parser.add_argument("--target", type=Path, default=Path("benchmarks/weights/sticker-features.safetensors"))
    args = parser.parse_args()
    check_paths(args.out, args.target)
    train(args.steps, args.batch, args.seed, args.peak, args.out, args.target)


if __name__ == "__main__":
    run(main)
