"""Recipe, stage 2 of `reel-tiny`: text encoder and denoiser, by flow matching on the latents of stage 1.

`python -P -m reelstep.training.zoo.reel_tiny_denoiser --steps 4500`. Seeded; resumes from checkpoints/reel-tiny/denoiser.pt.
Pictures from words, videos from words, and videos from a picture and words are trained together in every step.

B batch, C channels, F H W latent sizes, L text bytes, D width, N heads, K head dim.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelstep.engine.models.byte_text import PAD, ByteTextEncoder, tokenize
from reelstep.engine.models.movie_gen import MovieGenTransformer
from reelstep.engine.models.reel_tiny import DENOISER_CONFIG, TAE_CONFIG, TEXT_CONFIG, load_weights
from reelstep.engine.models.tae import TAE
from reelstep.errors import ConfigError
from reelstep.training import checkpoint
from reelstep.training.arguments import hundreds, whole
from reelstep.training.half import half_products
from reelstep.training.learning_rate import learning_rate
from reelstep.training.muon import muon
from reelstep.training.plain_attention import PlainAttention
from reelstep.training.recipe import check_paths, run
from reelstep.training.zoo.reel_tiny_tae import channels_last, load_shipped, psnr
from reelstep.training.zoo.stickers import BACKGROUNDS, FRAMES, MOTIONS, MOVING, NAMES, Sticker, caption, load_stickers, make_clips


@dataclass(frozen=True)
class Kind:
    """One kind of sample of a step."""

    count: int  # in a step; a picture has a quarter of a video's tokens
    weight: float  # of its mean loss
    drop_text: float  # share of empty captions, for classifier-free guidance
    everyday: float  # share drawn from the stickers of NAMES
    t_location: float  # t = sigmoid(location + normal): logit-normal


KINDS = {
    # with a picture and words the answer is known, and the work is to find it from pure noise: so small t more often
    "animated": Kind(14, 0.6, 0.05, 0.0, -0.8),
    # hundreds of things are too many to learn in an hour from words alone: those that people name come first
    "video": Kind(4, 0.2, 0.1, 0.8, -0.4),
    "picture": Kind(8, 0.2, 0.1, 0.8, -0.4),
}
MOTION_SHARES = {"still": 0, "spin_clockwise": 2, "spin_counterclockwise": 2, "grow": 2, "shrink": 2}  # shares of the motions that are harder to learn, else 1
EVERYDAY_COPIES = 8  # how many times a sticker of NAMES stands among the stickers that clips are drawn from
WARM_UP_STEPS, WARM_UP_BATCH, WARM_UP_EVERYDAY = 1600, 128, 0.4
WARM_UP_SAVES = 100  # steps from one to the next
FROZEN_STEPS = 800  # in which the text encoder stays as the warm-up left it
PEAKS = (2e-3, 1e-3)  # of Muon and AdamW
TEXT_SHARE = 0.1  # of AdamW's rate


@dataclass(frozen=True)
class Latents:
    """Encoded clips. video: [N, C, F, h, w]; picture: [N, C, 1, h, w]; float16, normalised to unit variance by (scale, shift)."""

    video: Tensor
    picture: Tensor
    names: list[str]
    motions: list[str]
    amounts: list[int]
    backgrounds: list[str]
    scale: float
    shift: float

    @cached_property
    def everyday(self) -> np.ndarray:
        """Indices of the clips whose sticker stands in NAMES; of all clips where none does."""
        common = set(NAMES.values())
        return np.array([i for i, name in enumerate(self.names) if name in common] or range(len(self.names)))


@torch.no_grad()
def encode_clips(
    tae: TAE, stickers: Sequence[Sticker], seed: int, count: int, motions: Sequence[str] = tuple(MOTIONS), like: Latents | None = None
) -> Latents:
    """`count` random clips through the encoder, normalised as `like` is; without it, plain clips, normalised by their own mean and deviation."""
    videos, pictures, tags = [], [], []
    for i in range(0, count, 100):
        clips = make_clips(stickers, np.random.default_rng((seed, i)), 100, motions, varied=like is not None)
        with half_products():
            videos.append(torch.cat([tae.encode(v) for v in clips.video.split(25)]).half())
            pictures.append(tae.encode(clips.picture).half())
        tags += list(zip(clips.names, clips.motions, clips.amounts, clips.backgrounds, strict=True))
        if i % 4000 == 0:
            print(f"encoded {i} of {count} clips", flush=True)
    video, picture = torch.cat(videos), torch.cat(pictures)
    shift, scale = (like.shift, like.scale) if like else (float(video.float().mean()), 1 / float(video.float().std()))
    names, motions, amounts, backgrounds = map(list, zip(*tags, strict=True))
    return Latents(((video.float() - shift) * scale).half(), ((picture.float() - shift) * scale).half(), names, motions, amounts, backgrounds, scale, shift)


def kept(path: Path, asked: Mapping[str, int], make: Callable[[], Latents]) -> Latents:
    """Made once. Raises ConfigError for what was made of other options."""
    if (saved := checkpoint.load(path, asked=asked)) is None:
        saved = {"latents": dict(vars(make())), "asked": dict(asked)}
        checkpoint.save(path, saved)
    return Latents(**saved["latents"])


def load_latents(tae: TAE, known: Sequence[Sticker], seed: int, count: int, out: Path) -> tuple[Latents, Latents]:
    """Clips for samples from words alone, and clips for animated pictures; each encoded once and kept under `out`."""
    asked = {"seed": seed, "clips": count}
    common = [s for s in known if s.codepoint in NAMES] * (EVERYDAY_COPIES - 1)
    plain = kept(out / "latents.pt", asked, lambda: encode_clips(tae, [*known, *common], seed + 10, count))
    motions = [m for m in MOTIONS for _ in range(MOTION_SHARES.get(m, 1))]
    return plain, kept(out / "moving.pt", asked, lambda: encode_clips(tae, known, seed + 20, count, motions, plain))


def tokens_of(texts: list[str]) -> Tensor:
    """[B, L] int64. Captions beyond the encoder's length are cut."""
    return torch.tensor([tokenize(t.encode()[: TEXT_CONFIG.length - 1].decode(errors="ignore"), TEXT_CONFIG.length) for t in texts])


