"""How many requests are done in time, and how well, if each asks for the best, for a draft, or for what its deadline allows?

A server of reel-tiny in a process of its own, and the same Poisson arrivals of videos over gRPC, sent when they are due whatever became of those before. Load 1
is what the server does one request of quality best at a time; a deadline is the same multiple of that request's seconds for all. Quality is the mean PSNR that
the model's menu gives for what was done in time. Load and deadlines follow the machine, so what is compared is the choices, in turns on one server.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from reelstep.benchmarks import traces
from reelstep.benchmarks.clients import server
from reelstep.benchmarks.harness import Row, parser, report
from reelstep.benchmarks.simulate import PROMPT, Answered, live, served
from reelstep.benchmarks.traces import Arrival, Kind
from reelstep.engine.build import build_bundle
from reelstep.engine.client import Client
from reelstep.engine.models.reel_tiny import MENU, SPEC
from reelstep.engine.request import AUTO, QUALITIES
from reelstep.errors import ConfigError

TASK = "text_to_video"
CHOICES = ("best", AUTO, "draft")


def alone_s(address: str, rounds: int) -> float:
    """Median seconds of one request of quality best on an idle server, as its client sees them. The first one is not counted."""
    seconds = []
    with Client(address) as client:
        for k in range(rounds + 1):
            began = time.perf_counter()
            client.generate(PROMPT, model=SPEC.name, quality="best", seed=k)
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def arrivals_of(choice: str, requests: int, per_s: float, deadline_s: float, seed: int) -> list[Arrival]:
    """The same times for every choice. The steps are the server's business."""
    return traces.draw(requests, per_s, [Kind(TASK, 1, choice)], lambda task, steps: deadline_s, (1.0, 1.0), None, seed)


def row_of(choice: str, load: float, answers: Sequence[Answered], psnr_db: Mapping[str, float]) -> Row:
    """How the requests of one choice fared; the mean PSNR is None where none was done in time."""
    got = Counter(each.quality for each in answers if each.in_time)
    mean_db = sum(psnr_db[quality] * times for quality, times in got.items()) / got.total() if got else None
    shares = {quality: got[quality] / len(answers) for quality in QUALITIES}
    failed = sum(each.outcome == "failed" for each in answers)
    return {"load": load, "asked": choice, **served(answers), "failed": failed, "psnr_db": mean_db, **shares}


def main(argv: Sequence[str]) -> None:
    options = parser("deadlines", __doc__ or "")
    options.add_argument("--loads", type=float, nargs="+", default=[0.7, 1.5], metavar="X", help="(%(default)s)")
    options.add_argument("--requests", type=int, default=40, metavar="N", help="of each choice at each load (%(default)s)")
    options.add_argument("--slack", type=float, default=4.0, metavar="X", help="deadline over the seconds of one request of quality best alone (%(default)s)")
    args = options.parse_args(argv)
    if not (args.requests >= 1 and args.slack > 0 and all(load > 0 for load in args.loads)):
        raise ConfigError(f"{args.requests} requests at loads {args.loads} with deadlines of {args.slack} times the seconds alone: all are above 0")
    bundle = build_bundle(SPEC.name, backend="openvino", precision=None, out=args.cache / "bench-deadlines.reel", cache=args.cache)
    psnr_db = {quality: entry.psnr_db for quality, entry in MENU.items()}
    rows: list[Row] = []
    with server([bundle.path], args.cache) as address:
        alone = alone_s(address, 5)
        for load in args.loads:
            for choice in CHOICES:
                answers = live(address, SPEC.name, arrivals_of(choice, args.requests, load / alone, args.slack * alone, args.seed))
                rows.append(row_of(choice, load, answers, psnr_db))
    extra = {"alone_s": alone, "deadline_s": args.slack * alone, "requests": args.requests, "menu_psnr_db": psnr_db}
    print(f"a request of quality best takes {alone:.3g} s alone; deadlines are {args.slack * alone:.3g} s")
    report("deadlines", rows, args.seed, args.json, extra)
