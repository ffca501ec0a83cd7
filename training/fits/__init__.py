"""The commands behind `reelstep fit`: each makes one kind of artifact for a model, and a plot beside it."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from reelstep.compiler.storage import check_folder, replace_file
from reelstep.engine.models import MODELS
from reelstep.engine.models.spec import ModelSpec, hash_weights
from reelstep.engine.request import Defaults, Fit
from reelstep.engine.samplers.fitted import Artifact, Fitted
from reelstep.engine.samplers.guidance import GUIDANCE
from reelstep.engine.samplers.ns import Table
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.tables import SOLVERS
from reelstep.engine.served import build_table
from reelstep.errors import ConfigError, ReelstepError, UnsupportedRequest
from reelstep.registry import Registry
from reelstep.training import checkpoint, field
from reelstep.training.arguments import positive, whole
from reelstep.training.field import Pairs, solve, validate
from reelstep.training.model_field import TASKS, ModelFields, split_over
from reelstep.training.trainer import ALONE, Processes

FITS: Registry[Callable[[Sequence[str]], None]] = Registry(
    "fit",
    {
        "bns": "reelstep.training.fits.bns:main",
        "bespoke": "reelstep.training.fits.bespoke:main",
        "adaptive-guidance": "reelstep.training.fits.adaptive_guidance:main",
        "linear-ag": "reelstep.training.fits.linear_ag:main",
        "policy": "reelstep.training.fits.policy:main",
        "step-cache": "reelstep.training.fits.step_cache:main",
    },
)
"""Entry point of each: it takes the command line after its name."""

PROMPTS: Registry[Callable[[int, int], list[str]]] = Registry("prompts of model", {"reel-tiny": "reelstep.training.zoo.stickers:prompts"})
"""(count, seed) -> prompts of the kind a model was trained for."""

P = ParamSpec("P")

ROWS = 4  # samples of one forward and backward
POINTS = 33  # of a stored reference path
LINES = 20  # of progress, where there is no bar
VALIDATION_SEED = 1 << 20


def parser(name: str, text: str) -> argparse.ArgumentParser:
    """The options that every fit has."""
    made = argparse.ArgumentParser(prog=f"reelstep fit {name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", metavar="MODEL", help="a model's name; a wrong one prints those there are")
    made.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="artifact to write (.json); a plot goes beside it (.png)")
    made.add_argument("--task", default="text_to_video", choices=TASKS, help="what it is for (%(default)s)")
    made.add_argument("--scale", type=float, metavar="S", help="guidance scale (the task's default)")
    made.add_argument("--prompts", type=Path, metavar="FILE", help="one a line, half to fit and half to validate (the model's own kind)")
    made.add_argument("--pairs", type=int, default=32, metavar="N", help="samples to fit to, and as many to validate (%(default)s)")
    made.add_argument("--seed", type=whole(0), default=0)
    return made


def solver_parser(name: str, text: str) -> argparse.ArgumentParser:
    """The options of a fit that makes a solver."""
    made = parser(name, text)
    made.add_argument("--nfe", type=int, required=True, metavar="N", help="velocities of one sample; each is two forwards under guidance")
    made.add_argument("--guidance", default="cfg", metavar="RULE", help="rule of guidance (%(default)s)")
    made.add_argument("--picture", type=float, metavar="X", help="scale of the picture to animate: guidance is then picture_and_text, three forwards")
    made.add_argument("--tolerance", type=positive, default=1e-4, metavar="X", help="of the reference solver, RK45 (%(default)g)")
    made.add_argument("--cache", type=Path, default=Path(".cache/reelstep/fits"), metavar="DIR", help="references and state to resume from (%(default)s)")
    return made


def guidance_parser(name: str, text: str) -> argparse.ArgumentParser:
    """The options of a fit that makes guidance for one solver."""
    made = parser(name, text)
    made.add_argument("--solver", metavar="NAME", help="(the task's default)")
    made.add_argument("--schedule", metavar="NAME", help="(the task's default)")
    made.add_argument("--steps", type=int, metavar="N", help="(the task's default)")
    return made


@dataclass(frozen=True)
class Subject:
    """What is fitted to: a model under one Fit, with prompts to fit and prompts to validate."""

    spec: ModelSpec
    module: torch.nn.Module
    model_hash: str
    fit: Fit
    train: ModelFields
    validation: ModelFields
    prompts: tuple[list[str], list[str]]  # to fit, to validate
    noises: tuple[Tensor, Tensor]

    def artifact(self, method: str, made: Artifact, name: str, conditions: Mapping[str, Any], scores: Mapping[str, float]) -> Fitted:
        """What is written, bound to the model."""
        return Fitted(name, method, self.spec.name, self.model_hash, self.fit, made, conditions, scores)


def prepare(args: argparse.Namespace, fit: Callable[[Defaults, float], Fit], processes: Processes = ALONE) -> Subject:
    """Build the model and encode the prompts. fit: from the task's defaults and the scale to what is fitted. processes: that may split the model.

    Raises NotFound, ConfigError or UnsupportedRequest before any of that for options that do not go together.
    """
    spec = MODELS[args.model]
    if (student := spec.settings.distilled) is not None:
        raise UnsupportedRequest(f"model {spec.name!r} holds at its own few steps alone, so nothing can be fitted to it; fit {student.teacher!r}, its teacher")
    check_folder(args.out)
    if args.pairs < 2:
        raise ConfigError(f"--pairs {args.pairs}; at least 2, 32 for a fit to use")
    if args.task not in spec.settings.defaults:
        raise UnsupportedRequest(f"model {spec.name!r} does not do {args.task}; it does: {', '.join(spec.settings.defaults) or 'nothing'}")
    defaults = spec.settings.defaults[args.task]
    wanted = fit(defaults, defaults.scale if args.scale is None else args.scale)
    prompts = choose_prompts(args)
    module = spec.build()
    model_hash = hash_weights(module)
    if processes.mesh is not None:
        split_over(processes.mesh, spec, module)
    train, validation = (ModelFields.of(spec, module, wanted, each) for each in prompts)
    noises = train.noise(args.seed), validation.noise(args.seed + VALIDATION_SEED)
    return Subject(spec, module, model_hash, wanted, train, validation, prompts, noises)


def prepare_solver(args: argparse.Namespace, processes: Processes = ALONE) -> tuple[Subject, tuple[Pairs, Pairs], Path]:
    """A subject, its exact paths to fit and to validate, and the folder that keeps them: the next fit of this model finds them there.

    The paths are solved in float32; the subject then runs in half precision, whose error, of some 54 dB, is far below a solver's.
    """

    def fit(defaults: Defaults, scale: float) -> Fit:
        guidance, options = field_guidance(args.guidance, args.picture, args.task)
        GUIDANCE[guidance].build(scale, PATHS[MODELS[args.model].settings.path], options)
        return Fit((args.task,), args.out.stem, "", args.nfe, guidance, options, scale)

    shipped = {file.stem.removeprefix(f"{args.model}.") for file in MODELS[args.model].fitted}
    if processes.first and args.out.stem in shipped:
        text = f"{args.model} comes with a {args.out.stem!r}, beside which `reelstep compile --fitted` takes no other; give -o another name to use both"
        print(f"note: {text}", file=sys.stderr)
    subject = prepare(args, fit, processes)
    wanted, pictures = subject.fit, [*subject.train.identity, *subject.validation.identity]
    asked = [subject.model_hash, args.task, wanted.guidance, wanted.guidance_options, wanted.scale, *subject.prompts, args.seed, args.tolerance, *pictures]
    folder = args.cache / hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    train = solve_pairs(subject.train, subject.noises[0], args.tolerance, folder / "train.pt", processes)
    validation = solve_pairs(subject.validation, subject.noises[1], args.tolerance, folder / "validation.pt", processes)
    fast = replace(subject, train=replace(subject.train, half=True), validation=replace(subject.validation, half=True))
    return fast, (train, validation), folder


def field_guidance(name: str, picture: float | None, task: str) -> tuple[str, dict[str, float]]:
    """The rule that a field is guided by, and all its options. picture: scale of the picture to animate, under a rule of its own.

    Raises ConfigError for a rule that makes no field, and for the scale of a picture where there is none or another rule.
    """
    if picture is not None and (task != "animate_sticker" or name not in ("cfg", "picture_and_text")):
        raise ConfigError(f"--picture {picture:g} with {task} under guidance {name!r}; it is for animate_sticker, under picture_and_text")
    name = name if picture is None else "picture_and_text"
    if not GUIDANCE[name].is_field:
        known = ", ".join(known for known, rule in GUIDANCE.items() if rule.is_field)
        raise ConfigError(f"no solver can be fitted under guidance {name!r}, which depends on what came before; one of: {known}")
    return name, GUIDANCE[name].complete({} if picture is None else {"picture": picture})


def prepare_guidance(args: argparse.Namespace, name: str) -> tuple[Subject, Table]:
    """A subject whose Fit says that it is guidance `name` on one solver, and that solver's table."""

    def fit(defaults: Defaults, scale: float) -> Fit:
        if name != "cfg" and not scale > 1:
            raise ConfigError(f"{args.task} at scale {scale:g} has no guidance to save; give --scale of the requests, above 1")
        solver, schedule = args.solver or defaults.solver, args.schedule or defaults.schedule
        return Fit((args.task,), solver, schedule, args.steps or defaults.steps, name, {}, scale)

    subject = prepare(args, fit)
    wanted = subject.fit
    return subject, build_table(subject.spec.settings, wanted.solver, wanted.schedule, wanted.steps)


