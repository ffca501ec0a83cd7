"""How well are unseen stickers animated? A conditioned animation has one right answer, so it is measured against it.

Held-out stickers x the 12 motions, through the compiled engine as a client would ask for them. PSNR in dB, the mean over clips, by
motion, beside two baselines: "repeat" (the input picture, 8 times) and "ceiling" (the true animation through the TAE and back).
Needs the font of Debian's package fonts-noto-color-emoji and the `training` extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from reelstep.benchmarks.concurrency import run_all
from reelstep.benchmarks.contact_sheet import sheet
from reelstep.benchmarks.harness import Row, parser, report
from reelstep.engine.build import build_bundle
from reelstep.engine.loop import Engine, open_engine
from reelstep.engine.models.reel_tiny import TEXT_CONFIG, build
from reelstep.engine.pipelines.latent import to_pixels
from reelstep.engine.resolve import Ask, resolve
from reelstep.training.zoo.stickers import FRAMES, MOVING, Clips, Sticker, load_stickers, make_clips

LONGEST_PROMPT = TEXT_CONFIG.length - 1
"""Captions are ASCII; the recipe cuts them at the same place."""


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """PSNR of two uint8 clips, in dB. Equal ones give 100."""
    mse = float(np.square(a.astype(np.float64) - b).mean())
    return 100.0 if mse == 0 else float(10 * np.log10(255**2 / mse))


def png(picture: np.ndarray) -> bytes:
    """uint8 [H, W, 3] as a PNG file."""
    buffer = BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def animate(engine: Engine, truth: np.ndarray, clips: Clips, options: Ask) -> list[np.ndarray]:
    """The engine's clips [F, H, W, 3] for the middle frames of `truth` [N, F, H, W, 3] and their captions."""
    asks = [
        replace(options, prompt=text[:LONGEST_PROMPT], image=png(truth[i, FRAMES // 2]), seed=i, request_id=f"{clips.motions[i]} {i}")
        for i, text in enumerate(clips.captions)
    ]
    _, results = run_all(engine, [resolve(ask, engine.models) for ask in asks], together=True)
    return [r.media.frames[0] for r in results]


def measure(engine: Engine, stickers: Sequence[Sticker], per_motion: int, seed: int, options: Ask) -> tuple[list[Row], list[tuple[str, list[np.ndarray]]]]:
    """A row for each motion and one for the mean; and (caption, [truth, result]) of the first clip of each motion."""
    tae = build().tae
    rows: list[Row] = []
    shown = []
    scores: dict[str, list[float]] = {"repeat": [], "ceiling": [], "model": []}
    for m, motion in enumerate(MOVING):
        clips = make_clips(stickers, np.random.default_rng((seed, m)), per_motion, [motion])
        truth = to_pixels(clips.video)
        with torch.no_grad():
            round_trip = to_pixels(torch.cat([tae(v) for v in clips.video.split(8)]))
        result = animate(engine, truth, clips, options)
        own = {
            "repeat": [psnr(np.repeat(t[FRAMES // 2][None], FRAMES, 0), t) for t in truth],
            "ceiling": [psnr(r, t) for r, t in zip(round_trip, truth, strict=True)],
            "model": [psnr(r, t) for r, t in zip(result, truth, strict=True)],
        }
        rows.append({"motion": motion, "clips": per_motion, **summary(own)})
        scores = {k: v + own[k] for k, v in scores.items()}
        shown.append((clips.captions[0], [truth[0], result[0]]))
    rows.append({"motion": "mean", "clips": per_motion * len(MOVING), **summary(scores)})
    return rows, shown


def summary(scores: dict[str, list[float]]) -> Row:
    """Means, the model's spread, and the two distances that count."""
    means = {f"{k}_db": float(np.mean(v)) for k, v in scores.items()}
    return {
        **means,
        "model_sd_db": float(np.std(scores["model"])),
        "above_repeat_db": means["model_db"] - means["repeat_db"],
        "below_ceiling_db": means["ceiling_db"] - means["model_db"],
    }


def main(argv: Sequence[str]) -> None:
    options = parser("animation", __doc__ or "")
    options.add_argument("--per-motion", type=int, default=30, help="clips of each motion (default: %(default)s)")
    options.add_argument("--steps", type=int)
    options.add_argument("--scale", type=float)
    options.add_argument("--solver", default="")
    options.add_argument("--known", action="store_true", help="stickers that were trained on: to choose settings without a look at the held-out ones")
    options.add_argument("--sheet", type=Path, metavar="FILE", help="write a contact sheet (truth at the left, result at the right)")
    args = options.parse_args(argv)
    stickers = [s for s in load_stickers() if s.held_out != args.known]
    bundle = build_bundle("reel-tiny", backend="openvino", precision=None, out=args.cache / "bench-animation.reel", cache=args.cache)
    engine = open_engine([bundle.path], cache=args.cache, max_running=64, max_queued=1024)
    rows, shown = measure(engine, stickers, args.per_motion, args.seed, Ask("", steps=args.steps, scale=args.scale, solver=args.solver))
    engine.close(1.0)
    if args.sheet:
        sheet(shown, args.sheet)
    which = "known" if args.known else "held_out"
    report(f"{which.replace('_', '-')} sticker animations, PSNR", rows, args.seed, args.json, {f"{which}_stickers": len(stickers)})
