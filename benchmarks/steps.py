"""What does each solver and each rule of guidance reach with how many velocities, and at what cost?

The same prompts and seeds through the compiled engine, against the exact solution from the same noise: RK45 in float32 under full guidance. PSNR
and SSIM of the videos, mean over samples with their deviation; the Frechet distance to the exact videos as a set, with the jackknife's deviation;
forwards and seconds of a sample. Solvers are compared under full guidance, stochastic ones, which go elsewhere by design, at the least and the greatest
NFE alone. Rules of guidance run with the task's own solver, those that end at a time with several such times, and are also compared with its videos under
full guidance; there are none at scale 1. Pictures to animate are made by the model itself, of the same prompts. Writes a Markdown table and plots beside
the JSON.
Needs the `training` and `bench` extras.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from skimage.metrics import structural_similarity

from reelstep.benchmarks.animation import psnr
from reelstep.benchmarks.concurrency import run_all
from reelstep.benchmarks.contact_sheet import sheet
from reelstep.benchmarks.frechet import Array, features, frechet, frechet_sd, halves
from reelstep.benchmarks.harness import Row, parser, report
from reelstep.benchmarks.page import markdown
from reelstep.compiler.storage import replace_file
from reelstep.engine.build import build_bundle
from reelstep.engine.loop import Engine, open_engine
from reelstep.engine.models import MODELS
from reelstep.engine.models.spec import hash_weights
from reelstep.engine.pipelines.latent import to_pixels
from reelstep.engine.request import Finished, Fit, Request, choose
from reelstep.engine.resolve import Ask, resolve
from reelstep.engine.samplers.tables import SOLVERS
from reelstep.errors import ConfigError, ReelstepError
from reelstep.training.adaptive_guidance import COMPARED
from reelstep.training.field import solve
from reelstep.training.fits import choose_prompts, field_guidance
from reelstep.training.model_field import TASKS, ModelFields

Frames = npt.NDArray[np.uint8]
GROUP = 8  # requests at once
STOPS = (0.25, 0.375, 0.75)  # of guidance, beside a rule's own
FEWEST = 4  # samples: each half of them needs a covariance


def ssim(a: Frames, b: Frames) -> float:
    """Mean over frames [F, H, W, 3], scikit-image's with its defaults."""
    similarity: Any = structural_similarity  # it has no types
    return float(np.mean([similarity(x, y, channel_axis=-1) for x, y in zip(a, b, strict=True)]))


def references(fields: ModelFields, noise: torch.Tensor, frames: int, tolerance: float, path: Path) -> list[Frames]:
    """The exact videos [frames, H, W, 3]. path: of the .npy that keeps them; what an earlier run left there is not solved for again."""
    decode, found = fields.programs["decode"].module, list[Frames](np.load(path)) if path.exists() else []
    for begin in range(len(found), len(noise), GROUP):
        index = torch.arange(begin, min(begin + GROUP, len(noise)))
        ends = solve(fields(index), noise[index], tolerance)[-1]
        with torch.no_grad():
            found += list(to_pixels(decode(ends)[:, :, :frames].clamp(-1, 1)))  # the decoder gives whole latent frames
        kept = io.BytesIO()
        np.save(kept, np.stack(found))
        replace_file(path, kept.getvalue())
        print(f"exact solutions: {len(found)} of {len(noise)}", flush=True)
    return found


