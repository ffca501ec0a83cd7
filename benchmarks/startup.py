"""How long until the first result, and until a model is compiled, with nothing in the cache and with everything there?

Each number is of a command in a process of its own, interpreter and imports included, as a person at a terminal waits for it: `reelstep compile` into an empty
cache, and, in interleaved rounds, once more and `reelstep sample` of one video with engines in the cache.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from reelstep.benchmarks.harness import interleave, parser, report
from reelstep.engine.models import MODELS
from reelstep.errors import ReelstepError

COMPILED = ("reel-tiny", "reel-tiny-flash", "dit-mid")
PROMPT = "a red heart bounces"
IMPORT = "import os, torch; os._exit(0)"
"""What no command of ours can be quicker than: it ends at once, as they do, since to take apart what was imported takes half as long again."""


def python(*arguments: str) -> None:
    """One command. Raises ReelstepError with what it said if it fails."""
    done = subprocess.run([sys.executable, "-P", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReelstepError(f"python {' '.join(arguments)} failed: {done.stderr.strip()}")


reelstep = partial(python, "-m", "reelstep")


def main(argv: Sequence[str]) -> None:
    options = parser("startup", __doc__ or "")
    options.add_argument("--models", nargs="+", choices=tuple(MODELS), default=COMPILED, metavar="MODEL", help="to compile (default: %(default)s)")
    options.add_argument("--rounds", type=int, default=10, help="of what is quick (default: %(default)s)")
    args = options.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="reelstep-startup-") as folder:
        cache, video = str(Path(folder, "cache")), str(Path(folder, "video.mp4"))
        bundles = {model: str(Path(folder, f"{model}.reel")) for model in ("reel-tiny", *args.models)}
        compiles = {model: partial(reelstep, "compile", model, "-o", bundle, "--cache", cache) for model, bundle in bundles.items()}
        samples = {
            quality: partial(reelstep, "sample", bundles["reel-tiny"], PROMPT, "-o", video, "--quality", quality, "--cache", cache)
            for quality in ("draft", "standard")
        }
        empty = interleave({("compile", model, "empty"): run for model, run in compiles.items()}, rounds=1, warmup=0)
        again: dict[tuple[str, str, str], Callable[[], None]] = {
            **{("compile", model, "warm"): run for model, run in compiles.items()},
            **{(f"sample, {quality}", "reel-tiny", "warm"): run for quality, run in samples.items()},
            (f"python -c '{IMPORT}'", "", ""): partial(python, "-c", IMPORT),
        }
        timings = empty | interleave(again, args.rounds, warmup=1)
    rows = [
        {"command": command, "model": model, "cache": state, "median_s": t.median_s, "p10_s": t.p10_s, "p90_s": t.p90_s, "rounds": t.rounds}
        for (command, model, state), t in timings.items()
    ]
    report("from a command to its result", rows, args.seed, args.json)