def encode_text(text: ByteTextEncoder, tokens: Tensor) -> Tensor:
    """`text(tokens)` without the work on columns that are padding in every row: those give zeros anyway."""
    used = int((tokens != PAD).any(0).sum())
    return F.pad(text(tokens[:, :used]), (0, 0, 0, tokens.shape[1] - used))


class TextHeads(nn.Module):
    """What the text encoder must be able to say before it meets the denoiser: the thing's name, motion, amount and background.

    Unless it is asked for the name, it never learns to spell: it found motions and backgrounds, and every thing became the average one.
    """

    def __init__(self, names: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(TEXT_CONFIG.width, n) for n in (names, len(MOTIONS), 3, len(BACKGROUNDS)))

    def forward(self, context: Tensor) -> list[Tensor]:
        pooled = context.mean(1) * 4
        return [head(pooled) for head in self.heads]


def draw_captions(data: Latents, index: Tensor, rng: np.random.Generator, moving: bool) -> list[str]:
    """Fresh words for the clips at `index`; a picture's caption says nothing of motion."""
    return [caption(rng, data.names[i], data.motions[i] if moving else "still", data.amounts[i], data.backgrounds[i]) for i in index.tolist()]


def warm_up_text(text: ByteTextEncoder, data: Latents, seed: int, path: Path) -> None:
    """Teach the encoder to read captions before it meets the denoiser, once: `path` keeps how far it is, and the result."""
    asked = {"seed": seed, "clips": len(data.names)}
    names, motions, places = sorted(set(data.names)), list(MOTIONS), list(BACKGROUNDS)
    rank = {name: i for i, name in enumerate(names)}
    heads = TextHeads(len(names))
    matrices = [p for p in text.layers.parameters() if p.ndim == 2]
    ids = {id(p) for p in matrices}
    parameters = [*text.parameters(), *heads.parameters()]
    rest = [p for p in parameters if id(p) not in ids]
    both = [muon(matrices, weight_decay=0.02), torch.optim.AdamW(rest, weight_decay=0.01, betas=(0.9, 0.98))]
    modules = {"text": text, "heads": heads}
    start, elapsed = checkpoint.resume(path, modules, both, asked)
    print(f"text encoder alone, step {start} of {WARM_UP_STEPS}", flush=True)
    began = time.monotonic() - elapsed
    for step in range(start, WARM_UP_STEPS):
        rng = np.random.default_rng((seed, 77, step))
        index = draw_clips(data, rng, WARM_UP_BATCH, WARM_UP_EVERYDAY)
        labels = [(rank[data.names[i]], motions.index(data.motions[i]), data.amounts[i], places.index(data.backgrounds[i])) for i in index.tolist()]
        truth = list(torch.tensor(labels).unbind(1))
        with half_products(), PlainAttention():
            guesses = heads(encode_text(text, tokens_of(draw_captions(data, index, rng, moving=True))))
        loss = sum((F.cross_entropy(g.float(), t) for g, t in zip(guesses, truth, strict=True)), torch.zeros(()))
        for optimizer in both:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, WARM_UP_STEPS, 2e-3, warmup=50)
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in both:
            optimizer.step()
        if (step + 1) % WARM_UP_SAVES == 0:
            right = [f"{float((g.argmax(1) == t).float().mean()):.2f}" for g, t in zip(guesses, truth, strict=True)]
            seconds = time.monotonic() - began
            print(f"text {step + 1} loss {loss.item():.3f} name, motion, amount, background right: {' '.join(right)}, {seconds:.0f} s", flush=True)
            checkpoint.keep(path, modules, both, step + 1, seconds, asked=asked)