def choose_prompts(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """To fit and to validate, `args.pairs` of each; no prompt is in both."""
    if args.prompts is None:
        if args.model not in PROMPTS:
            raise ConfigError(f"model {args.model!r} has no prompts of its own; give --prompts FILE, one a line")
        found = PROMPTS[args.model](2 * args.pairs, args.seed)
    else:
        try:
            found = [line.strip() for line in args.prompts.read_text("utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read prompts from {args.prompts}: {error}") from error
        if len(found) < 2:
            raise ConfigError(f"{args.prompts} holds {len(found)} prompts; at least 2, half to fit and half to validate")
    half = len(found) // 2
    return [(found[:half] * args.pairs)[k] for k in range(args.pairs)], [(found[half:] * args.pairs)[k] for k in range(args.pairs)]


def solve_pairs(fields: ModelFields, noise: Tensor, tolerance: float, path: Path, processes: Processes = ALONE) -> Pairs:
    """Reference paths of the noises, a piece at a time; what was solved before an interruption is kept. Processes take turns at the pieces."""
    pieces = torch.arange(len(noise)).split(ROWS)[processes.place :: processes.shares]
    own, paths = path if processes.shares == 1 else path.with_stem(f"{path.stem}_{processes.place}_of_{processes.shares}"), list[Tensor]()
    if (saved := checkpoint.load(own)) is not None:
        paths = list(saved["paths"].split(ROWS, 1))
    for index in pieces[len(paths) :]:
        paths.append(solve(fields(index), noise[index], tolerance, POINTS))
        if processes.leads:
            checkpoint.save(own, {"paths": torch.cat(paths, 1)})
        if processes.first:
            print(f"reference solutions, {path.stem}: {len(paths)} of {len(pieces)} pieces", flush=True)
    whole = noise.new_zeros(POINTS, *noise.shape)
    for index, found in zip(pieces, paths, strict=True):
        whole[:, index] = found
    whole = processes.total(whole)
    return Pairs(noise, whole[-1], whole)


def baselines(subject: Subject, pairs: Pairs) -> dict[str, float]:
    """Validation dB of every training-free deterministic solver that can spend exactly the fit's NFE, on the tasks' schedule, by "solver.schedule"."""
    settings, fit, found = subject.spec.settings, subject.fit, dict[str, float]()
    schedule = settings.defaults[fit.tasks[0]].schedule
    for name, solver in SOLVERS.items():
        if solver.stochastic or fit.steps % solver.evaluations:
            continue
        try:
            table = build_table(settings, name, schedule, fit.steps // solver.evaluations)
        except ReelstepError:  # this solver has no such table on this path
            continue
        found[f"{name}.{schedule}"] = validate(table, subject.validation, pairs, ROWS)
    return found


class Stopwatch:
    """Seconds of a fit, those of its interrupted parts among them: a file beside the state that it resumes from keeps them. keeps: whether to write it."""

    def __init__(self, saved: Path, keeps: bool = True) -> None:
        self.file, self.keeps, self.began = saved.with_suffix(".seconds"), keeps, time.monotonic()
        self.before = 0.0
        if saved.exists() and self.file.exists():
            with suppress(ValueError):  # half a file: what is lost is the time of a record
                self.before = float(self.file.read_text())

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.began

    def heard(self, progress: Callable[P, None]) -> Callable[P, None]:
        """`progress`, with the seconds kept at each call."""

        def hear(*args: P.args, **kwargs: P.kwargs) -> None:
            if self.keeps:
                replace_file(self.file, f"{self.seconds():.1f}\n".encode())
            progress(*args, **kwargs)

        return hear


@contextmanager
def progress_bar(total: int, shown: bool = True) -> Iterator[Callable[[int, float, float], None]]:
    """A bar for (iterations done, loss, best dB); where the output is no terminal, some twenty lines."""
    columns = (TextColumn("loss {task.fields[loss]:.3f}, best {task.fields[best]:.2f} dB"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task("", total=total, loss=0.0, best=0.0)
        in_lines = shown and not bar.console.is_terminal

        def tell(done: int, loss: float, best: float) -> None:
            bar.update(task, completed=done, loss=loss, best=best)
            if in_lines and (done == total or done % max(total // LINES, 1) == 0):
                print(f"iteration {done} of {total}, loss {loss:.3f}, best {best:.2f} dB", flush=True)

        yield tell


def plot_scores(path: Path, title: str, history: Sequence[tuple[int, float]], scores: Mapping[str, float]) -> None:
    """Validation over iterations, with the best training-free solvers as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*history, strict=True), marker=".", label="the fit")
    plain = sorted(((db, name) for name, db in scores.items() if "." in name), reverse=True)[:3]
    for k, (db, name) in enumerate(plain):
        axes.axhline(db, color=f"C{k + 1}", label=f"{name}, {db:.1f} dB")
    axes.set_xlabel("iteration")
    axes.set_ylabel("dB to the reference solution, validation")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, dpi=120)


def write_solver(
    args: argparse.Namespace, subject: Subject, pairs: Pairs, method: str, title: str, table: Table, found: field.Fit[Any], conditions: Mapping[str, Any],
    processes: Processes = ALONE,
) -> None:  # fmt: skip
    """Score a fitted solver beside training-free ones on the validation pairs; the first process writes artifact and plot, and prints the six best.

    found: of `table`, or of what it was made from. conditions: of the artifact, "seconds" among them. Raises StorageError.
    """
    name = args.out.stem
    scores = {name: found.best_db, "start": found.start_db, **baselines(subject, pairs)}
    if not processes.first:
        return
    write(args.out, subject.artifact(method, table, name, conditions, scores))
    plot_scores(args.out.with_suffix(".png"), f"{title}, {args.nfe} NFE, scale {subject.fit.scale:g}", found.history, scores)
    for other, db in sorted(scores.items(), key=lambda item: -item[1])[:6]:
        print(f"{other:>28}  {db:6.2f} dB")
    gained = "" if found.iteration else "; no iterate was better than the start: take more --iterations or --pairs"
    print(f"{args.out}  {args.nfe} NFE at scale {subject.fit.scale:g}, {conditions['seconds']} s{gained}{'; ' + found.note if found.note else ''}")


def write(path: Path, fitted: Fitted) -> None:
    """The artifact as JSON. Raises StorageError; what was there is then kept."""
    replace_file(path, (json.dumps(fitted.to_json(), indent=1) + "\n").encode())
