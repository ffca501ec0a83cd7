"""How long does one sticker animation take end to end over gRPC, and where does the time go?

8 frames of 64x64 with the model's default solver and guidance, from a PNG to an MP4 in the client's hands. The animated-stickers paper
claims less than a second, on a GPU it does not name. Quality: see `reelstep bench animation`, which measures the same requests.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.resources import files

from reelstep.benchmarks.clients import server
from reelstep.benchmarks.harness import parser, report, timing
from reelstep.engine.build import build_bundle
from reelstep.engine.client import Client

PROMPT = "a red heart bounces on a white background"


def main(argv: Sequence[str]) -> None:
    options = parser("sticker", __doc__ or "")
    options.add_argument("--requests", type=int, default=40, help="measured requests (default: %(default)s)")
    args = options.parse_args(argv)
    bundle = build_bundle("reel-tiny", backend="openvino", precision=None, out=args.cache / "bench-sticker.reel", cache=args.cache)
    picture = files("reelstep.benchmarks").joinpath("heart.png").read_bytes()
    totals, stages = [], []
    with server([bundle.path], args.cache) as address, Client(address) as client:
        for i in range(args.requests + 3):
            began = time.perf_counter()
            generation = client.generate(PROMPT, image=picture, seed=args.seed + i)
            total = time.perf_counter() - began
            if i >= 3:
                totals.append(total)
                usage = generation.usage
                stages.append({"queue": usage.queue_s, **usage.compute_s, "everything else": total - usage.queue_s - sum(usage.compute_s.values())})
    whole = timing(totals)
    rows = [{"stage": "end to end", "median_s": whole.median_s, "p10_s": whole.p10_s, "p90_s": whole.p90_s, "share": 1.0}]
    for name in stages[0]:
        part = timing([s[name] for s in stages])
        rows.append({"stage": name, "median_s": part.median_s, "p10_s": part.p10_s, "p90_s": part.p90_s, "share": part.median_s / whole.median_s})
    report("sticker animation over gRPC", rows, args.seed, args.json, {"nfe": usage.nfe, "forwards": usage.forwards, "requests": args.requests})
