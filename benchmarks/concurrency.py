"""What do 16 clients at once get, against one at a time, and which batches does the scheduler form?

The same requests, once one after the other and once all together, over an engine in this process. Same seeds, same pictures: quality
beside speed is the largest difference of a pixel between the two.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

from reelstep.benchmarks.harness import Row, parser, report
from reelstep.engine.build import build_bundle
from reelstep.engine.loop import BatchRecord, Engine, open_engine
from reelstep.engine.request import Event, Failed, Finished, Request
from reelstep.engine.resolve import Ask, resolve

PROMPTS = ("a red heart spins clockwise", "a cat slides left on a blue background", "the sun grows", "a fish bounces on teal")


def run_all(engine: Engine, requests: Sequence[Request], together: bool) -> tuple[float, list[Finished]]:
    """Seconds for all, and what each got."""
    results: dict[str, Finished] = {}
    failures: list[Failed] = []
    ended = threading.Semaphore(0)

    def listen(request: Request, event: Event) -> None:
        if isinstance(event, Finished):
            results[request.id] = event
        if isinstance(event, Failed):
            failures.append(event)
        if isinstance(event, Finished | Failed):
            ended.release()

    began = time.perf_counter()
    for request in requests:
        engine.submit(request, lambda event, request=request: listen(request, event))  # type: ignore[misc]
        if not together:
            ended.acquire()
    if together:
        for _ in requests:
            ended.acquire()
    seconds = time.perf_counter() - began
    if failures:
        raise failures[0].error
    return seconds, [results[r.id] for r in requests]


def main(argv: Sequence[str]) -> None:
    options = parser("concurrency", __doc__ or "")
    options.add_argument("--clients", type=int, default=16)
    options.add_argument("--rounds", type=int, default=5)
    args = options.parse_args(argv)
    bundle = build_bundle("reel-tiny", backend="openvino", precision=None, out=args.cache / "bench-concurrency.reel", cache=args.cache)
    records: list[BatchRecord] = []
    engine = open_engine([bundle.path], cache=args.cache, on_batch=records.append)
    rows: list[Row] = []
    seconds: dict[bool, list[float]] = {False: [], True: []}
    sizes: dict[bool, Counter[int]] = {False: Counter(), True: Counter()}
    worst = 0
    for r in range(args.rounds):
        outputs = {}
        for together in (False, True):
            asks = [Ask(PROMPTS[i % len(PROMPTS)], seed=args.seed + i, request_id=f"{r} {together} {i}") for i in range(args.clients)]
            records.clear()
            spent, outputs[together] = run_all(engine, [resolve(ask, engine.models) for ask in asks], together)
            seconds[together].append(spent)
            sizes[together].update(b.rows for b in records if b.key[1] == "denoise")
        for one, other in zip(outputs[False], outputs[True], strict=True):
            worst = max(worst, int(np.abs(one.media.frames.astype(int) - other.media.frames).max()))
    engine.close(1.0)
    base = float(np.median(seconds[False]))
    for together in (False, True):
        median = float(np.median(seconds[together]))
        row = {
            "clients": args.clients if together else 1,
            "requests": args.clients,
            "median_s": median,
            "requests_per_s": args.clients / median,
            "ratio_to_one_at_a_time": base / median,
            "mean_rows": sum(k * v for k, v in sizes[together].items()) / sizes[together].total(),
            "batches": " ".join(f"{k}x{v}" for k, v in sorted(sizes[together].items())),
            "largest_pixel_difference": worst,
        }
        rows.append(row)
    report("concurrent requests", rows, args.seed, args.json)
