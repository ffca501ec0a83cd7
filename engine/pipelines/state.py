"""All that a pipeline must remember between two calls: one plain dataclass that a driver can save.

A pipeline started from a saved state continues bit for bit; resuming, previews and migration stand on that.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from reelstep.engine.samplers.guidance import GuidanceState
from reelstep.engine.samplers.ns import SamplerState
from reelstep.engine.samplers.step_cache import Memory


@dataclass
class Run:
    """One output on its way from noise to data. Its sampler's x is [1, C, F, h, w].

    memories: of the step cache, by branch of guidance. cached: branches that it answered with the blocks skipped.
    """

    sampler: SamplerState
    guidance: GuidanceState = field(default_factory=GuidanceState)
    memories: dict[str, Memory] = field(default_factory=dict)
    cached: int = 0

    @property
    def forwards(self) -> int:
        """Branches for which the network ran whole."""
        return self.guidance.forwards - self.cached


@dataclass
class PipelineState:
    """stage: the program that is wanted now. step, steps: solver evaluations done by every output, and in all.

    runs: a sampler and its guidance for each output, since guidance may turn out differently for each.
    contexts: text of each guidance branch, [1, S, D]; condition: [count, C, F, h, w]; modulations: [nodes, 7, D]; preview: uint8
    [count, F, H, W, 3], replaced as new ones come.
    """

    stage: str = "encode"
    step: int = 0
    steps: int = 0
    contexts: dict[str, Tensor] = field(default_factory=dict)
    condition: Tensor | None = None
    modulations: Tensor | None = None
    runs: list[Run] = field(default_factory=list)
    preview: npt.NDArray[np.uint8] | None = None
