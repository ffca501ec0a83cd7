"""The guided velocity field of a registered model on a list of prompts: what its engine will follow, here with gradients."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reelstep.compiler.program import Program
from reelstep.engine.models.byte_text import tokenize
from reelstep.engine.models.spec import ModelSpec
from reelstep.engine.pipelines.latent import draw_noise
from reelstep.engine.request import Fit
from reelstep.engine.samplers.convert import TO_VELOCITY
from reelstep.engine.samplers.guidance import GUIDANCE, GuidanceState
from reelstep.engine.samplers.ns import drive
from reelstep.engine.samplers.paths import PATHS
from reelstep.errors import UnsupportedRequest
from reelstep.parallel.collectives import Communicator
from reelstep.parallel.rules import RULES
from reelstep.parallel.shard import empty_weights, shard
from reelstep.training.field import Field, Network
from reelstep.training.plain_attention import PlainAttention

TASKS = ("text_to_image", "text_to_video")
"""Tasks whose only condition is a prompt."""


def split_over(comm: Communicator, spec: ModelSpec, module: nn.Module) -> None:
    """Leave of the parts of a model that ranks can share this rank's piece, frozen; the others as they are. Collective.

    Raises UnsupportedRequest for a model without such parts, ConfigError where a mesh is too large for it.
    """
    if not spec.sharding:
        raise UnsupportedRequest(f"model {spec.name!r} names no parts that processes could share; train it without a mesh")
    for part in spec.sharding:
        path = part["prefix"].rstrip(".")
        whole = module.get_submodule(path)
        with empty_weights():
            piece = resolve_name(part["build"])()
        with TemporaryDirectory() as folder:
            file = Path(folder, "whole.safetensors")
            save_file({name: value.contiguous() for name, value in whole.state_dict().items()}, file)
            piece = shard(piece, RULES[part["rules"]], comm, file)
        owner, _, name = path.rpartition(".")
        setattr(module.get_submodule(owner), name, piece)


@dataclass(frozen=True)
class ModelFields:
    """Called with the indices [B] of prompts, gives the guided field of those samples. The weights are frozen.

    contexts: of each branch of guidance, [N, S, D]. half: matrix products of the denoiser in bfloat16, twice as fast where the processor has it; else all
    is float32. What goes in and comes out is float32.
    """

    spec: ModelSpec
    programs: Mapping[str, Program]
    fit: Fit
    contexts: Mapping[str, Tensor]
    half: bool = False

    @classmethod
    def of(cls, spec: ModelSpec, module: nn.Module, fit: Fit, prompts: Sequence[str]) -> ModelFields:
        """Encodes the prompts. Raises UnsupportedRequest for a task with other conditions."""
        if any(task not in TASKS or task not in spec.settings.tasks for task in fit.tasks):
            raise UnsupportedRequest(f"model {spec.name!r} has no fits for {', '.join(fit.tasks)}; tasks with a prompt alone: {', '.join(TASKS)}")
        module.requires_grad_(False)
        programs = {program.name: program for program in spec.programs(module)}
        texts = {"text": list(prompts), "null": [""] * len(prompts)}
        length = spec.settings.text_length
        with torch.no_grad():
            contexts = {name: programs["encode_text"].module(torch.tensor([tokenize(t, length) for t in words])) for name, words in texts.items()}
        return cls(spec, programs, fit, {**contexts, "bare": contexts["null"]})

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
        rows, channels = len(branches) * len(x), self.spec.settings.condition_channels
        modulation = self._run("embed_time", {"t": torch.as_tensor(t, dtype=torch.float32).reshape(1)})
        context = torch.cat([self.contexts[branch][index] for branch in branches])
        condition = {"condition": torch.zeros(rows, channels, *x.shape[2:])} if channels else {}
        return {"x": torch.cat([x] * len(branches)), "modulation": modulation.expand(rows, -1, -1), "context": context, **condition}

    def network(self, index: Tensor) -> Network:
        """With the prompts at `index`."""
        path, settings = PATHS[self.spec.settings.path], self.spec.settings

        def answer(x: Tensor, t: Any, branches: tuple[str, ...]) -> tuple[Tensor, ...]:
            inputs = self.inputs(index, x, t, branches)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.half), warnings.catch_warnings():
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
        program = self.programs[name]
        with PlainAttention():
            output: Tensor = program.module(*(inputs[edge.name] for edge in program.inputs))
        return output
