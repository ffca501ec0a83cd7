"""Does an NVIDIA GPU compute what the formulas say, and how near does it come to what it can do?

Correctness of every kernel; the rates of a copy and of a matrix product as measured, and each kernel's, attention's, a block's and a rank's share of them
at Movie Gen 30B's shapes; reel-tiny from words to video beside the CPU. Nothing is installed and nothing is fetched; each part has its own time, and one
that fails is written down and leaves the others alone. Exit code 1: something was computed wrongly; 2: there is no GPU; 3: not all was checked.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

from reelstep.benchmarks.gpu_check.bench import LARGE, Bench
from reelstep.benchmarks.gpu_check.parts import PARTS
from reelstep.benchmarks.gpu_check.running import run_parts, unfinished, wrong
from reelstep.benchmarks.harness import conditions, parser, save, show


def device_conditions() -> dict[str, Any]:
    """Of the GPU and what drives it."""
    found = torch.cuda.get_device_properties(0)
    packages = {name: _version(name) for name in ("triton", "tensorrt", "torch_tensorrt", "flash_attn_interface")}
    return {
        "gpu": found.name, "compute_capability": f"{found.major}.{found.minor}", "multiprocessors": found.multi_processor_count,
        "memory_gb": found.total_memory / 1e9, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "packages": packages,
    }  # fmt: skip


def _version(module: str) -> str:
    try:
        return version(module)
    except PackageNotFoundError:
        return "of unknown version" if find_spec(module) else "absent"


def main(argv: Sequence[str]) -> None:
    options = parser("gpu_check", __doc__ or "")
    options.add_argument("--parts", nargs="+", metavar="PART", choices=[part.name for part in PARTS], help="only these (default: all)")
    args = options.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"gpu_check: torch {torch.__version__} sees no NVIDIA GPU, so there is nothing to check; run it on a machine with one", file=sys.stderr)
        raise SystemExit(2)
    device = torch.device("cuda", 0)
    parts = [part for part in PARTS if args.parts is None or part.name in args.parts]

    def keep(rows: list[dict[str, Any]]) -> None:
        if args.json is not None:
            command = " ".join(["python -P -m reelstep.benchmarks.gpu_check", *argv])
            save("gpu_check", rows, {**conditions(args.seed), **device_conditions(), "command": command}, args.json)

    rows = run_parts(Bench(device, LARGE), parts, keep=keep)
    show("gpu_check", rows, width=190)
    if args.json is not None:
        print(f"wrote {args.json}")
    if found := wrong(rows):
        print(f"gpu_check: {len(found)} wrong: {'; '.join(found)}", file=sys.stderr)
        raise SystemExit(1)
    if ended := unfinished(rows):
        print(f"gpu_check: nothing was found wrong, but not all was checked; these parts failed: {', '.join(ended)}", file=sys.stderr)
        raise SystemExit(3)


if __name__ == "__main__":
    main(sys.argv[1:])
