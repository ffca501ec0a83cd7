"""Recipe, stage 2 of `reel-tiny`: text encoder and denoiser, by flow matching on the latents of stage 1.

`python -m reelstep.training.zoo.reel_tiny_denoiser --steps 2000`. Seeded; resumes from checkpoints/reel-tiny/denoiser.pt.
Pictures from words, videos from words, and videos from a picture and words are trained together in every step.

B batch, C channels, F H W latent sizes, L text bytes, D width.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from reelstep.engine.models.byte_text import ByteTextEncoder, tokenize
from reelstep.engine.models.movie_gen import MovieGenTransformer
from reelstep.engine.models.reel_tiny import DENOISER_CONFIG, TAE_CONFIG, TEXT_CONFIG
from reelstep.engine.models.tae import TAE
from reelstep.training import checkpoint
from reelstep.training.zoo.reel_tiny_tae import channels_last, learning_rate
from reelstep.training.zoo.stickers import BACKGROUNDS, MOTIONS, Sticker, caption, load_stickers, make_clips

ANIMATED, VIDEOS, PICTURES = 30, 10, 40  # samples of each kind in a step; a picture has a quarter of a video's tokens
DROP_TEXT = 0.1
WARM_UP_STEPS, WARM_UP_BATCH = 700, 128


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


@torch.no_grad()
def encode_clips(tae: TAE, stickers: list[Sticker], seed: int, count: int) -> Latents:
    """`count` random clips through the encoder. The global mean and deviation of video latents become shift and scale."""
    videos, pictures, tags = [], [], []
    for i in range(0, count, 100):
        clips = make_clips(stickers, np.random.default_rng((seed, i)), 100)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            videos.append(torch.cat([tae.encode(v) for v in clips.video.split(25)]).half())
            pictures.append(tae.encode(clips.picture).half())
        tags += list(zip(clips.names, clips.motions, clips.amounts, clips.backgrounds, strict=True))
        if i % 4000 == 0:
            print(f"encoded {i} of {count} clips", flush=True)
    video, picture = torch.cat(videos), torch.cat(pictures)
    shift, scale = float(video.float().mean()), 1 / float(video.float().std())
    names, motions, amounts, backgrounds = map(list, zip(*tags, strict=True))
    return Latents(((video.float() - shift) * scale).half(), ((picture.float() - shift) * scale).half(), names, motions, amounts, backgrounds, scale, shift)


def tokens_of(texts: list[str]) -> Tensor:
    """[B, L] int64. Captions beyond the encoder's length are cut."""
    return torch.tensor([tokenize(t.encode()[: TEXT_CONFIG.length - 1].decode(errors="ignore"), TEXT_CONFIG.length) for t in texts])


class TextHeads(nn.Module):
    """What the text encoder must be able to say before it meets the denoiser: motion, amount, background, and the rest picture's latent."""

    def __init__(self, latent_values: int) -> None:
        super().__init__()
        width = TEXT_CONFIG.width
        self.kinds = nn.ModuleList(nn.Linear(width, n) for n in (len(MOTIONS), 3, len(BACKGROUNDS)))
        self.picture = nn.Sequential(nn.Linear(width, 512), nn.SiLU(), nn.Linear(512, latent_values))

    def forward(self, context: Tensor) -> tuple[list[Tensor], Tensor]:
        pooled = context.mean(1) * 4
        return [head(pooled) for head in self.kinds], self.picture(pooled)


def draw_captions(data: Latents, index: Tensor, rng: np.random.Generator, moving: bool) -> list[str]:
    """Fresh words for the clips at `index`; a picture's caption says nothing of motion."""
    return [caption(rng, data.names[i], data.motions[i] if moving else "still", data.amounts[i], data.backgrounds[i]) for i in index.tolist()]


