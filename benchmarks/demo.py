"""`make demo`: compile reel-tiny, serve it, ask for six videos from words and two animated pictures, and show what came back.

Files go to demo/: an MP4 and a WebP of each, contact_sheet.png, times.txt.
"""

from __future__ import annotations

import argparse
import time
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageSequence
from rich.console import Console
from rich.table import Table

from reelstep.benchmarks.clients import server
from reelstep.benchmarks.contact_sheet import sheet
from reelstep.compiler.storage import replace_file
from reelstep.engine.build import build_bundle
from reelstep.engine.client import Client

PROMPTS = (
    "a yellow star grows on a purple background",
    "a red apple slides left on a yellow background",
    "a ghost fades in and out on a black background",
    "a panda shrinks on a pink background",
    "a soccer ball bounces on a green background",
    "a red heart spins clockwise on a blue background",
)
PICTURES = (
    ("rocket.png", "a rocket slides up on a white background"),
    ("mushroom.png", "a mushroom shakes on a light blue background"),
)
SEED = 7


def frames_of(webp: bytes) -> np.ndarray:
    """uint8 [F, H, W, 3] of an animated WebP."""
    return np.stack([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(Image.open(BytesIO(webp)))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--pictures", type=Path, default=Path(__file__).parent.parent / "docs", help="where rocket.png and mushroom.png lie")
    parser.add_argument("--cache", type=Path, default=Path(".cache/reelstep"))
    args = parser.parse_args()
    began = time.monotonic()
    print("compiling reel-tiny for this CPU (the first time; then it is cached) ...", flush=True)
    bundle = build_bundle("reel-tiny", backend="openvino", precision=None, out=args.out / "reel-tiny.reel", cache=args.cache)
    print(f"  {bundle.path}: {bundle.total_bytes / 1e6:.1f} MB in {time.monotonic() - began:.1f} s", flush=True)
    jobs = [(prompt, None) for prompt in PROMPTS] + [(prompt, args.pictures / name) for name, prompt in PICTURES]
    table = Table("file", "prompt", "picture", "NFE", "forwards", "queue s", "compute s", "total s")
    rows = []
    with server([bundle.path], args.cache) as address, Client(address) as client:
        print(f"serving on {address}", flush=True)
        for i, (prompt, picture) in enumerate(jobs):
            sent = time.monotonic()
            image = picture.read_bytes() if picture else None
            generation = client.generate(prompt, image=image, seed=SEED, media_type="video/mp4")
            total, usage = time.monotonic() - sent, generation.usage
            still = client.generate(prompt, image=image, seed=SEED, media_type="image/webp")
            stem = f"{i + 1}-{prompt.split(' on ')[0].replace(' ', '-')}"
            replace_file(args.out / f"{stem}.mp4", generation.artifacts[0].data)
            replace_file(args.out / f"{stem}.webp", still.artifacts[0].data)
            clips = [frames_of(still.artifacts[0].data)]
            rows.append((prompt + (f"\n(from {picture.name})" if picture else ""), clips))
            compute = sum(usage.compute_s.values())
            seconds = (f"{s:.3f}" for s in (usage.queue_s, compute, total))
            table.add_row(f"{stem}.mp4", prompt, picture.name if picture else "", str(usage.nfe), str(usage.forwards), *seconds)
    sheet(rows, args.out / "contact_sheet.png", zoom=2)
    console = Console(width=150, record=True)
    console.print(table)
    replace_file(args.out / "times.txt", console.export_text().encode())
    print(f"{len(jobs)} videos in {args.out}/, all on one page: {args.out / 'contact_sheet.png'}; {time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
