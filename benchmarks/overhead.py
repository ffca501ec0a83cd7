"""What do service, scheduler and sampler cost when the network costs nothing?

The `null` backend compiles everything and runs nothing, so what is left is ours: per request and per network call, in process and over gRPC.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from reelstep.benchmarks.clients import server
from reelstep.benchmarks.concurrency import run_all
from reelstep.benchmarks.harness import Row, parser, report, timing
from reelstep.engine.build import build_bundle
from reelstep.engine.client import Client
from reelstep.engine.loop import BatchRecord, open_engine
from reelstep.engine.resolve import Ask, resolve

PROMPT = "a red heart bounces"
WARM_UP = 3  # requests that are not counted


def main(argv: Sequence[str]) -> None:
    options = parser("overhead", __doc__ or "")
    options.add_argument("--requests", type=int, default=100)
    args = options.parse_args(argv)
    bundle = build_bundle("reel-tiny", backend="null", precision=None, out=args.cache / "bench-overhead.reel", cache=args.cache)
    records: list[BatchRecord] = []
    engine = open_engine([bundle.path], cache=args.cache, on_batch=records.append)
    rows: list[Row] = []
    inside: dict[int, float] = {}
    calls: dict[int, int] = {}
    for steps in (1, 51):
        spent = []
        for i in range(args.requests + WARM_UP):
            records.clear()
            ask = Ask(PROMPT, steps=steps, scale=1.0, seed=args.seed, request_id=f"{steps} {i}")
            seconds, _ = run_all(engine, [resolve(ask, engine.models)], together=True)
            spent.append(seconds - sum(r.seconds for r in records))
        calls[steps], inside[steps] = sum(r.calls for r in records), timing(spent[WARM_UP:]).median_s
        rows.append({"where": "in process", "steps": steps, "calls": calls[steps], "per_request_ms": inside[steps] * 1e3})
    engine.close(1.0)
    per_call = (inside[51] - inside[1]) / 50
    with server([bundle.path], args.cache) as address, Client(address) as client:
        for steps in (1, 51):
            spent = []
            for _ in range(args.requests + WARM_UP):
                began = time.perf_counter()
                client.generate(PROMPT, steps=steps, scale=1.0, seed=args.seed, media_type="image/webp")
                spent.append(time.perf_counter() - began)
            median_s = timing(spent[WARM_UP:]).median_s
            rows.append({"where": "over gRPC, WebP encoding included", "steps": steps, "calls": calls[steps], "per_request_ms": median_s * 1e3})
    report("overhead without the network", rows, args.seed, args.json, {"per_call_ms": per_call * 1e3, "requests": args.requests})
    print(f"one more network call costs {per_call * 1e3:.3f} ms of scheduler, sampler and runner")
