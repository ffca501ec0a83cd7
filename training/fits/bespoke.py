"""A Bespoke solver for one model, NFE and scale: `reelstep fit bespoke`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from reelstep.engine.models import MODELS
from reelstep.errors import ConfigError
from reelstep.training import bespoke
from reelstep.training.arguments import positive, whole
from reelstep.training.fits import ROWS, Stopwatch, prepare_solver, progress_bar, solver_parser, write_solver
from reelstep.training.half import products

TEXT = """\
Fit a Bespoke solver: midpoint (rk2) or Euler (rk1) in coordinates of time and scale, fitted to one model under one scale.
It needs no gradient through a whole run, so it is cheaper to fit than BNS, and less able.

examples:
  reelstep fit bespoke reel-tiny --nfe 8 -o bespoke_8.json
"""


def main(arguments: Sequence[str]) -> None:
    made = solver_parser("bespoke", TEXT)
    made.add_argument("--kind", choices=bespoke.KINDS, default="rk2", help="base solver: rk2 has half as many steps as NFE (%(default)s)")
    made.add_argument("--iterations", type=whole(1), default=240, metavar="N", help="(%(default)s)")
    made.add_argument("--rate", type=positive, default=5e-2, metavar="X", help="of Adam (%(default)g)")
    args = made.parse_args(arguments)
    each = bespoke.KINDS[args.kind]
    if args.nfe < each or args.nfe % each:
        raise ConfigError(f"--nfe {args.nfe} with {args.kind}, which spends {each} velocities a step; a multiple of {each}, or the other kind")
    options = bespoke.Options(args.kind, args.nfe // each, iterations=args.iterations, rate=args.rate, validate_every=20, rows=ROWS, seed=args.seed)
    bespoke.Bespoke.base(options.kind, options.steps).table(MODELS[args.model].settings.path)
    subject, (train, validation), folder = prepare_solver(args)
    assert train.between is not None
    saved = folder / f"bespoke_{args.kind}_{args.nfe}_{args.rate:g}_{args.iterations}.pt"
    clock, paths = Stopwatch(saved), []
    for index in torch.arange(args.pairs).split(ROWS):
        paths.append(bespoke.Paths.of(subject.train(index), train.between[:, index]))
        print(f"reference paths: {int(index[-1]) + 1} of {args.pairs}", flush=True)
    with progress_bar(options.iterations) as progress:
        fit = bespoke.fit_bespoke(paths, (subject.validation, validation), options, clock.heard(progress), saved)
    conditions = {
        **fit.solver.to_json(), "lipschitz": options.lipschitz, "reference": f"RK45 at {args.tolerance:g}", "pairs": args.pairs,
        "iterations": args.iterations, "best_iteration": fit.iteration, "rate": args.rate, "seed": args.seed, "dtype": products(),
        "seconds": round(clock.seconds()), "note": fit.note,
    }  # fmt: skip
    table = fit.solver.table(subject.spec.settings.path)
    write_solver(args, subject, validation, f"bespoke_{args.kind}", f"Bespoke {args.kind}", table, fit, conditions)
