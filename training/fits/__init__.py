"""The commands behind `reelstep fit`: each makes one kind of artifact for a model, and a plot beside it."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reelstep.engine.build import hash_weights
from reelstep.engine.models import MODELS
from reelstep.engine.models.spec import ModelSpec
from reelstep.engine.request import Fit
from reelstep.engine.samplers.guidance import GUIDANCE
from reelstep.engine.samplers.ns import Table
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.schedules import SCHEDULES
from reelstep.engine.samplers.tables import SOLVERS
from reelstep.errors import ConfigError, ReelstepError
from reelstep.registry import Registry
from reelstep.training import checkpoint
from reelstep.training.bns import Pairs, validate
from reelstep.training.field import solve
from reelstep.training.model_field import TASKS, ModelFields

FITS: Registry[Callable[[Sequence[str]], None]] = Registry("fit", {"bns": "reelstep.training.fits.bns:main"})
"""Entry point of each: it takes the command line after its name."""

PROMPTS: Registry[Callable[[int, int], list[str]]] = Registry("prompts of model", {"reel-tiny": "reelstep.training.zoo.stickers:prompts"})
"""(count, seed) -> prompts of the kind a model was trained for."""

ROWS = 8  # samples of one forward and backward
VALIDATION_SEED = 1 << 20


def parser(name: str, text: str) -> argparse.ArgumentParser:
    """The options that every fit has."""
    made = argparse.ArgumentParser(prog=f"reelstep fit {name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("model", metavar="MODEL", help="a model's name; a wrong one prints those there are")
    made.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="artifact to write (.json); a plot goes beside it (.png)")
    made.add_argument("--task", default="text_to_video", choices=TASKS, help="what it is for (%(default)s)")
    made.add_argument("--scale", type=float, metavar="S", help="guidance scale (the task's default)")
    made.add_argument("--guidance", default="cfg", metavar="RULE", help="rule of guidance (%(default)s)")
    made.add_argument("--prompts", type=Path, metavar="FILE", help="one a line, half to fit and half to validate (the model's own kind)")
    made.add_argument("--pairs", type=int, default=64, metavar="N", help="samples to fit to, and as many to validate (%(default)s)")
    made.add_argument("--tolerance", type=float, default=1e-4, metavar="X", help="of the reference solver, RK45 (%(default)g)")
    made.add_argument("--cache", type=Path, default=Path(".cache/reelstep/fits"), metavar="DIR", help="references and state to resume from (%(default)s)")
    made.add_argument("--seed", type=int, default=0)
    return made


@dataclass(frozen=True)
class Subject:
    """What is fitted to: a model under one Fit, samples to fit and samples to validate, and where state is kept."""

    spec: ModelSpec
    model_hash: str
    fit: Fit
    train: tuple[ModelFields, Pairs]
    validation: tuple[ModelFields, Pairs]
    folder: Path


def prepare(args: argparse.Namespace, steps: int) -> Subject:
    """Build the model, choose prompts, solve the references (kept in --cache: the next fit of this model finds them).

    Raises NotFound, ConfigError or UnsupportedRequest before any of that for options that do not fit.
    """
    spec = MODELS[args.model]
    if not args.out.parent.is_dir():
        raise ConfigError(f"cannot write {args.out}: there is no folder {args.out.parent}; make it first")
    if args.pairs < 2:
        raise ConfigError(f"--pairs {args.pairs}; at least 2, 64 for a fit to use")
    scale = spec.settings.defaults[args.task].scale if args.scale is None else args.scale
    options = GUIDANCE[args.guidance].complete(spec.settings.guidance_options.get(args.guidance, {}))
    GUIDANCE[args.guidance].build(scale, PATHS[spec.settings.path], options)
    fit = Fit((args.task,), steps, args.guidance, options, scale)
    fit_prompts, validation_prompts = choose_prompts(args)
    module = spec.build()
    model_hash = hash_weights(module)
    train, validation = (ModelFields.of(spec, module, fit, prompts) for prompts in (fit_prompts, validation_prompts))
    asked = json.dumps([model_hash, args.task, args.guidance, options, scale, fit_prompts, validation_prompts, args.seed, args.tolerance])
    folder = args.cache / hashlib.sha256(asked.encode()).hexdigest()[:16]
    pairs = [
        solve_pairs(fields, fields.noise(seed), args.tolerance, folder / f"{part}.pt", part)
        for part, fields, seed in (("train", train, args.seed), ("validation", validation, args.seed + VALIDATION_SEED))
    ]
    return Subject(spec, model_hash, fit, (train, pairs[0]), (validation, pairs[1]), folder)


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


def solve_pairs(fields: ModelFields, noise: Tensor, tolerance: float, path: Path, part: str) -> Pairs:
    """Reference ends of the noises, a piece at a time; what was solved before an interruption is kept."""
    ends: list[Tensor] = []
    if (saved := checkpoint.load(path)) is not None:
        ends = list(saved["ends"].split(ROWS))
    for index in torch.arange(len(noise)).split(ROWS)[len(ends) :]:
        ends.append(solve(fields(index), noise[index], tolerance))
        checkpoint.save(path, {"ends": torch.cat(ends)})
        print(f"reference solutions to {part}: {sum(map(len, ends))} of {len(noise)}", flush=True)
    return Pairs(noise, torch.cat(ends))


def baselines(subject: Subject, nfe: int) -> dict[str, float]:
    """Validation dB of every training-free deterministic solver that can spend exactly `nfe`, on each schedule, by "solver.schedule"."""
    found: dict[str, float] = {}
    for name, solver in SOLVERS.items():
        if solver.stochastic or nfe % solver.evaluations:
            continue
        for schedule, times in SCHEDULES.items():
            try:
                table = solver.build(times(nfe // solver.evaluations), PATHS[subject.spec.settings.path])
            except ReelstepError:  # this solver has no such table on this path
                continue
            found[f"{name}.{schedule}"] = score(subject, table)
    return found


def score(subject: Subject, table: Table) -> float:
    """Mean validation score in dB."""
    return validate(table, *subject.validation, ROWS)


def write(path: Path, artifact: Mapping[str, Any]) -> None:
    """Write JSON so that a full disk leaves the old file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(artifact, indent=1) + "\n")
    temporary.replace(path)
