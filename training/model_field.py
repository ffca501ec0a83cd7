"""The guided velocity field of a registered model on a list of prompts: what its engine will follow, here with gradients."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reelstep.compiler.program import Program
from reelstep.engine.calibration import make_picture, unfitted
from reelstep.engine.media import decode_picture, fit_picture
from reelstep.engine.models.byte_text import tokenize
from reelstep.engine.models.spec import ModelSpec
from reelstep.engine.pipelines.latent import draw_noise, from_pixels
from reelstep.engine.request import Fit
from reelstep.engine.runner import Runner
from reelstep.engine.samplers.convert import TO_VELOCITY
from reelstep.engine.samplers.guidance import GUIDANCE, GuidanceState
from reelstep.engine.samplers.ns import drive
from reelstep.engine.samplers.paths import PATHS
from reelstep.errors import UnsupportedRequest
from reelstep.parallel.collectives import Communicator
from reelstep.parallel.rules import RULES
from reelstep.parallel.shard import shard
from reelstep.training.field import Field, Network
from reelstep.training.half import half_products
from reelstep.training.plain_attention import PlainAttention

TASKS = ("text_to_image", "text_to_video", "animate_sticker")
"""Tasks whose conditions are a prompt and, to animate, a picture, which the model makes of the same prompt."""
PICTURES_SEED = 1 << 21
"""Of the first prompt's picture: no noise of what is compared has such a seed."""


def split_over(comm: Communicator, spec: ModelSpec, module: nn.Module) -> None:
    """Leave of the parts of a model that ranks can share this rank's piece, frozen; the others as they are. Collective.

    Raises UnsupportedRequest for a model without such parts, ConfigError where a mesh is too large for it.
    """
    if not spec.sharding:
        raise UnsupportedRequest(f"model {spec.name!r} names no parts that processes could share; train it without a mesh")
    for part in spec.sharding:
        path = part.prefix.rstrip(".")
        whole = module.get_submodule(path)
        with TemporaryDirectory() as folder:
            file = Path(folder, "whole.safetensors")
            save_file({name: value.contiguous() for name, value in whole.state_dict().items()}, file)
            piece = shard(part.empty(), RULES[part.rules], comm, file)
        owner, _, name = path.rpartition(".")
        setattr(module.get_submodule(owner), name, piece)


