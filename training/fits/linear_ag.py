"""LinearAG for one model, solver and scale: `reelstep fit linear-ag`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from reelstep.engine.samplers.guidance import GUIDANCE
from reelstep.engine.samplers.linear_ag import LinearAG
from reelstep.engine.samplers.paths import PATHS
from reelstep.training.adaptive_guidance import nearest_stop
from reelstep.training.field import ends_under, score_db
from reelstep.training.fits import ROWS, guidance_parser, prepare_guidance, write
from reelstep.training.linear_ag import fit_linear_ag

TEXT = """\
Fit LinearAG: at most evaluations the null branch is estimated from what the network gave before. Then try it on other prompts against
full guidance, beside a held difference and a plain interval of the same forwards.

examples:
  reelstep fit linear-ag reel-tiny --solver euler --steps 16 -o linear_ag_16.json
"""


def main(arguments: Sequence[str]) -> None:
    made = guidance_parser("linear-ag", TEXT)
    made.add_argument("--policy", metavar="CLCL...", help="C computes, L estimates; a letter for each velocity (the paper's: 1.25 forwards each)")
    made.add_argument("--ridge", type=float, default=1e-5, metavar="X", help="against coefficients that amplify rounding (%(default)g)")
    args = made.parse_args(arguments)
    name = args.out.stem
    subject, table = prepare_guidance(args, name)
    began = time.monotonic()
    fitted = fit_linear_ag(
        subject.train.network, table, subject.fit.scale, subject.noises[0], args.policy, args.ridge, ROWS,
        lambda done, of: print(f"paths: {done} of {of}", flush=True),
    )  # fmt: skip
    seconds = time.monotonic() - began
    path = PATHS[table.path]
    stop = nearest_stop(table, fitted.forwards - table.n)
    rules = {name: fitted.rule(), **{other: GUIDANCE[other].build(subject.fit.scale, path, {"stop": stop}) for other in ("delta_hold", "interval")}}
    validation = partial(ends_under, subject.validation.network, table, noises=subject.noises[1], rows=ROWS)
    truth, _ = validation(GUIDANCE["cfg"].build(subject.fit.scale, path, {}))
    scores = {other: float(score_db(validation(rule)[0], truth).mean()) for other, rule in rules.items()}
    conditions = {"forwards": fitted.forwards, "stop_of_the_others": stop, "pairs": args.pairs, "seed": args.seed, "seconds": round(seconds)}
    write(args.out, subject.artifact("linear_ag", fitted, name, conditions, scores))
    plot(args.out.with_suffix(".png"), fitted)
    for other, db in scores.items():
        print(f"{other:>28}  {db:6.2f} dB to full guidance")
    print(f"{args.out}  {fitted.forwards} forwards of {2 * table.n}, largest coefficient {fitted.largest:.2f}, least r2 {min(fitted.r2):.4f}")


def plot(path: Path, fitted: LinearAG) -> None:
    """What the estimate leaves unexplained at each evaluation."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(range(1, len(fitted.r2)), [max(1 - r, 1e-9) for r in fitted.r2[1:]], marker=".")
    axes.set_xlabel("evaluation")
    axes.set_ylabel("share of the null velocity unexplained")
    figure.savefig(path, dpi=120)
