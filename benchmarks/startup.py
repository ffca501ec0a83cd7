"""How long until the first result, and until a model is compiled, with nothing in the cache and with everything there?

Each number is of a command in a process of its own, interpreter and imports included, as a person at a terminal waits for it: `reelstep compile` into an empty
cache, once more, and `reelstep sample` of one video with engines in the cache.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from reelstep.benchmarks.harness import Row, parser, report, timing
from reelstep.errors import ReelstepError

PROMPT = "a red heart bounces"


def seconds(*arguments: str) -> float:
    """Of one command. Raises ReelstepError with what it said if it fails."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-P", "-m", "reelstep", *arguments], capture_output=True, text=True, check=False)
    spent = time.perf_counter() - began
    if done.returncode:
        raise ReelstepError(f"reelstep {' '.join(arguments)} failed: {done.stderr.strip()}")
    return spent


def main(argv: Sequence[str]) -> None:
    options = parser("startup", __doc__ or "")
    options.add_argument("--models", nargs="+", default=["reel-tiny", "reel-tiny-flash", "dit-mid"], metavar="MODEL", help="to compile (default: %(default)s)")
    options.add_argument("--rounds", type=int, default=7, help="of what is quick (default: %(default)s)")
    args = options.parse_args(argv)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="reelstep-startup-") as folder:
        cache = str(Path(folder, "cache"))
        for model in args.models:
            bundle = str(Path(folder, f"{model}.reel"))
            compiling = ("compile", model, "-o", bundle, "--cache", cache)
            rows.append(row("compile", model, "empty", [seconds(*compiling)]))
            rows.append(row("compile", model, "warm", [seconds(*compiling) for _ in range(args.rounds)]))
        for quality in ("draft", "standard"):
            sampling = ("sample", str(Path(folder, "reel-tiny.reel")), PROMPT, "-o", str(Path(folder, "video.mp4")), "--quality", quality, "--cache", cache)
            rows.append(row(f"sample, {quality}", "reel-tiny", "warm", [seconds(*sampling) for _ in range(args.rounds)]))
        rows.append(row("python -c 'import torch'", "", "", [imported() for _ in range(args.rounds)]))
    report("from a command to its result", rows, args.seed, args.json)


def imported() -> float:
    """What no command of ours can be quicker than."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-P", "-c", "import torch"], check=True)
    return time.perf_counter() - began


def row(what: str, model: str, cache: str, spent: Sequence[float]) -> Row:
    t = timing(spent)
    return {"command": what, "model": model, "cache": cache, "median_s": t.median_s, "p10_s": t.p10_s, "p90_s": t.p90_s, "rounds": t.rounds}