@dataclass(frozen=True)
class ModelFields:
    """Called with the indices [B] of prompts, gives the guided field of those samples. The weights are frozen.

    contexts: of each branch of guidance, [N, S, D]. pictures: PNGs to animate, and conditions [N, C, 1, H, W], their latents; none for other tasks.
    half: matrix products of the denoiser in bfloat16, twice as fast where the processor has it; else all is float32. What goes in and comes out is float32.
    """

    spec: ModelSpec
    programs: Mapping[str, Program]
    fit: Fit
    contexts: Mapping[str, Tensor]
    pictures: tuple[bytes, ...] = ()
    conditions: Tensor | None = None
    half: bool = False

    @classmethod
    def of(cls, spec: ModelSpec, module: nn.Module, fit: Fit, prompts: Sequence[str]) -> ModelFields:
        """Encodes the prompts, and makes the pictures where there are any to animate. Raises UnsupportedRequest for another task, or one the model lacks."""
        if any(task not in TASKS or task not in spec.settings.tasks for task in fit.tasks):
            raise UnsupportedRequest(f"model {spec.name!r} has no fits for {', '.join(fit.tasks)}; tasks of words and pictures alone: {', '.join(TASKS)}")
        module.requires_grad_(False)
        programs = {program.name: program for program in spec.programs(module)}
        texts = {"text": list(prompts), "null": [""] * len(prompts)}
        length = spec.settings.text_length
        with torch.no_grad():
            contexts = {name: programs["encode_text"].module(torch.tensor([tokenize(t, length) for t in words])) for name, words in texts.items()}
            pictures = make_pictures(spec, programs, prompts) if "animate_sticker" in fit.tasks else ()
            conditions = torch.cat([encode_picture(spec, programs, picture) for picture in pictures]) if pictures else None
        return cls(spec, programs, fit, {**contexts, "bare": contexts["null"]}, pictures, conditions)

    @property
    def identity(self) -> list[str]:
        """sha256 of each picture, in hexadecimal: what tells these conditions from others of the same prompts."""
        return [hashlib.sha256(picture).hexdigest() for picture in self.pictures]

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """[C, F, H, W]."""
        settings = self.spec.settings
        return settings.latent_shape(settings.defaults[self.fit.tasks[0]].frames, *settings.limits.sizes[0])

    def noise(self, seed: int) -> Tensor:
        """[N, C, F, H, W], a seed for each."""
        seeds = range(seed, seed + len(self.contexts["text"]))
        return torch.cat([draw_noise(self.latent_shape, s) for s in seeds])

    def inputs(self, index: Tensor, x: Tensor, t: Any, branches: tuple[str, ...]) -> dict[str, Tensor]:
        """Of `denoise`, by name: x [B, ...] at t with the prompts at `index` [B], the branches of guidance in one batch."""
        modulation = self._run("embed_time", {"t": torch.as_tensor(t, dtype=torch.float32).reshape(1)})
        context = torch.cat([self.contexts[branch][index] for branch in branches])
        condition = {"condition": torch.cat([self.condition(index, x, branch) for branch in branches])} if self.spec.settings.condition_channels else {}
        return {"x": torch.cat([x] * len(branches)), "modulation": modulation.expand(len(context), -1, -1), "context": context, **condition}

    def condition(self, index: Tensor, x: Tensor, branch: str) -> Tensor:
        """[B, C, F, H, W], the pictures over all frames; zeros without pictures, and for the branch that has none."""
        shape = len(x), self.spec.settings.condition_channels, *x.shape[2:]
        return torch.zeros(shape) if self.conditions is None or branch == "bare" else self.conditions[index].expand(shape)

    def network(self, index: Tensor) -> Network:
        """With the prompts at `index`."""
        path, settings = PATHS[self.spec.settings.path], self.spec.settings

        def answer(x: Tensor, t: Any, branches: tuple[str, ...]) -> tuple[Tensor, ...]:
            inputs = self.inputs(index, x, t, branches)
            with half_products(self.half), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # of a norm, which is then run in parts
                outputs = self._run("denoise", inputs).float().chunk(len(branches))
            return tuple(TO_VELOCITY[settings.prediction](out, x, t, path) for out in outputs)

        return answer

    def __call__(self, index: Tensor) -> Field:
        rule = GUIDANCE[self.fit.guidance].build(self.fit.scale, PATHS[self.spec.settings.path], self.fit.guidance_options)
        network = self.network(index)

        def field(x: Tensor, t: Tensor) -> Tensor:
            moment: Any = t  # a rule and a conversion take a number; a tensor of no dimensions is one, with a gradient
            return drive(rule(x, moment, GuidanceState()), network)

        return field

    def _run(self, name: str, inputs: Mapping[str, Tensor]) -> Tensor:
        (output,) = run_program(self.programs[name], inputs).values()
        return output


def run_program(program: Program, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs by name, by the module as it is."""
    with PlainAttention():
        outputs = program.module(*(inputs[edge.name] for edge in program.inputs))
    return {edge.name: value for edge, value in zip(program.outputs, outputs if isinstance(outputs, tuple) else (outputs,), strict=True)}


def make_pictures(spec: ModelSpec, programs: Mapping[str, Program], prompts: Sequence[str]) -> tuple[bytes, ...]:
    """PNGs of the prompts, by the model's own defaults. Raises UnsupportedRequest for a model that makes none."""
    keys = {(name, profile.name): profile.max_batch for name, program in programs.items() for profile in program.profiles}
    runner = Runner({key: partial(run_program, programs[key[0]]) for key in keys}, keys)
    return tuple(make_picture(unfitted(spec), prompt, PICTURES_SEED + k, runner) for k, prompt in enumerate(prompts))


def encode_picture(spec: ModelSpec, programs: Mapping[str, Program], picture: bytes) -> Tensor:
    """[1, C, 1, H, W], as the pipeline encodes it."""
    limits = spec.settings.limits
    pixels = from_pixels(fit_picture(decode_picture(picture, limits), *limits.sizes[0]))
    return run_program(programs["encode_image"], {"picture": pixels})["latent"]
