"""One module of a model that ranks share, by names: a process of a rank gets these, which pickle, and finds the functions itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pkgutil import resolve_name

from torch import nn

from reelstep.compiler.program import Program


@dataclass(frozen=True)
class Part:
    """build, programs: as "module:attribute", a function of no weights and one from the module to its programs."""

    build: str
    programs: str
    rules: str  # in RULES
    prefix: str  # of its names in the weights file

    def empty(self) -> nn.Module:
        """The module with its parameters on the meta device."""
        from reelstep.parallel.shard import empty_weights  # here: it brings all kernels, and every start reads the models' parts

        with empty_weights():
            module: nn.Module = resolve_name(self.build)()
        return module

    def programs_of(self, module: nn.Module) -> Sequence[Program]:
        found: Sequence[Program] = resolve_name(self.programs)(module)
        return found
