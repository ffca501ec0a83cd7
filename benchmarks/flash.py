"""How near do one to three steps of the distilled student come to its teacher's many?

The same held-out prompts and seeds through the compiled engines of both. Every row's videos, as a set, are held against two others by the Frechet distance
of their features (benchmarks/frechet.py), since a student need not map a noise to the teacher's end of it. To data: clips such as the teacher learned from, as
FIDs of students are published; `over_teacher` is a row's distance by that of the teacher. To the teacher: its videos of the same prompts from OTHER seeds,
where the teacher's own row is the noise floor of so many samples and `over_floor` a row's distance by that. `untouched` is the teacher in as few steps as
the student. Noise correction, on and off, is compared where it acts, in the states behind the first step of the float32 network. Writes a Markdown table and
a contact sheet beside the JSON. Needs the `training` and `bench` extras and the font of Debian's package fonts-noto-color-emoji.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reelstep.benchmarks.concurrency import run_all
from reelstep.benchmarks.contact_sheet import Frames, sheet
from reelstep.benchmarks.frechet import Array, features, frechet, frechet_sd
from reelstep.benchmarks.harness import Row, parser, report
from reelstep.benchmarks.page import markdown
from reelstep.engine.build import build_bundle
from reelstep.engine.loop import Engine, open_engine
from reelstep.engine.models.reel_tiny_flash import SPEC as STUDENT
from reelstep.engine.models.spec import GRID, Distilled
from reelstep.engine.pipelines.latent import to_pixels
from reelstep.engine.request import Finished, Fit, Request
from reelstep.engine.resolve import Ask, resolve
from reelstep.engine.samplers.noise_correction import noise_corrected
from reelstep.engine.samplers.ns import drive, sample, start
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.tables import SOLVERS
from reelstep.errors import ConfigError
from reelstep.training.field import Field, at_number
from reelstep.training.model_field import ModelFields
from reelstep.training.zoo import reel_tiny_flash as recipe
from reelstep.training.zoo.stickers import MOVING, NAMES, load_stickers, make_clips, prompts

GROUP = 8  # requests at once
FEWEST = 3  # samples: the distance's spread leaves one out, and two must be left
SHOWN = 8  # prompts on the contact sheet
CORRECTED = 4  # samples of the comparison of noise correction


def held_out(count: int) -> list[str]:
    """Prompts behind all those that the recipe of the student, by its default seed, learns from or chooses weights by. Prompts of one seed all differ."""
    known = recipe.PROMPTS + recipe.VALIDATION_PROMPTS
    return prompts(known + count, 0)[known:]


def data_clips(count: int, seed: int) -> npt.NDArray[np.uint8]:
    """[count, F, H, W, 3] of what `prompts` speak of: everyday stickers that move."""
    everyday = [sticker for sticker in load_stickers() if sticker.codepoint in NAMES]
    return to_pixels(make_clips(everyday, np.random.default_rng((seed, 2)), count, MOVING).video)


def contenders(student: str, distilled: Distilled, teacher_steps: int) -> dict[str, Ask]:
    """By what the table calls them. The first is what the student is held against."""
    grids = sorted(distilled.grids, reverse=True)
    teacher = Ask("", model=distilled.teacher, solver="euler", guidance="cfg", scale=distilled.scale)
    return {
        f"teacher, {teacher_steps} steps": replace(teacher, steps=teacher_steps),
        "teacher, its defaults": Ask("", model=distilled.teacher),
        **{f"student, {n} steps": Ask("", model=student, steps=n) for n in grids},
        f"untouched, {grids[0]} steps": replace(teacher, steps=grids[0]),
    }


@dataclass
class Made:
    """Of one contender. seconds: of a sample, once for each group of requests."""

    requests: list[Request] = field(default_factory=list)
    results: list[Finished] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def videos(self) -> list[Frames]:
        return [done.media.frames[0] for done in self.results]


def make(engine: Engine, asks: Mapping[str, Ask], words: Sequence[str], seed: int) -> dict[str, Made]:
    """What each makes of every prompt, prompt k from seed + k. They take turns by groups of prompts, so that a machine that slows down slows all."""
    made = {name: Made() for name in asks}
    for begin in range(0, len(words), GROUP):
        for name, ask in asks.items():
            group = [
                resolve(replace(ask, prompt=prompt, seed=seed + begin + k, request_id=f"{name} {begin + k}"), engine.models)
                for k, prompt in enumerate(words[begin : begin + GROUP])
            ]
            spent, done = run_all(engine, group, together=True)
            made[name].requests += group
            made[name].results += done
            made[name].seconds.append(spent / len(group))
        print(f"{', '.join(asks)}: {min(begin + GROUP, len(words))} of {len(words)} prompts", flush=True)
    return made


def correction(student: Field, path: str, times: Sequence[float], noise: Tensor) -> float:
    """Largest difference in any state of the student's run from noise [B, ...], the end too, between noise correction on and off."""
    solver, runs = SOLVERS["ddim"], list[Tensor]()
    for each in (solver, noise_corrected(solver)):
        table, states = each.build(times, PATHS[path]), list[Tensor]()

        def velocity(x: Tensor, t: float, states: list[Tensor] = states) -> Tensor:
            states.append(x)
            return at_number(student, x.dtype, x, t)

        end = drive(sample(table, start(table, noise)), velocity)
        runs.append(torch.stack([*states, end]))
    return float((runs[1] - runs[0]).abs().max())


