"""At which evaluations a model needs guidance, and at which scale, within a budget of forwards: `reelstep fit policy`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from torch import Tensor

from reelstep.engine.samplers.guidance import GUIDANCE
from reelstep.engine.samplers.guidance_policy import GuidancePolicy
from reelstep.engine.samplers.ns import Table
from reelstep.engine.samplers.paths import PATHS
from reelstep.errors import ConfigError
from reelstep.training.adaptive_guidance import Trial, attempt, choose_threshold, nearest_stop, record
from reelstep.training.arguments import positive, whole
from reelstep.training.field import Pairs
from reelstep.training.fits import ROWS, Stopwatch, Subject, guidance_parser, prepare_guidance, write
from reelstep.training.policy_search import Found, Options, check_budget, search

TEXT = """\
Search a policy of guidance: at each velocity the null branch alone, the prompt's alone, or both at one of a few scales, so that a run within a
budget of forwards ends near full guidance. Then try it on other prompts, beside Adaptive Guidance and a plain interval of the same forwards.

examples:
  reelstep fit policy reel-tiny --task text_to_image --steps 8 --forwards 12 -o policy_12.json
  reelstep compile reel-tiny --fitted policy_12.json   then: reelstep generate "..." --guidance policy_12 -o out.png
"""


def main(arguments: Sequence[str]) -> None:
    made = guidance_parser("policy", TEXT)
    made.add_argument("--forwards", type=whole(1), metavar="N", help="budget of a run (three quarters of full guidance's)")
    made.add_argument("--multiples", type=float, nargs="+", default=[0.5, 1.0, 2.0], metavar="X", help="of the scale, to choose from (0.5 1 2)")
    made.add_argument("--iterations", type=whole(1), default=60, metavar="N", help="(%(default)s)")
    made.add_argument("--batch", type=whole(1), default=8, metavar="N", help="pairs of an iteration (%(default)s)")
    made.add_argument("--rate", type=positive, default=0.2, metavar="X", help="of Adam (%(default)g)")
    made.add_argument("--trials", type=whole(0), default=16, metavar="N", help="neighbours of the policy that are tried in the end (%(default)s)")
    made.add_argument("--cache", type=Path, default=Path(".cache/reelstep/fits"), metavar="DIR", help="state to resume from (%(default)s)")
    args = made.parse_args(arguments)
    options = Options(tuple(args.multiples), args.iterations, args.batch, ROWS, args.rate, args.trials, seed=args.seed)
    name = args.out.stem
    if name in GUIDANCE:
        raise ConfigError(f"{args.out} would make guidance {name!r}, which is there already; write to a file of another name")
    subject, table = prepare_guidance(args, name)
    budget = 3 * table.n // 2 if args.forwards is None else args.forwards
    check_budget(table, budget)
    asked = [subject.model_hash, table.hash, subject.fit.scale, args.task, *subject.prompts, budget, asdict(options), *subject.train.identity]
    saved = args.cache / f"policy_{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]}.pt"
    clock = Stopwatch(saved)
    cosines, ends = record(subject.train.network, table, "adaptive", PATHS[table.path], subject.fit.scale, subject.noises[0], ROWS, report)
    found = search(
        subject.train.network, table, subject.fit.scale, Pairs(subject.noises[0], ends), budget, options,
        clock.heard(lambda what, done, of, missed: report(f"{what}, {missed:.4f} missed", done, of)), saved,
    )  # fmt: skip
    seconds = clock.seconds()
    trials, rivals = compare(subject, table, found.policy, name, cosines)
    conditions = {
        "forwards": found.policy.forwards, "budget": budget, "missed": found.missed,
        "trials": {each: asdict(trial) for each, trial in trials.items()}, "rivals": rivals,
        "likeliest": found.likeliest.scales, "options": found.scales, "probabilities": found.probabilities, "losses": found.losses,
        "pairs": args.pairs, "iterations": args.iterations, "batch": args.batch, "rate": args.rate, "trials_of_neighbours": args.trials,
        "seed": args.seed, "dtype": "float32", "seconds": round(seconds), "note": found.note,
    }  # fmt: skip
    # Pooled: Adaptive Guidance leaves some samples at full guidance, each of which would add infinitely many dB to a mean.
    scores = {each: trial.pooled_db for each, trial in trials.items()}
    write(args.out, subject.artifact("policy", found.policy, name, conditions, scores))
    plot(args.out.with_suffix(".png"), f"{found.policy.forwards} forwards of {2 * table.n}, scale {subject.fit.scale:g}", found)
    for each, trial in trials.items():
        print(f"{each:>28}  {trial.forwards:5.1f} forwards of {2 * table.n}, {trial.score_db:.2f} dB, pooled {trial.pooled_db:.2f} dB")
    scales = " ".join(f"{s:g}" for s in found.policy.scales)
    print(f"{args.out}  scales {scales}, {seconds:.0f} s{'; ' + found.note if found.note else ''}")


def report(what: str, done: int, of: int) -> None:
    print(f"{what}: {done} of {of}", flush=True)


def compare(subject: Subject, table: Table, policy: GuidancePolicy, name: str, cosines: Tensor) -> tuple[dict[str, Trial], dict[str, float]]:
    """The policy and two plain rules of its forwards on the validation samples, and the options of these. cosines [P, n]: of the pairs to fit."""
    path, networks, noises, scale = PATHS[table.path], subject.validation.network, subject.noises[1], subject.fit.scale
    guided = policy.forwards - table.n
    threshold, _ = choose_threshold(cosines, 1, guided)
    stop = nearest_stop(table, guided)
    _, ends = record(networks, table, "adaptive", path, scale, noises, ROWS, report)
    trials = {
        each: attempt(networks, table, rule, noises, ends, rows, partial(report, each))
        for each, rule, rows in (
            (name, policy.rule(), ROWS),
            ("adaptive", GUIDANCE["adaptive"].build(scale, path, {"threshold": threshold}), 1),  # each path latches alone
            ("interval", GUIDANCE["interval"].build(scale, path, {"stop": stop}), ROWS),
        )
    }
    return trials, {"threshold": threshold, "stop": stop}


def plot(path: Path, title: str, found: Found) -> None:
    """The probabilities of the options over the evaluations, stacked; above them what the policy takes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    evaluations = list(range(len(found.probabilities)))
    labels = [{0.0: "null", 1.0: "text"}.get(s, f"CFG {s:g}") for s in found.scales]
    axes.stackplot(evaluations, list(zip(*found.probabilities, strict=True)), labels=labels, colors=[f"C{k}" for k in range(len(labels))])
    axes.scatter(evaluations, [1.05] * len(evaluations), c=[f"C{found.scales.index(s)}" for s in found.policy.scales], label="taken")
    axes.set_xlabel("evaluation")
    axes.set_ylabel("probability")
    axes.set_title(title)
    figure.legend(loc="outside right center")
    figure.savefig(path, dpi=120)
