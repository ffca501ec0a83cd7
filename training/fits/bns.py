"""`reelstep fit bns`: a BNS solver for one model, NFE and scale."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from reelstep.engine.models import MODELS
from reelstep.engine.samplers.fitted import Fitted
from reelstep.engine.samplers.paths import PATHS
from reelstep.training import bns
from reelstep.training.fits import ROWS, baselines, parser, prepare, score, write

TEXT = """\
Fit a BNS solver: all times and coefficients of a table of NFE velocities, to one model under one scale.

examples:
  reelstep fit bns reel-tiny --nfe 8 -o bns_8.json
  reelstep compile reel-tiny --fitted bns_8.json       then: reelstep generate "..." --solver bns_8 -o out.mp4
"""


def main(arguments: Sequence[str]) -> None:
    made = parser("bns", TEXT)
    made.add_argument("--nfe", type=int, required=True, metavar="N", help="velocities of one sample; each is two forwards under guidance")
    made.add_argument("--iterations", type=int, default=200, metavar="N", help="(%(default)s)")
    made.add_argument("--batch", type=int, default=16, metavar="N", help="pairs of an iteration (%(default)s)")
    made.add_argument("--rate", type=float, default=3e-3, metavar="X", help="of Adam (%(default)g)")
    made.add_argument("--sigma-0", type=float, default=1.0, metavar="X", help="deviation of the source it starts in; 5 to 10 for high scales (%(default)g)")
    args = made.parse_args(arguments)
    options = bns.Options(iterations=args.iterations, batch=args.batch, rows=ROWS, rate=args.rate, validate_every=10, seed=args.seed)
    initial = bns.initial_table(args.nfe, PATHS[MODELS[args.model].settings.path], args.sigma_0)
    subject = prepare(args, args.nfe)
    saved = subject.folder / f"bns_{args.nfe}_{args.sigma_0:g}_{args.rate:g}_{args.batch}_{args.iterations}.pt"
    began = time.monotonic()
    with Progress(TextColumn("loss {task.fields[loss]:.3f}, best {task.fields[best]:.2f} dB"), BarColumn(), TimeRemainingColumn(), console=Console()) as bar:
        task = bar.add_task("", total=options.iterations, loss=0.0, best=0.0)
        fit = bns.fit_bns(
            initial, subject.train, subject.validation, options, lambda done, loss, best: bar.update(task, completed=done, loss=loss, best=best), saved
        )
    seconds = time.monotonic() - began
    name = args.out.stem
    scores = {name: fit.best_db, "start": fit.start_db, **baselines(subject, args.nfe)}
    conditions = {
        "initial": initial.name, "sigma_0": args.sigma_0, "reference": f"RK45 at {args.tolerance:g}", "pairs": len(subject.train[1].noise),
        "validation_pairs": len(subject.validation[1].noise), "iterations": args.iterations, "best_iteration": fit.iteration, "batch": args.batch,
        "rate": args.rate, "seed": args.seed, "dtype": "float32", "seconds": round(seconds), "note": fit.note,
    }  # fmt: skip
    write(args.out, Fitted(name, "bns", subject.spec.name, subject.model_hash, subject.fit, fit.table, conditions, scores).to_json())
    plot(args.out.with_suffix(".png"), fit, scores)
    assert score(subject, fit.table) == fit.best_db, "what was written scores what is claimed"
    for other, db in sorted(scores.items(), key=lambda item: -item[1])[:6]:
        print(f"{other:>28}  {db:6.2f} dB")
    print(f"{args.out}  {args.nfe} NFE at scale {subject.fit.scale:g}, {seconds:.0f} s{'; ' + fit.note if fit.note else ''}")


def plot(path: Path, fit: bns.Fit, scores: dict[str, float]) -> None:
    """Validation over iterations, with the best training-free solvers as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*fit.history, strict=True), marker=".", label="BNS")
    axes.axhline(fit.best_db, color="C0", linestyle=":", label=f"best, {fit.best_db:.1f} dB")
    plain = sorted(((db, name) for name, db in scores.items() if "." in name), reverse=True)[:3]
    for k, (db, name) in enumerate(plain):
        axes.axhline(db, color=f"C{k + 1}", label=f"{name}, {db:.1f} dB")
    axes.set_xlabel("iteration")
    axes.set_ylabel("dB to the reference solution, validation")
    axes.set_title(f"{fit.table.n} NFE")
    axes.legend()
    figure.savefig(path, dpi=120)