def corrections(words: Sequence[str], seed: int) -> dict[int, str]:
    """What noise correction changes, by the number of steps."""
    settings = STUDENT.settings
    assert settings.distilled is not None
    fit = Fit(settings.tasks, "ddim", GRID, 1, "none", {}, 1.0)
    fields = ModelFields.of(STUDENT, STUDENT.build(), fit, words)
    noise, alpha = fields.noise(seed), PATHS[settings.path].at(0.0).alpha
    with torch.no_grad():
        found = {n: correction(fields(torch.arange(len(words))), settings.path, times, noise) for n, times in settings.distilled.grids.items()}
    return {n: f"changes {most:g}; alpha is {alpha:g} at t = 0" for n, most in found.items()}


@dataclass(frozen=True)
class Reference:
    """Features [N, D] to hold sets against."""

    data: Array
    teacher: Array


def row_of(name: str, made: Made, reference: Reference, corrected: str) -> Row:
    request, seen = made.requests[0], features(made.videos)
    return {
        "contender": name, "model": request.model, "solver": request.solver, "guidance": request.guidance, "scale": request.scale, "steps": request.steps,
        "forwards": float(np.mean([done.usage.forwards for done in made.results])),
        "to_data": frechet(seen, reference.data), "to_data_sd": frechet_sd(seen, reference.data),
        "to_teacher": frechet(seen, reference.teacher), "to_teacher_sd": frechet_sd(seen, reference.teacher),
        "seconds": float(np.median(made.seconds)), "seconds_sd": float(np.std(made.seconds)),
        "noise_correction": corrected,
    }  # fmt: skip


def rows_of(made: Mapping[str, Made], reference: Reference, corrected: Mapping[int, str]) -> list[Row]:
    """A row for each contender; the ratios are to the first one's distances."""
    rows = [row_of(name, each, reference, corrected[each.requests[0].steps] if each.requests[0].model == STUDENT.name else "") for name, each in made.items()]
    first = rows[0]
    return [{**row, "over_teacher": row["to_data"] / first["to_data"], "over_floor": row["to_teacher"] / first["to_teacher"]} for row in rows]


def main(argv: Sequence[str]) -> None:
    options = parser("flash", __doc__ or "")
    options.add_argument("--samples", type=int, default=128, metavar="N", help="prompts, one video of each contender from each (%(default)s)")
    options.add_argument("--teacher-steps", type=int, default=25, metavar="N", help="of the teacher that the student is held against (%(default)s)")
    args = options.parse_args(argv)
    if args.samples < FEWEST:
        raise ConfigError(f"--samples {args.samples}; at least {FEWEST}, for a distance with a spread, and 64 for one that says much")
    distilled = STUDENT.settings.distilled
    assert distilled is not None
    words, real = held_out(args.samples), data_clips(args.samples, args.seed)
    bundle = partial(build_bundle, backend="openvino", precision=None, cache=args.cache)
    bundles = [bundle(name, out=args.cache / f"bench-flash-{name}.reel").path for name in (distilled.teacher, STUDENT.name)]
    engine = open_engine(bundles, cache=args.cache)
    asks = contenders(STUDENT.name, distilled, args.teacher_steps)
    made = make(engine, asks, words, args.seed)
    others = make(engine, {"reference": next(iter(asks.values()))}, words, args.seed + args.samples)["reference"]
    engine.close(1.0)
    reference = Reference(features(real), features(others.videos))
    rows = rows_of(made, reference, corrections(words[:CORRECTED], args.seed))
    floor = frechet(features(data_clips(args.samples, args.seed + 1)), reference.data)
    report("flash", rows, args.seed, args.json, {"samples": args.samples, "to_data_of_other_clips": floor})
    if args.json is not None:
        args.json.with_suffix(".md").write_text(markdown(rows, list(rows[0])) + "\n")
        order = [name for name in made if name != "teacher, its defaults"]
        shown = [(f"{words[k]} ({'; '.join(order)})", [made[name].videos[k][::2] for name in order]) for k in range(min(SHOWN, len(words)))]
        sheet(shown, args.json.with_name(f"{args.json.stem}_sheet.png"))
