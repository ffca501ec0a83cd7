"""The parts one after another, each in its own time: one that fails is written down and leaves the others alone."""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from reelstep.benchmarks.gpu_check.bench import FAILED, Bench, Finding, in_a_line

AGAIN_S = 30.0
"""After which a part is told once more that its time is up: what is raised while an object is taken apart is lost."""


@dataclass(frozen=True)
class Part:
    """budget_s: when it is stopped, with what it has found so far. alone: it uses the device in processes of its own."""

    name: str
    budget_s: float
    find: Callable[[Bench], Iterator[Finding]]
    alone: bool = False


class Overran(BaseException):
    """A part's time is up: not for what a part runs to catch, and some of that catches every Exception."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises Overran in what runs inside once its time is up; a call into C is left to return first."""

    def stop(*_: Any) -> None:
        raise Overran(f"stopped after its {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_parts(
    bench: Bench, parts: Sequence[Part], tell: Callable[[str], None] = print, keep: Callable[[list[dict[str, Any]]], None] = lambda rows: None
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of all parts. What a part raises becomes its last row, and the next part runs, unless the device is lost to this process: then those alone that
    have processes of their own. keep: gets the rows so far after each.
    """
    rows: list[dict[str, Any]] = []
    lost = ""

    def add(part: Part, finding: Finding) -> None:
        rows.append({"part": part.name, **asdict(finding)})
        keep(rows)

    for part in parts:
        began = time.perf_counter()
        if lost and not part.alone:
            add(part, Finding(FAILED, note=f"not run: {lost}"))
            continue
        try:
            with at_most(part.budget_s), torch.inference_mode():
                for finding in part.find(bench):
                    add(part, finding)
        except (Exception, Overran) as error:  # noqa: BLE001  # whatever it is, it is written down, and the other parts run
            add(part, Finding(FAILED, note=in_a_line(error)))
        gc.collect()
        if not lost and (why := fault(bench)):
            lost = f"the device was lost in part {part.name!r}: {why}"
        tell(f"{part.name}: {time.perf_counter() - began:.1f} s")
    return rows


def fault(bench: Bench) -> str:
    """Why this process can use its device no more, after an access that the device refused; empty if it can."""
    if bench.device.type != "cuda":
        return ""
    try:
        torch.cuda.synchronize(bench.device)
        torch.cuda.empty_cache()
    except RuntimeError as error:
        return in_a_line(error)
    return ""


def wrong(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was computed wrongly."""
    return [f"{row['part']}: {row['what']}" for row in rows if row["right"] is False]


def unfinished(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Parts of which something failed, so that not all of what they check is known to be right."""
    return list(dict.fromkeys(row["part"] for row in rows if row["what"].endswith(FAILED) and row["right"] is None))