@dataclass(frozen=True)
class Batch:
    """Samples of one step. x1, condition: [B, C, F, h, w]; tokens: [B, L]; noise as x1; t: [B]."""

    x1: Tensor
    condition: Tensor
    tokens: Tensor
    noise: Tensor
    t: Tensor


def draw_clips(data: Latents, rng: np.random.Generator, count: int, share: float) -> Tensor:
    """Indices [count] of random clips, about `share` of them of everyday stickers."""
    return torch.from_numpy(np.where(rng.random(count) < share, rng.choice(data.everyday, count), rng.integers(len(data.names), size=count)))


def draw(data: Latents, rng: np.random.Generator, name: str, count: int) -> Batch:
    """Random clips as animated pictures ("animated"), videos from words alone ("video"), or pictures from words ("picture")."""
    kind = KINDS[name]
    index = draw_clips(data, rng, count, kind.everyday)
    x1 = (data.picture if name == "picture" else data.video)[index].float()
    condition = data.picture[index].float().expand_as(x1) if name == "animated" else torch.zeros_like(x1)
    texts = draw_captions(data, index, rng, moving=name != "picture")
    texts = ["" if rng.random() < kind.drop_text else text for text in texts]
    t = torch.sigmoid(kind.t_location + torch.from_numpy(rng.standard_normal(count)).float())
    return Batch(x1, condition, tokens_of(texts), torch.from_numpy(rng.standard_normal(x1.shape)).float(), t)


def join(batches: Sequence[Batch]) -> Batch:
    """One batch of all, in order; their latents have the same number of frames."""
    return Batch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in vars(batches[0])))


