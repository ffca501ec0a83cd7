"""What the benchmarks share: conditions, interleaved timing, tables, JSON."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from reelstep.compiler.skus import SKUS

Row = Mapping[str, Any]
K = TypeVar("K")


def parser(name: str, question: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(prog=f"reelstep bench {name}", description=question, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="write conditions and rows here")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--cache", type=Path, default=Path(".cache/reelstep"), help="compiled engines (default: %(default)s)")
    return made


def commit() -> str:
    """The commit of the checkout that this file lies in, with + for local changes; "none" outside one."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
        dirty = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return head + ("+" if dirty else "")


def command(arguments: Sequence[str]) -> str:
    """What to type to measure again, without where engines are cached: that is of one machine."""
    cache = arguments.index("--cache") if "--cache" in arguments else len(arguments)
    return " ".join(["reelstep", *arguments[:cache], *arguments[cache + 2 :]])


def conditions(seed: int) -> dict[str, Any]:
    """Machine, SKU, versions, commit, load."""
    versions: dict[str, str] = {}
    for package in ("reelstep", "torch", "openvino", "numpy", "grpcio"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    sku = SKUS["cpu"]
    return {
        "sku": sku.name, "machine": sku.model, "arch": sku.arch, "cores": sku.units, "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(), "versions": versions, "commit": commit(), "seed": seed,
        "load_1min": round(os.getloadavg()[0], 2), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command(sys.argv[1:]),
    }  # fmt: skip


def report(name: str, rows: Sequence[Row], seed: int, path: Path | None, extra: Mapping[str, Any] | None = None) -> None:
    """Print a table; write it with the conditions where a path is given."""
    show(name, rows)
    if path is not None:
        write(name, rows, conditions(seed), path, extra)


def show(name: str, rows: Sequence[Row], width: int = 160) -> None:
    """A table of rows; words stand at the left."""
    table = Table(title=name)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column, justify="left" if isinstance(rows[0].get(column), str) else "right")
    for row in rows:
        table.add_row(*(shown(row.get(column, "")) for column in columns))
    Console(width=width).print(table)


def write(name: str, rows: Sequence[Row], about: Mapping[str, Any], path: Path, extra: Mapping[str, Any] | None = None) -> None:
    """`save`, and say so."""
    save(name, rows, about, path, extra)
    print(f"wrote {path}")


def save(name: str, rows: Sequence[Row], about: Mapping[str, Any], path: Path, extra: Mapping[str, Any] | None = None) -> None:
    """{"benchmark", "conditions", "rows", ...} as JSON, which has neither infinity nor NaN: in a row they are written as text."""
    plain = [{k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": name, "conditions": about, **(extra or {}), "rows": plain}, indent=1) + "\n")


def shown(value: object) -> str:
    """A number in four significant digits; nothing for None; anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


@dataclass(frozen=True)
class Timing:
    """Seconds of one contender over the rounds."""

    median_s: float
    p10_s: float
    p90_s: float
    rounds: int


SETTLED_S = 0.02
"""Longer than OpenMP's threads look for work, awake, after a call."""


def interleave(contenders: Mapping[K, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[K, Timing]:
    """Time each contender once per round, so that a machine that slows down slows them all.

    Every round has an order of its own (seeded): a contender leaves caches and clocks to the one after it, and no one shall always have the same neighbour.
    Before each is a pause, in which threads of the last one go to sleep: on two cores one that spins takes half of what the next one has.
    """
    for run in contenders.values():
        for _ in range(warmup):
            run()
    seconds: dict[K, list[float]] = {name: [] for name in contenders}
    shuffler = random.Random(0)
    for _ in range(rounds):
        for name in shuffler.sample(list(contenders), len(contenders)):
            time.sleep(SETTLED_S)
            began = time.perf_counter()
            contenders[name]()
            seconds[name].append(time.perf_counter() - began)
    return {name: timing(values) for name, values in seconds.items()}


def timing(seconds: Sequence[float]) -> Timing:
    """Median and spread."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return Timing(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], len(ordered))