def candidates(engine: Engine, ask: Ask, steps: Sequence[int], stops: Sequence[float] = STOPS, own: int | None = None) -> list[Ask]:
    """Every solver under full guidance, the training-free ones at every NFE that they can spend; then, where CFG is that, the other rules of guidance.

    stops: of rules that end at a time, beside their own, each at `own` steps, the task's unless given. At scale 1 all rules are one.
    """
    (served,) = engine.models.values()
    found = []
    for name in served.solvers:
        if name in served.fits:
            found.append(replace(ask, solver=name, steps=None, scale=None))
            continue
        each, spent = SOLVERS[name].evaluations, sorted({min(steps), max(steps)}) if SOLVERS[name].stochastic else steps
        found += [replace(ask, solver=name, steps=nfe // each) for nfe in spent if nfe % each == 0]
    for rule in () if ask.scale == 1 or ask.guidance else served.guidance_rules:
        if rule in served.fits:
            found.append(replace(ask, guidance=rule, steps=None, scale=None))
        elif rule not in ("cfg", "none", "picture_and_text"):
            found += [replace(ask, guidance=rule, steps=nfe) for nfe in steps]
            if "stop" in served.guidance_rules[rule]:  # one that ends guidance at a time: its curve over forwards
                found += [replace(ask, guidance=rule, guidance_options={"stop": stop}, steps=own) for stop in stops]
    return found


def called(ask: Ask) -> str:
    """The solver or the rule of guidance that a candidate is there for."""
    return ask.solver or ask.guidance


@dataclass(frozen=True)
class Truth:
    """The exact videos, each [F, H, W, 3], and what the Frechet distance sees of them. samples: prompt and, to animate, picture of each."""

    samples: Sequence[tuple[str, bytes | None]]
    guidance: str  # the rule that is full guidance
    videos: Sequence[Frames]
    seen: Array


def measure(engine: Engine, ask: Ask, truth: Truth, full: dict[tuple[str, int], list[Frames]]) -> tuple[Row, list[Frames]] | None:
    """One row and the videos; None for a choice that this task refuses. full: videos by solver and NFE under full guidance, to which these are added."""
    asks = [replace(ask, prompt=prompt, image=picture, seed=k, request_id=f"{k}") for k, (prompt, picture) in enumerate(truth.samples)]
    try:
        requests = [resolve(each, engine.models) for each in asks]
    except ReelstepError as error:
        print(f"left out: {called(ask)}: {error}", flush=True)
        return None
    seconds, results = list[float](), list[Finished]()
    for begin in range(0, len(requests), GROUP):
        group = requests[begin : begin + GROUP]
        spent, done = run_all(engine, group, together=True)
        seconds.append(spent / len(group))
        results += done
    videos = [done.media.frames[0] for done in results]
    key = requests[0].solver, results[0].usage.nfe
    if requests[0].guidance == truth.guidance:
        full[key] = videos
    return row_of(requests[0], results, videos, truth, full.get(key), seconds), videos


def row_of(request: Request, results: Sequence[Finished], videos: list[Frames], truth: Truth, full: list[Frames] | None, seconds: Sequence[float]) -> Row:
    psnrs, ssims = ([compare(v, t) for v, t in zip(videos, truth.videos, strict=True)] for compare in (psnr, ssim))
    seen = features(videos)
    return {
        "solver": request.solver, "guidance": request.guidance, "stop": request.guidance_options.get("stop"), "nfe": results[0].usage.nfe,
        "forwards": float(np.mean([done.usage.forwards for done in results])),
        "psnr_db": float(np.mean(psnrs)), "psnr_sd_db": float(np.std(psnrs)), "ssim": float(np.mean(ssims)), "ssim_sd": float(np.std(ssims)),
        "ssim_cfg": None if full is None else float(np.mean([ssim(v, f) for v, f in zip(videos, full, strict=True)])),
        "frechet": frechet(seen, truth.seen), "frechet_sd": frechet_sd(seen, truth.seen),
        "seconds": float(np.median(seconds)), "seconds_sd": float(np.std(seconds)),
    }  # fmt: skip


def joined(rows: Sequence[Row], file: Path, extra: Mapping[str, Any]) -> tuple[list[Row], dict[str, Any]]:
    """These rows among those that a file holds, in whose place they stand where they are of the same; and `extra` with how the others were measured.

    Raises ConfigError for a file that cannot be read, or whose rows were compared with something else.
    """
    try:
        data = json.loads(file.read_text())
        kept, about = list(data["rows"]), data["conditions"]
        before = f"{data.get('before', '')} {about['command']}, commit {about['commit']}, load {about['load_1min']}, {about['time']};".strip()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"cannot add to {file} ({type(error).__name__}: {error}); give the --json of an earlier run, or leave out --append") from error
    if other := [f"{name} {data.get(name)} instead of {value}" for name, value in extra.items() if data.get(name) != value]:
        raise ConfigError(f"{file} was compared with something else: {'; '.join(other)}. Write to another file, or leave out --append")
    found = {identity(row): row for row in (*kept, *rows)}
    order = list(dict.fromkeys(each[:2] for each in found))
    return [found[each] for each in sorted(found, key=lambda each: (order.index(each[:2]), each[2]))], {**extra, "before": before}


def identity(row: Row) -> tuple[str, str, int, float | None]:
    """What one row of a file is of."""
    return row["solver"], row["guidance"], row["nfe"], row.get("stop")


def plot(path: Path, rows: Sequence[Row], own: str, guidance: str = "cfg") -> None:
    """Quality over NFE by solver, those fitted for one NFE each as one line, and over forwards by rule. own: the task's solver; guidance: full guidance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    by_solver, by_rule = figure.subplots(1, 2)
    lines: Mapping[Any, tuple[str, str, bool]] = {by_solver: ("solver", "nfe", True), by_rule: ("guidance", "forwards", False)}
    for axes, (label, x, full) in lines.items():
        shown_rows = [row for row in rows if (row["guidance"] == guidance) == full or (label == "guidance" and row["solver"] == own)]
        families = [re.sub(r"_\d+$", "", row[label]) for row in shown_rows]
        for k, name in enumerate(dict.fromkeys(families)):
            mine = sorted((row[x], row["psnr_db"]) for row, family in zip(shown_rows, families, strict=True) if family == name)
            axes.plot(*zip(*mine, strict=True), marker=".", linestyle="-" if k < 10 else "--", label=name)  # ten colours, then dashes
        axes.set_xlabel(x)
        axes.set_ylabel("PSNR to the exact solution, dB")
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str]) -> None:
    options = parser("steps", __doc__ or "")
    options.add_argument("model", nargs="?", default="reel-tiny", metavar="MODEL", help="(%(default)s)")
    options.add_argument("--task", default="text_to_video", choices=TASKS)
    options.add_argument("--scale", type=float, help="(the task's default)")
    options.add_argument("--nfe", type=int, nargs="+", default=[4, 6, 8, 10, 12, 16], metavar="N", help="(4 6 8 10 12 16)")
    options.add_argument("--only", nargs="+", metavar="NAME", help="solvers and rules of guidance to compare (all)")
    options.add_argument("--picture", type=float, metavar="X", help="scale of the picture to animate: full guidance is then picture_and_text")
    options.add_argument("--schedule", default="", metavar="NAME", help="(the task's default)")
    options.add_argument("--threshold", type=float, metavar="X", help="of adaptive guidance (as it was calibrated for the model)")
    options.add_argument("--stops", type=float, nargs="+", default=STOPS, metavar="T", help="of rules that end at a time, beside their own (0.25 0.375 0.75)")
    options.add_argument("--steps", type=int, metavar="N", help="with each of --stops (the task's default)")
    options.add_argument("--samples", type=int, default=64, metavar="N", help="(%(default)s)")
    options.add_argument("--prompts", type=Path, metavar="FILE", help="one a line (the model's own kind)")
    options.add_argument("--fitted", type=Path, action="append", default=[], metavar="FILE", help="made by `reelstep fit`; may be repeated")
    options.add_argument("--tolerance", type=float, default=1e-4, metavar="X", help="of the exact solution (%(default)g)")
    options.add_argument("--append", action="store_true", help="keep those rows of --json that are not measured again")
    args = options.parse_args(argv)
    if args.samples < FEWEST:
        raise ConfigError(f"--samples {args.samples}: the Frechet distance and its noise floor need at least {FEWEST}")
    if args.append and args.json is None:
        raise ConfigError("--append without --json; give the file that holds the earlier rows")
    spec = MODELS[args.model]
    args.pairs = args.samples
    _, prompts = choose_prompts(args)  # the half that fits validate with: none was fitted to these
    defaults = spec.settings.defaults[args.task]
    scale = defaults.scale if args.scale is None else args.scale
    guidance, own = field_guidance("cfg", args.picture, args.task)
    fit = Fit((args.task,), defaults.solver, defaults.schedule, defaults.steps, guidance, own, scale)
    pictured = {} if args.picture is None else {"picture": args.picture}
    about: dict[str, Any] = {"task": args.task, "scale": scale, **pictured, "samples": args.samples, "reference": f"RK45 at {args.tolerance:g}"}
    if args.append:
        joined((), args.json, about)
    bundle = build_bundle(args.model, backend="openvino", precision=None, out=args.cache / "bench-steps.reel", cache=args.cache, fitted=args.fitted)
    engine = open_engine([bundle.path], cache=args.cache)
    ask = Ask("", scale=scale, frames=defaults.frames, schedule=args.schedule)
    if args.picture is not None:
        ask = replace(ask, guidance=guidance, guidance_options=own)
    tried = candidates(engine, ask, args.nfe, args.stops, args.steps)
    if args.threshold is not None:
        if not any(each.guidance in COMPARED for each in tried):
            raise ConfigError(f"--threshold {args.threshold:g}: no adaptive guidance is compared at scale {scale:g} or under --picture; leave it out")
        tried = [replace(each, guidance_options={"threshold": args.threshold}) if each.guidance in COMPARED else each for each in tried]
    for name in args.only or ():
        choose("solver or guidance", name, tuple(sorted({called(each) for each in tried})))
    module = spec.build()
    fields = ModelFields.of(spec, module, fit, prompts)
    asked = [hash_weights(module), args.task, scale, defaults.frames, args.tolerance, *prompts, *fields.identity, *pictured.values()]
    kept = args.cache / f"exact-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]}.npy"
    exact = references(fields, fields.noise(0), defaults.frames, args.tolerance, kept)
    truth = Truth(list(zip_longest(prompts, fields.pictures)), guidance, exact, features(exact))
    rows, shown_videos = list[Row](), [("the exact solution", exact[:4])]
    full: dict[tuple[str, int], list[Frames]] = {}
    for candidate in (each for each in tried if not args.only or called(each) in args.only):
        if (found := measure(engine, candidate, truth, full)) is not None:
            row, videos = found
            rows.append(row)
            print(f"{row['solver']:>18} {row['guidance']:>12} NFE {row['nfe']:>3}  {row['psnr_db']:6.2f} dB  SSIM {row['ssim']:.3f}", flush=True)
            if row["nfe"] == 8:
                shown_videos.append((f"{row['solver']}, {row['guidance']}, 8 NFE: {row['psnr_db']:.1f} dB", videos[:4]))
    engine.close(1.0)
    about["frechet_between_its_halves"] = halves(truth.seen)
    if args.append:
        rows, about = joined(rows, args.json, about)
    report("steps", rows, args.seed, args.json, about)
    if args.json is not None:
        args.json.with_suffix(".md").write_text(markdown(rows, list(rows[0])) + "\n")
        plot(args.json.with_suffix(".png"), rows, defaults.solver, guidance)
        sheet([(words, [clip[::2] for clip in clips]) for words, clips in shown_videos], args.json.with_name(f"{args.json.stem}_sheet.png"))