def flow_loss(context: Tensor, denoiser: MovieGenTransformer, batch: Batch) -> Tensor:
    """Flow matching, x_t = t x1 + (1 - t) x0, target x1 - x0. Loss of each sample [B]. Polyak et al. 2024, section 3.1.2, with sigma_min = 0."""
    t = batch.t[:, None, None, None, None]
    x = t * batch.x1 + (1 - t) * batch.noise
    modulation = denoiser.time(batch.t)
    with half_products(), PlainAttention():
        u = denoiser(x, modulation, batch.condition, denoiser.text(context))
    return (u.float() - (batch.x1 - batch.noise)).square().flatten(1).mean(1)


def losses_of(text: ByteTextEncoder, denoiser: MovieGenTransformer, data: Mapping[str, Latents], rng: np.random.Generator) -> dict[str, Tensor]:
    """Mean loss of each kind, on one draw of a step's samples from `data` by kind. The two kinds of video go through the denoiser together."""
    batches = {name: draw(data[name], rng, name, kind.count) for name, kind in KINDS.items()}
    with half_products(), PlainAttention():
        contexts = encode_text(text, torch.cat([batch.tokens for batch in batches.values()])).split([kind.count for kind in KINDS.values()])
    videos = flow_loss(torch.cat(contexts[:2]), denoiser, join([batches["animated"], batches["video"]]))
    animated, video = videos.split([KINDS["animated"].count, KINDS["video"].count])
    return {"animated": animated.mean(), "video": video.mean(), "picture": flow_loss(contexts[2], denoiser, batches["picture"]).mean()}


