"""The options with which a step cache skips a wanted share of a model's evaluations: `reelstep fit step-cache`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from reelstep.compiler.program import Program
from reelstep.engine.models import MODELS
from reelstep.engine.samplers.convert import TO_VELOCITY
from reelstep.engine.samplers.guidance import GUIDANCE
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.step_cache import STEP_CACHES, CacheOptions, Edges
from reelstep.engine.served import build_table
from reelstep.errors import ConfigError
from reelstep.training.fits import ROWS, guidance_parser, prepare_guidance, write
from reelstep.training.model_field import ModelFields, run_program
from reelstep.training.step_cache import Calibration, Split, built, calibrate

TEXT = """\
Calibrate a step cache for a model: from paths that run whole, the polynomial of TeaCache and the threshold that skips a wanted share of the
network's evaluations. Then try it on other prompts against no cache, beside the same solver with fewer steps.

examples:
  reelstep fit step-cache reel-tiny --rule teacache --skip 0.3 -o teacache.json
  reelstep compile reel-tiny --step-cache --fitted teacache.json    then: reelstep generate "..." --step-cache teacache -o out.mp4
"""


def main(arguments: Sequence[str]) -> None:
    made = guidance_parser("step-cache", TEXT)
    made.add_argument("--rule", choices=STEP_CACHES, default="teacache", help="(%(default)s)")
    made.add_argument("--skip", type=float, default=0.3, metavar="X", help="share of the evaluations (%(default)g)")
    args = made.parse_args(arguments)
    spec = MODELS[args.model]
    if spec.pieces is None:
        raise ConfigError(f"model {spec.name!r} does not come in the pieces that a step cache needs; there is nothing to calibrate")
    subject, table = prepare_guidance(args, "cfg")
    wanted = subject.fit
    steps = max(1, round(wanted.steps * (1 - args.skip)))
    fewer = build_table(spec.settings, wanted.solver, wanted.schedule, steps)
    programs = {program.name: program for program in spec.pieces(subject.module)}
    train, validation = (partial(split, fields, {**fields.programs, **programs}) for fields in (subject.train, subject.validation))
    guidance = GUIDANCE["cfg"].build(wanted.scale, PATHS[spec.settings.path], {})
    began = time.monotonic()
    found = calibrate(
        args.rule, args.skip, table, fewer, guidance, (train, subject.noises[0]), (validation, subject.noises[1]), ROWS,
        lambda what, done, of: print(f"{what}: {done} of {of}", flush=True),
    )  # fmt: skip
    rival = f"{wanted.solver}, {steps} steps"
    conditions = {
        "skip": args.skip, "expected": found.expected, "skipped": found.cached, "r2": found.r2, "pairs": args.pairs, "seed": args.seed,
        "seconds": round(time.monotonic() - began),
    }  # fmt: skip
    scores = {args.rule: found.score_db, rival: found.fewer_db}
    write(args.out, subject.artifact("step-cache", CacheOptions(args.rule, found.options), args.rule, conditions, scores))
    plot(args.out.with_suffix(".png"), found, table.n)
    print(f"{args.rule:>28}  {found.cached:.1%} skipped on other prompts, {found.score_db:.2f} dB to no cache")
    print(f"{rival:>28}  {found.fewer_db:.2f} dB to the same")
    print(f"{args.out}  threshold {found.options['threshold']:.4g}, r2 {found.r2:.3f}")


def split(fields: ModelFields, programs: Mapping[str, Program], index: Tensor) -> Split:
    """The model in pieces, with the prompts at `index` [B]."""
    settings = fields.spec.settings

    def inputs(x: Tensor, t: float, branch: str) -> Edges:
        return fields.inputs(index, x, t, (branch,))

    def run(name: str, edges: Edges) -> Edges:
        return run_program(programs[name], edges)

    return Split(inputs, run, lambda output, x, t: TO_VELOCITY[settings.prediction](output, x, t, PATHS[settings.path]))


def plot(path: Path, found: Calibration, evaluations: int) -> None:
    """Change of the residual over that of the signal, from each evaluation to the next, and what the rule takes it for."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    signals, residuals = zip(*found.pairs, strict=True)
    axes.scatter(signals, residuals, s=4, alpha=0.4)
    grow = built(found.rule, evaluations, found.options).grow
    changes = [max(signals) * k / 200 for k in range(201)]
    axes.plot(changes, [grow(0.0, change) for change in changes], color="C1", label=f"as {found.rule} takes it, r2 {found.r2:.3f}")
    axes.axhline(found.options["threshold"], color="C2", label=f"threshold {found.options['threshold']:.4g}")
    axes.set_xlabel("relative change of the signal")
    axes.set_ylabel("relative change of the residual")
    axes.legend()
    figure.savefig(path, dpi=120)
