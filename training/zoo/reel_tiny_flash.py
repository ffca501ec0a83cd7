"""Recipe of `reel-tiny-flash`: a student of `reel-tiny` that makes a video from words in one to three steps, by Imagine Flash.

`python -P -m reelstep.training.zoo.reel_tiny_flash`, or in N processes `torchrun --nproc-per-node N -m reelstep.training.zoo.reel_tiny_flash`. Seeded;
resumes from checkpoints/reel-tiny-flash/student.pt. Needs the weights of reel-tiny and no data: prompts and noise are enough. Only the denoiser learns;
text encoder and autoencoder are the teacher's.

The teacher starts from the student's own state (backward distillation, no shift): its target then follows from what the student sees, so that the mean over
targets, which a square error seeks, is not blurred by noise that the student cannot know.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from reelstep.engine.models.reel_tiny import SPEC, WEIGHTS, ReelTiny, build
from reelstep.engine.request import Fit
from reelstep.engine.samplers.paths import PATHS
from reelstep.errors import ConfigError
from reelstep.training.arguments import positive, whole
from reelstep.training.distributed import STAGES, start
from reelstep.training.imagine_flash import Distilled, Options, StudentGrid, Teacher, Validation, check_saved, distil, teacher_ends
from reelstep.training.model_field import ModelFields
from reelstep.training.recipe import check_paths, run, write_weights
from reelstep.training.trainer import ALONE, Processes
from reelstep.training.zoo.stickers import prompts

TASK = "text_to_video"
TIMES = (0.0, 1 / 3, 2 / 3, 1.0)  # fewer steps leave out the last ones and end in the data predicted there
PROMPTS, VALIDATION_PROMPTS, SAMPLES_OF_EACH = 1024, 8, 8
ROWS = 8  # of the teacher's ends made at once
VALIDATION_NFE = 16  # of the teacher's ends that students are scored against


def fields_of(model: ReelTiny, guidance: str, scale: float, words: Sequence[str]) -> ModelFields:
    """The model on these prompts, in half precision where it is fast."""
    return replace(ModelFields.of(SPEC, model, Fit((TASK,), "", "", 1, guidance, {}, scale), words), half=True)


def validation_of(teacher: ModelFields, how: Teacher, seed: int, processes: Processes) -> Validation:
    """Noise for students, and the teacher's ends from other noise, some of each prompt."""
    index = torch.arange(VALIDATION_PROMPTS).repeat_interleave(SAMPLES_OF_EACH)
    noise, other = (torch.randn((len(index), *teacher.latent_shape), generator=torch.Generator().manual_seed(seed + k)) for k in (1, 2))
    ends, path = torch.zeros_like(other), PATHS[SPEC.settings.path]
    for mine in torch.arange(len(index)).split(ROWS)[processes.place :: processes.shares]:
        ends[mine] = teacher_ends(teacher.network, replace(how, nfe=VALIDATION_NFE), path, index[mine], other[mine])
    return Validation(index, noise, processes.total(ends))


def train(iterations: int, batch: int, rate: float, seed: int, out: Path, processes: Processes = ALONE) -> tuple[ReelTiny, Distilled]:
    """The student, whole on the first process, and how its scores went."""
    scale = SPEC.settings.defaults[TASK].scale
    how = Teacher(nfe=4, scale=scale, solver="ab2")
    words = prompts(PROMPTS + VALIDATION_PROMPTS, seed)
    processes.share(batch, "samples of a batch")  # before minutes of the teacher's ends
    grid = StudentGrid(SPEC.settings.path, TIMES, gamma=None)
    options = Options(grid, how, iterations, batch, rate, weight_decay=0.0, validate_every=100, rows=16, seed=seed)
    saved = out / "student.pt"
    check_saved(saved, options, processes)
    if processes.first:
        print(f"encoding {len(words)} prompts, and {VALIDATION_PROMPTS * SAMPLES_OF_EACH} of the teacher's ends", flush=True)
    teacher, student = build(), build()
    networks = fields_of(teacher, "cfg", scale, words).network
    fields = fields_of(student, "none", 1.0, words)
    student.denoiser.requires_grad_(True)
    student.denoiser.text.requires_grad_(False)  # what it gives is the same in every step, and the engine runs it with the text encoder
    held_out = words[PROMPTS:]
    validation = validation_of(fields_of(teacher, "cfg", scale, held_out), how, seed, processes)
    shifted = replace(validation, index=validation.index + PROMPTS)
    began = time.monotonic()

    def conditions(rng: np.random.Generator, count: int) -> Tensor:
        return torch.from_numpy(rng.integers(PROMPTS, size=count))

    def tell(done: int, loss: float, best: float) -> None:
        if (done % 25 == 0 or done == iterations) and processes.first:
            print(f"iteration {done} of {iterations}, loss {loss:.4f}, best energy distance {best:.3f}, {time.monotonic() - began:.0f} s", flush=True)

    return student, distil(student.denoiser, fields, networks, conditions, shifted, options, progress=tell, saved=saved, processes=processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=whole(1), default=500)
    parser.add_argument("--batch", type=whole(1), default=16)
    parser.add_argument("--rate", type=positive, default=3e-4)
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--out", type=Path, default=Path("checkpoints/reel-tiny-flash"))
    parser.add_argument("--target", type=Path, default=WEIGHTS / "reel-tiny-flash.safetensors", help="the student's denoiser, bfloat16")
    parser.add_argument("--zero", type=int, default=0, choices=STAGES, help="with torchrun: what is split beside the batch (%(default)s, nothing)")
    parser.add_argument("--half", action="store_true", help="with --zero 1, 2 or 3: weights in bfloat16 beside float32 copies")
    args = parser.parse_args()
    check_paths(args.out, args.target)
    with start(args.zero, half=args.half) as processes:
        student, result = train(args.iterations, args.batch, args.rate, args.seed, args.out, processes)
        if processes.first:
            write(args.target, student, result)


def write(target: Path, student: ReelTiny, result: Distilled) -> None:
    """Raises ConfigError for a student that is still its teacher."""
    print("energy distance " + ", ".join(f"{score:.3f} at {done}" for done, score in result.history))
    if result.iteration == 0:
        why = result.note or "take more --iterations, or another --rate"
        raise ConfigError(f"no iterate was better than the teacher in the student's place, so {target} is left as it was; {why}")
    write_weights(target, {name: value.to(torch.bfloat16) for name, value in student.denoiser.state_dict().items()})
    print(f"{target}: iterate {result.iteration}, {target.stat().st_size:,} bytes{'; ' + result.note if result.note else ''}")


if __name__ == "__main__":
    run(main)
