"""What goes in and out of one program at one profile, with every size but the batch a number.

B rows of a call, 1..max_batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from reelstep.compiler.program import BATCH, DType, Profile, Program, TensorSpec
from reelstep.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@cache
def torch_dtype(name: DType) -> torch.dtype:
    import torch  # here: a bundle is opened while it is not imported yet

    found: torch.dtype = getattr(torch, name)
    return found


@dataclass(frozen=True)
class Edge:
    """One tensor [B, *sizes]."""

    name: str
    dtype: DType
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} [{', '.join([BATCH, *map(str, self.sizes)])}]"

    def zeros(self, rows: int, device: torch.device | str = "cpu") -> Tensor:
        import torch

        return torch.zeros((rows, *self.sizes), dtype=torch_dtype(self.dtype), device=device)


@dataclass(frozen=True)
class Signature:
    """The edges of one program at one profile, in the order of `forward`."""

    program: str
    profile: str
    inputs: tuple[Edge, ...]
    outputs: tuple[Edge, ...]
    max_batch: int

    @classmethod
    def of(cls, program: Program, profile: Profile) -> Signature:
        """Raises ConfigError if the profile gives no number to a named size."""
        inputs = tuple(_edge(spec, program, profile) for spec in program.inputs)
        outputs = tuple(_edge(spec, program, profile) for spec in program.outputs)
        return cls(program.name, profile.name, inputs, outputs, profile.max_batch)

    def ordered(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The tensors in the order of `forward`, checked. Raises ConfigError naming each tensor that does not fit."""
        if len(inputs) == len(self.inputs):
            tensors = [inputs.get(edge.name) for edge in self.inputs]
            first = tensors[0]
            rows = first.shape[0] if first is not None and first.dim() else 0
            if 1 <= rows <= self.max_batch and all(
                tensor is not None and tensor.dtype is torch_dtype(edge.dtype) and tensor.shape == (rows, *edge.sizes)
                for tensor, edge in zip(tensors, self.inputs, strict=True)
            ):
                return tensors  # type: ignore[return-value]  # the line above showed that none is None
        raise ConfigError(self._complaint(inputs))

    def _complaint(self, inputs: Mapping[str, Tensor]) -> str:
        wanted = {edge.name: edge for edge in self.inputs}
        faults = [f"{name} is missing" for name in wanted if name not in inputs]
        faults += [f"{name} is not an input" for name in inputs if name not in wanted]
        for name, tensor in inputs.items():
            edge = wanted.get(name)
            if edge and not self._fits(edge, tensor):
                faults.append(f"{name} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}")
        rows = {name: len(tensor) for name, tensor in inputs.items() if tensor.dim()}
        if len(set(rows.values())) > 1:
            faults.append("rows differ: " + ", ".join(f"{name} has {count}" for name, count in rows.items()))
        takes = "; ".join(map(str, self.inputs))
        return f"program {self.program!r} at profile {self.profile!r}: {'; '.join(faults)}. It takes {takes}, with {BATCH} from 1 to {self.max_batch}"

    def _fits(self, edge: Edge, tensor: Tensor) -> bool:
        if tensor.dtype is not torch_dtype(edge.dtype) or tensor.dim() == 0:
            return False
        return tensor.shape[1:] == edge.sizes and 1 <= len(tensor) <= self.max_batch

    def to_json(self) -> dict[str, Any]:
        return {"inputs": [_edge_json(e) for e in self.inputs], "outputs": [_edge_json(e) for e in self.outputs], "max_batch": self.max_batch}

    @classmethod
    def from_json(cls, program: str, profile: str, data: Mapping[str, Any]) -> Signature:
        inputs, outputs = (tuple(Edge(e["name"], e["dtype"], tuple(e["sizes"])) for e in data[side]) for side in ("inputs", "outputs"))
        return cls(program, profile, inputs, outputs, data["max_batch"])


def _edge(spec: TensorSpec, program: Program, profile: Profile) -> Edge:
    missing = [size for size in spec.shape[1:] if isinstance(size, str) and size not in profile.sizes]
    if missing:
        raise ConfigError(
            f"program {program.name!r}: profile {profile.name!r} gives no number to {', '.join(missing)} of tensor {spec.name!r}; it has {dict(profile.sizes)}"
        )
    return Edge(spec.name, spec.dtype, spec.sizes(profile))


def _edge_json(edge: Edge) -> dict[str, Any]:
    return {"name": edge.name, "dtype": edge.dtype, "sizes": list(edge.sizes)}
