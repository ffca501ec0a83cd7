"""Recipe, stage 4 of `reel-tiny`: the checkpoints of the stages become the shipped weights.

`python -P -m reelstep.training.zoo.reel_tiny_export`. bfloat16; the latents' scale and shift are stored with the weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from reelstep.compiler.storage import check_folder
from reelstep.engine.models.reel_tiny import WEIGHTS, ReelTiny, load_weights
from reelstep.errors import ConfigError
from reelstep.training import checkpoint
from reelstep.training.recipe import run, write_weights


def export(source: Path, target: Path) -> None:
    """Join the TAE (its later decoder where stage 3 was run), text encoder and denoiser; what no stage made here stays as `target` has it.

    Raises ConfigError for checkpoints that are not there.
    """
    tae, decoder, denoiser = (checkpoint.load(source / f"{name}.pt") for name in ("tae", "tae_decoder", "denoiser"))
    if not (tae or decoder or denoiser):
        raise ConfigError(f"{source} holds no checkpoint; run a stage first")
    if tae and not denoiser:
        raise ConfigError(f"{source}/denoiser.pt is missing; a denoiser reads the latents of its own autoencoder only, so run stage 2")
    model = ReelTiny()
    if target.exists():
        load_weights(model, target)
    if latest := decoder or tae:
        scale, shift = model.tae.scale.clone(), model.tae.shift.clone()
        model.tae.load_state_dict({**latest["model"], "scale": scale, "shift": shift})
    if denoiser:
        model.text.load_state_dict(denoiser["text"])
        model.denoiser.load_state_dict(denoiser["denoiser"])
        model.tae.scale.fill_(denoiser["scale"])
        model.tae.shift.fill_(denoiser["shift"])
    weights = {name: value.to(torch.bfloat16) if value.ndim else value for name, value in model.state_dict().items()}
    write_weights(target, weights)
    steps = ", ".join(f"{name} {saved['step']}" for name, saved in (("tae", tae), ("decoder", decoder), ("denoiser", denoiser)) if saved)
    print(f"{target}: {sum(v.numel() for v in weights.values()):,} values, {target.stat().st_size:,} bytes; steps: {steps}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, default=Path("checkpoints/reel-tiny"))
    parser.add_argument("--target", type=Path, default=WEIGHTS / "reel-tiny.safetensors")
    args = parser.parse_args()
    check_folder(args.target)
    export(args.source, args.target)


if __name__ == "__main__":
    run(main)