def warm_up_text(text: ByteTextEncoder, data: Latents, seed: int, path: Path) -> None:
    """Teach the encoder to read captions before it meets the denoiser, once: the result is kept at `path`."""
    if (saved := checkpoint.load(path)) is not None:
        text.load_state_dict(saved["text"])
        return
    heads = TextHeads(data.picture[0].numel())
    optimizer = torch.optim.AdamW([*text.parameters(), *heads.parameters()], weight_decay=0.01, betas=(0.9, 0.98))
    motions, places = list(MOTIONS), list(BACKGROUNDS)
    for step in range(WARM_UP_STEPS):
        rng = np.random.default_rng((seed, 77, step))
        index = torch.from_numpy(rng.integers(len(data.names), size=WARM_UP_BATCH))
        labels = [(motions.index(data.motions[i]), data.amounts[i], places.index(data.backgrounds[i])) for i in index.tolist()]
        truth = list(torch.tensor(labels).unbind(1))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            kinds, picture = heads(text(tokens_of(draw_captions(data, index, rng, moving=True))))
        loss = F.mse_loss(picture.float(), data.picture[index].float().flatten(1))
        loss = loss + sum((F.cross_entropy(k.float(), t) for k, t in zip(kinds, truth, strict=True)), torch.zeros(()))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, WARM_UP_STEPS, 2e-3, warmup=50)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([*text.parameters(), *heads.parameters()], 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            right = [f"{float((k.argmax(1) == t).float().mean()):.2f}" for k, t in zip(kinds, truth, strict=True)]
            print(f"text {step + 1} loss {loss.item():.3f} motion, amount, background right: {' '.join(right)}", flush=True)
    checkpoint.save(path, {"text": text.state_dict()})


@dataclass(frozen=True)
class Batch:
    """One kind of sample of a step. x1, condition: [B, C, F, h, w]; tokens: [B, L]; noise as x1; t: [B]."""

    x1: Tensor
    condition: Tensor
    tokens: Tensor
    noise: Tensor
    t: Tensor


def draw(data: Latents, rng: np.random.Generator, kind: str, count: int) -> Batch:
    """Random clips as animated pictures ("animated"), videos from words alone ("video"), or pictures from words ("picture")."""
    index = torch.from_numpy(rng.integers(len(data.names), size=count))
    x1 = (data.picture if kind == "picture" else data.video)[index].float()
    condition = data.picture[index].float().expand_as(x1) if kind == "animated" else torch.zeros_like(x1)
    texts = draw_captions(data, index, rng, moving=kind != "picture")
    texts = ["" if rng.random() < DROP_TEXT else text for text in texts]
    t = torch.sigmoid(torch.from_numpy(rng.standard_normal(count)).float())  # logit-normal(0, 1)
    return Batch(x1, condition, tokens_of(texts), torch.from_numpy(rng.standard_normal(x1.shape)).float(), t)


def flow_loss(text: ByteTextEncoder, denoiser: MovieGenTransformer, batch: Batch) -> Tensor:
    """Flow matching, x_t = t x1 + (1 - t) x0, target x1 - x0. Loss of each sample [B]. Polyak et al. 2024, section 3.1.2, with sigma_min = 0."""
    t = batch.t[:, None, None, None, None]
    x = t * batch.x1 + (1 - t) * batch.noise
    modulation = denoiser.time(batch.t)
    # on CPUs the plain products are half again as fast through the backward pass as the fused attention
    with torch.autocast("cpu", dtype=torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        u = denoiser(x, modulation, batch.condition, denoiser.text(text(batch.tokens)))
    return (u.float() - (batch.x1 - batch.noise)).square().flatten(1).mean(1)


def optimizers(text: ByteTextEncoder, denoiser: MovieGenTransformer) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the denoiser's blocks, AdamW for all else, the text encoder at a small share of its rate.

    Muon makes every update the same size. While the denoiser does not listen yet, the text encoder's gradient is noise, and full-size steps
    along noise wipe out what the warm-up taught it.
    """
    matrices = [p for n, p in denoiser.named_parameters() if p.ndim == 2 and n.startswith("blocks.") and "table" not in n]
    ids = {id(p) for p in matrices}
    rest = [p for p in denoiser.parameters() if id(p) not in ids]
    groups = [{"params": rest, "share": 1.0}, {"params": [*text.parameters()], "share": TEXT_SHARE}]
    return [
        torch.optim.Muon(matrices, lr=1.0, weight_decay=0.02, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=1.0, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


PEAKS = (3e-3, 1.5e-3)  # of Muon and AdamW
TEXT_SHARE = 0.05  # of AdamW's rate


def load_tae(out: Path) -> TAE:
    """The autoencoder of stage 1."""
    saved = checkpoint.load(out / "tae.pt")
    assert saved is not None, f"{out}/tae.pt is missing; run the first stage: python -m reelstep.training.zoo.reel_tiny_tae"
    tae = channels_last(TAE(TAE_CONFIG))
    tae.load_state_dict(saved["model"])
    return tae.eval()


def train(steps: int, clips: int, seed: int, out: Path) -> None:
    torch.manual_seed(seed)
    known = [s for s in load_stickers() if not s.held_out]
    cached = checkpoint.load(out / "latents.pt")
    if cached is None:
        cached = dict(vars(encode_clips(load_tae(out), known, seed + 10, clips)))
        checkpoint.save(out / "latents.pt", cached)
    data = Latents(**cached)
    text, denoiser = ByteTextEncoder(TEXT_CONFIG), MovieGenTransformer(DENOISER_CONFIG)
    for name, parameter in denoiser.named_parameters():  # adaLN-zero: every block starts as the identity
        if name.endswith(("patch_out.weight", "time.shared.weight", "cross_attention.out.weight")) or (name.startswith("blocks.") and name.endswith("table")):
            nn.init.zeros_(parameter)
    both, start, elapsed = optimizers(text, denoiser), 0, 0.0
    path = out / "denoiser.pt"
    if (saved := checkpoint.load(path)) is not None:
        text.load_state_dict(saved["text"])
        denoiser.load_state_dict(saved["denoiser"])
        for optimizer, state in zip(both, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        start, elapsed = saved["step"], saved["elapsed_s"]
    sizes = [sum(p.numel() for p in module.parameters()) for module in (denoiser, text)]
    print(f"denoiser {sizes[0]:,}, text {sizes[1]:,} parameters; step {start} of {steps}", flush=True)
    began = time.monotonic() - elapsed
    if start == 0:
        warm_up_text(text, data, seed, out / "text.pt")
    parameters = [*text.parameters(), *denoiser.parameters()]
    sums: dict[str, float] = {}
    for step in range(start, steps):
        rng = np.random.default_rng((seed, 11, step))
        losses = {}
        for kind, count in (("animated", ANIMATED), ("video", VIDEOS), ("picture", PICTURES)):
            losses[kind] = flow_loss(text, denoiser, draw(data, rng, kind, count)).mean()
        loss = 0.6 * losses["animated"] + 0.2 * losses["video"] + 0.2 * losses["picture"]
        for optimizer, peak in zip(both, PEAKS, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak, warmup=60) * group.get("share", 1.0)
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in both:
            optimizer.step()
        sums = {k: sums.get(k, 0.0) + v.item() for k, v in losses.items()}
        if (step + 1) % 50 == 0 or step + 1 == steps:
            print(f"step {step + 1} " + " ".join(f"{k} {v / 50:.4f}" for k, v in sums.items()) + f", {time.monotonic() - began:.0f} s", flush=True)
            sums = {}
        if (step + 1) % 100 == 0 or step + 1 == steps:
            state = {"text": text.state_dict(), "denoiser": denoiser.state_dict(), "optimizers": [o.state_dict() for o in both]}
            checkpoint.save(path, {**state, "step": step + 1, "elapsed_s": time.monotonic() - began, "scale": data.scale, "shift": data.shift})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--clips", type=int, default=24000, help="clips encoded beforehand; captions, noise and t are drawn anew every step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("checkpoints/reel-tiny"))
    args = parser.parse_args()
    train(args.steps, args.clips, args.seed, args.out)


if __name__ == "__main__":
    main()