def optimizers(text: ByteTextEncoder, denoiser: MovieGenTransformer) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the denoiser's blocks, AdamW for all else, the text encoder at a small share of its rate.

    Both make every update about the same size. While the denoiser does not listen yet, the text encoder's gradient is noise, and full-size
    steps along noise wipe out what the warm-up taught it.
    """
    matrices = [p for n, p in denoiser.named_parameters() if p.ndim == 2 and n.startswith("blocks.") and "table" not in n]
    ids = {id(p) for p in matrices}
    rest = [p for p in denoiser.parameters() if id(p) not in ids]
    groups = [{"params": rest, "share": 1.0}, {"params": [*text.parameters()], "share": TEXT_SHARE}]
    return [muon(matrices, weight_decay=0.02), torch.optim.AdamW(groups, lr=1.0, weight_decay=0.0, betas=(0.9, 0.98))]


def load_tae(out: Path, weights: Path | None) -> TAE:
    """The autoencoder of stage 1, or of a weights file where stage 1 was not run here."""
    tae = channels_last(TAE(TAE_CONFIG))
    if (saved := checkpoint.load(out / "tae.pt")) is not None:
        tae.load_state_dict(saved["model"])
    elif weights is not None:
        load_shipped(tae, weights)
    else:
        raise ConfigError(f"{out}/tae.pt is missing; run the first stage, python -P -m reelstep.training.zoo.reel_tiny_tae, or give --weights")
    return tae.eval()


@torch.no_grad()
def held_out_psnr(text: ByteTextEncoder, denoiser: MovieGenTransformer, tae: TAE, data: Latents, stickers: Sequence[Sticker], seed: int) -> dict[str, float]:
    """Mean PSNR in dB of 48 held-out animations: by 8 Euler steps from noise, of the picture repeated, and through the autoencoder alone."""
    clips = make_clips(stickers, np.random.default_rng(seed), 48, MOVING)
    modulations = denoiser.time(torch.arange(8) / 8)
    with half_products(), PlainAttention():
        truth, picture = tae.encode(clips.video).float(), tae.encode(clips.picture).float()
        condition = ((picture - data.shift) * data.scale).expand_as(truth)
        context = denoiser.text(text(tokens_of(clips.captions)))
        x = torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed))
        for modulation in modulations:
            x = x + denoiser(x, modulation.expand(48, -1, -1), condition, context).float() / 8
        shown = torch.cat([tae.decode(z) for z in (x / data.scale + data.shift).split(12)]).float().clamp(-1, 1)
        ceiling = torch.cat([tae.decode(z) for z in truth.split(12)]).float().clamp(-1, 1)
    repeated = clips.picture.expand(-1, -1, FRAMES, -1, -1)
    return {name: float(psnr(v, clips.video).mean()) for name, v in (("model", shown), ("repeat", repeated), ("ceiling", ceiling))}


def train(steps: int, clips: int, seed: int, out: Path, weights: Path | None) -> None:
    torch.manual_seed(seed)
    stickers = load_stickers()
    known, held_out = [s for s in stickers if not s.held_out], [s for s in stickers if s.held_out]
    tae = load_tae(out, weights)
    plain, moving = load_latents(tae, known, seed, clips, out)
    data = {"animated": moving, "video": plain, "picture": plain}
    text, denoiser = ByteTextEncoder(TEXT_CONFIG), MovieGenTransformer(DENOISER_CONFIG)
    for name, parameter in denoiser.named_parameters():  # adaLN-zero: every block starts as the identity
        if name.endswith(("patch_out.weight", "time.shared.weight", "cross_attention.out.weight")) or (name.startswith("blocks.") and name.endswith("table")):
            nn.init.zeros_(parameter)
    both, modules = optimizers(text, denoiser), {"text": text, "denoiser": denoiser}
    path, asked = out / "denoiser.pt", {"seed": seed, "clips": clips}
    start, elapsed = checkpoint.resume(path, modules, both, asked)
    if not start:
        if weights is not None:
            load_weights(text, weights, "text.")
            load_weights(denoiser, weights, "denoiser.")
        warm_up_text(text, plain, seed, out / "text.pt")
    frozen = FROZEN_STEPS if weights is None else 0
    sizes = [sum(p.numel() for p in module.parameters()) for module in (denoiser, text)]
    print(f"denoiser {sizes[0]:,}, text {sizes[1]:,} parameters; {len(plain.everyday)} clips of everyday stickers; step {start} of {steps}", flush=True)
    began = time.monotonic() - elapsed
    parameters = [*text.parameters(), *denoiser.parameters()]
    sums: dict[str, float] = {}
    for step in range(start, steps):
        text.requires_grad_(step >= frozen)
        losses = losses_of(text, denoiser, data, np.random.default_rng((seed, 11, step)))
        loss = sum((KINDS[name].weight * value for name, value in losses.items()), torch.zeros(()))
        for optimizer, peak in zip(both, PEAKS, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak, warmup=60) * group.get("share", 1.0)
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in both:
            optimizer.step()
        sums = {k: sums.get(k, 0.0) + v.item() for k, v in losses.items()}
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} " + " ".join(f"{k} {v / 50:.4f}" for k, v in sums.items()) + f", {time.monotonic() - began:.0f} s", flush=True)
            sums = {}
        if (step + 1) % 250 == 0 or step + 1 == steps:
            rest = {"scale": plain.scale, "shift": plain.shift, "asked": asked}
            checkpoint.keep(path, modules, both, step + 1, time.monotonic() - began, **rest)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            scores = held_out_psnr(text, denoiser, tae, plain, held_out, seed + 1)
            print(f"held-out PSNR in dB: {', '.join(f'{k} {v:.2f}' for k, v in scores.items())}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=whole(1), default=4500)
    parser.add_argument("--clips", type=hundreds, default=16000, help="clips encoded beforehand; captions, noise and t are drawn anew every step")
    parser.add_argument("--seed", type=whole(0), default=0)
    begins = "go on from this file, e.g. engine/models/weights/reel-tiny.safetensors, instead of from nothing; its text encoder is first trained alone again"
    parser.add_argument("--weights", type=Path, metavar="FILE", help=begins)
    parser.add_argument("--out", type=Path, default=Path("checkpoints/reel-tiny"))
    args = parser.parse_args()
    check_paths(args.out)
    train(args.steps, args.clips, args.seed, args.out, args.weights)


if __name__ == "__main__":
    run(main)
