"""A BNS solver for one model, NFE and scale: `reelstep fit bns`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from reelstep.engine.models import MODELS
from reelstep.engine.samplers.paths import PATHS
from reelstep.training import bns
from reelstep.training.arguments import positive, whole
from reelstep.training.distributed import start
from reelstep.training.fits import ROWS, Stopwatch, prepare_solver, progress_bar, solver_parser, write_solver
from reelstep.training.half import products
from reelstep.training.trainer import Processes

TEXT = """\
Fit a BNS solver: all times and coefficients of a table of NFE velocities, to one model under one scale.

examples:
  reelstep fit bns reel-tiny --nfe 5 -o bns_5.json
  reelstep compile reel-tiny --fitted bns_5.json       then: reelstep generate "..." --solver bns_5 -o out.mp4
  torchrun --nproc-per-node 2 -m reelstep fit bns reel-tiny --nfe 5 -o bns_5.json       (docs/training.md)
"""


def main(arguments: Sequence[str]) -> None:
    made = solver_parser("bns", TEXT)
    made.add_argument("--iterations", type=whole(1), default=60, metavar="N", help="(%(default)s)")
    made.add_argument("--batch", type=whole(1), default=8, metavar="N", help="pairs of an iteration (%(default)s)")
    made.add_argument("--rate", type=positive, default=0.05, metavar="X", help="of Adam, as a share of the error at the start (%(default)g)")
    made.add_argument("--sigma-0", type=positive, default=1.0, metavar="X", help="deviation of the source it starts in; 5 to 10 for high scales (%(default)g)")
    made.add_argument("--mesh", default="", metavar="AXES", help="with torchrun: processes that hold the model together, as tp=2 or cp=2 (each has it whole)")
    args = made.parse_args(arguments)
    with start(mesh=args.mesh) as processes:
        fit(args, processes)


def fit(args: argparse.Namespace, processes: Processes) -> None:
    options = bns.Options(iterations=args.iterations, batch=args.batch, rows=ROWS, rate=args.rate, validate_every=20, seed=args.seed)
    processes.share(min(args.batch, args.pairs), "pairs of a batch")  # before hours of references
    times = bns.initial_table(args.nfe, PATHS[MODELS[args.model].settings.path], args.sigma_0)
    subject, (train, validation), folder = prepare_solver(args, processes)
    saved = folder / f"bns_{args.nfe}_{args.sigma_0:g}_{args.rate:g}_{args.batch}_{args.iterations}.pt"
    clock = Stopwatch(saved, processes.first)
    initial = bns.solve_rows(times, subject.train, train, ROWS)
    if processes.first:
        print(f"rows solved for, {clock.seconds():.0f} s", flush=True)
    with progress_bar(options.iterations, processes.first) as progress:
        found = bns.fit_bns(initial, (subject.train, train), (subject.validation, validation), options, clock.heard(progress), saved, processes)
    conditions = {
        "initial": "rows solved for one after the other, on equal times of the source", "sigma_0": args.sigma_0, "reference": f"RK45 at {args.tolerance:g}",
        "pairs": args.pairs, "iterations": args.iterations, "best_iteration": found.iteration, "batch": args.batch, "rate": args.rate,
        "seed": args.seed, "dtype": products(), "seconds": round(clock.seconds()), "processes": str(processes), "note": found.note,
    }  # fmt: skip
    write_solver(args, subject, validation, "bns", "BNS", found.solver, found, conditions, processes)
