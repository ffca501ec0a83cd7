"""The threshold at which Adaptive Guidance lets go of a model's null branch: `reelstep fit adaptive-guidance`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reelstep.engine.samplers.fitted import RuleOptions
from reelstep.engine.samplers.paths import PATHS
from reelstep.training.adaptive_guidance import COMPARED, Calibration, calibrate
from reelstep.training.fits import ROWS, guidance_parser, prepare_guidance, write

TEXT = """\
Calibrate Adaptive Guidance for a model: the threshold is what the cosine of its branches reaches, on average, after a share of the evaluations.
Then try it on other prompts against full guidance, beside a plain interval of the same cost.

examples:
  reelstep fit adaptive-guidance reel-tiny -o adaptive.json
  reelstep compile reel-tiny --fitted adaptive.json    then: reelstep generate "..." --guidance adaptive -o out.mp4
"""


def main(arguments: Sequence[str]) -> None:
    made = guidance_parser("adaptive-guidance", TEXT)
    made.add_argument("--rule", choices=COMPARED, default="adaptive", help="adaptive compares velocities, adaptive_x1 predicted data (%(default)s)")
    made.add_argument("--share", type=float, default=0.5, metavar="X", help="of the evaluations that are guided, on average (%(default)g)")
    args = made.parse_args(arguments)
    subject, table = prepare_guidance(args, args.rule)
    path = PATHS[subject.spec.settings.path]
    validation = (subject.validation.network, subject.noises[1])
    found = calibrate(
        subject.train.network, table, args.rule, path, subject.fit.scale, subject.noises[0], args.share, held_out=validation, rows=ROWS,
        progress=lambda what, done, of: print(f"{what}: {done} of {of}", flush=True),
    )  # fmt: skip
    # Pooled: samples left at full guidance would each add infinitely many dB to a mean.
    scores = {args.rule: found.adaptive.pooled_db, "interval": found.interval.pooled_db}
    conditions = {**found.to_json(), "pairs": args.pairs, "seed": args.seed}
    write(args.out, subject.artifact("adaptive-guidance", RuleOptions(args.rule, found.options), args.rule, conditions, scores))
    plot(args.out.with_suffix(".png"), found)
    for name, trial in ((args.rule, found.adaptive), (f"interval to t = {found.stop:.3g}", found.interval)):
        print(f"{name:>28}  {trial.forwards:5.1f} forwards of {2 * table.n}, {trial.score_db:.2f} dB, pooled {trial.pooled_db:.2f} dB")
    print(f"{args.out}  threshold {found.threshold:.6f}, at least {found.guided} evaluations guided")


def plot(path: Path, found: Calibration) -> None:
    """The cosine of every path over the evaluations, and the threshold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for row in found.cosines:
        axes.plot(row, color="C0", alpha=0.3, linewidth=0.8)
    axes.axhline(found.threshold, color="C1", label=f"threshold {found.threshold:.4f}")
    axes.set_xlabel("evaluation")
    axes.set_ylabel("cosine of the branches")
    axes.legend()
    figure.savefig(path, dpi=120)
