"""Recipe of `reel-tiny-grey-lora`: a LoRA that makes `reel-tiny` draw in shades of grey, which nobody can ask it for in words.

`python -P -m reelstep.training.zoo.reel_tiny_lora`. Seeded; resumes from checkpoints/reel-tiny-lora/lora.pt. Flow matching as in stage 2 of `reel-tiny`, on the
same clips without their colour; captions still name colours. The weights of the model stay as they are.

B batch, C channels, F H W latent sizes, R rank.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from reelstep.compiler.lora import add_pair
from reelstep.engine.lora import BASE
from reelstep.engine.models.reel_tiny import SPEC, WEIGHTS, ReelTiny, adaptable, build
from reelstep.training import checkpoint
from reelstep.training.arguments import hundreds, positive, whole
from reelstep.training.half import half_products
from reelstep.training.learning_rate import learning_rate
from reelstep.training.plain_attention import PlainAttention
from reelstep.training.recipe import check_paths, run, write_weights
from reelstep.training.zoo.reel_tiny_denoiser import Latents, draw, encode_text, flow_loss, kept
from reelstep.training.zoo.stickers import NAMES, Sticker, load_stickers, make_clips

LUMA = (0.299, 0.587, 0.114)
"""Of red, green and blue: BT.601."""
COUNTS = {"video": 6, "picture": 8}
"""Samples of a step."""
EVERYDAY_COPIES = 20
"""How many times a sticker of NAMES stands among those that clips are drawn from."""


def grey(pixels: Tensor) -> Tensor:
    """[B, 3, F, H, W] without colour."""
    weights = torch.tensor(LUMA)[:, None, None, None]
    return (pixels * weights).sum(1, keepdim=True).expand_as(pixels)


@torch.no_grad()
def encode_grey(model: ReelTiny, stickers: Sequence[Sticker], seed: int, count: int) -> Latents:
    """`count` random clips in grey, through the model's own encoder, in hundreds."""
    print(f"encoding {count} clips", flush=True)
    clips = [make_clips(stickers, np.random.default_rng((seed, i)), 100) for i in range(count // 100)]
    with half_products():
        videos = [model.tae.encode(grey(part)).half() for each in clips for part in each.video.split(25)]
        pictures = [model.tae.encode(grey(each.picture)).half() for each in clips]
    tags = {name: [tag for each in clips for tag in getattr(each, name)] for name in ("names", "motions", "amounts", "backgrounds")}
    return Latents(torch.cat(videos), torch.cat(pictures), **tags, scale=1.0, shift=0.0)


class Pairs(nn.Module):
    """A pair for each layer, `down` [inputs, R] and `up` [R, outputs], added by the hooks that the engine's program has; at first they add nothing."""

    def __init__(self, linears: Mapping[str, nn.Linear], rank: int) -> None:
        super().__init__()
        self.names = tuple(linears)
        self.down = nn.ParameterList(torch.randn(linear.in_features, rank) / math.sqrt(linear.in_features) for linear in linears.values())
        self.up = nn.ParameterList(torch.zeros(rank, linear.out_features) for linear in linears.values())
        for linear, down, up in zip(linears.values(), self.down, self.up, strict=True):
            linear.register_forward_hook(partial(add_pair, down, up))

    def file(self) -> dict[str, Tensor]:
        """As diffusers spells them, A [R, inputs] and B [outputs, R], bfloat16."""
        both = {"A": self.down, "B": self.up}
        return {
            f"transformer.{name}.lora_{letter}.weight": matrix.detach().T.to(torch.bfloat16).contiguous()
            for letter, matrices in both.items()
            for name, matrix in zip(self.names, matrices, strict=True)
        }


def step_loss(model: ReelTiny, data: Latents, rng: np.random.Generator) -> Tensor:
    """Mean over videos and pictures from words."""
    losses = []
    for kind, count in COUNTS.items():
        batch = draw(data, rng, kind, count)
        with torch.no_grad(), half_products(), PlainAttention():
            context = encode_text(model.text, batch.tokens)
        losses.append(flow_loss(context, model.denoiser, batch).mean())
    return torch.stack(losses).mean()


def train(steps: int, clips: int, rank: int, peak: float, seed: int, out: Path) -> Pairs:
    torch.manual_seed(seed)
    model = build().requires_grad_(False)
    known = [s for s in load_stickers() if not s.held_out]
    common = [s for s in known if s.codepoint in NAMES] * (EVERYDAY_COPIES - 1)
    drawn = {"seed": seed, "clips": clips}
    asked = {**drawn, "rank": rank}
    data = kept(out / "latents.pt", drawn, lambda: encode_grey(model, [*known, *common], seed + 30, clips))
    pairs = Pairs(adaptable(model), rank)
    optimizer = torch.optim.AdamW(pairs.parameters(), weight_decay=0.0, betas=(0.9, 0.98))
    start, elapsed, total = 0, 0.0, 0.0
    if (state := checkpoint.load(out / "lora.pt", asked=asked)) is not None:
        pairs.load_state_dict(state["pairs"])
        optimizer.load_state_dict(state["optimizer"])
        start, elapsed = state["step"], state["elapsed_s"]
    print(f"{sum(p.numel() for p in pairs.parameters()):,} parameters, {len(data.names)} clips, step {start} of {steps}", flush=True)
    began = time.monotonic() - elapsed
    for step in range(start, steps):
        loss = step_loss(model, data, np.random.default_rng((seed, 31, step)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak, warmup=20)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(pairs.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if (step + 1) % 25 == 0 or step + 1 == steps:
            print(f"step {step + 1} loss {total / ((step % 25) + 1):.4f}, {time.monotonic() - began:.0f} s", flush=True)
            total = 0.0
            state = {"pairs": pairs.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1, "elapsed_s": time.monotonic() - began}
            checkpoint.save(out / "lora.pt", {**state, "asked": asked})
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=whole(1), default=100)
    parser.add_argument("--clips", type=hundreds, default=1000, help="encoded beforehand, a multiple of 100; captions, noise and t are drawn anew every step")
    parser.add_argument("--rank", type=whole(1), default=4)
    parser.add_argument("--peak", type=positive, default=3e-3, help="learning rate")
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--out", type=Path, default=Path("checkpoints/reel-tiny-lora"))
    parser.add_argument("--target", type=Path, default=WEIGHTS / "reel-tiny-grey-lora.safetensors")
    args = parser.parse_args()
    check_paths(args.out, args.target)
    pairs = train(args.steps, args.clips, args.rank, args.peak, args.seed, args.out)
    write_weights(args.target, pairs.file(), {"format": "pt", BASE: SPEC.name})
    print(f"{args.target}: {args.target.stat().st_size:,} bytes")


if __name__ == "__main__":
    run(main)
