"""What an op is: a formula in torch, its name in the torch library `reelstep`, and its Triton kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd.forward_ad import unpack_dual
from torch.utils import _pytree as pytree

from reelstep.errors import ConfigError

NAMESPACE = "reelstep"

Argument = str | int | bool | None | tuple[str, ...]
"""Of a kernel compiled ahead: a Triton type ("*bf16", "i32", "fp32"), a tuple of them, or the value of a constant."""


@dataclass(frozen=True)
class Kernel:
    """One Triton kernel with the types and constants that it is compiled for when no GPU is at hand."""

    name: str
    function: Any  # of triton.jit
    arguments: Mapping[str, Argument]
    warps: int
    stages: int
    min_arch: int = 80


class Make(Protocol):
    """Makes a random tensor. Who asks for examples chooses device, layout, and the dtype of all that name none."""

    def __call__(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Op:
    """One op. All callables take the same arguments; tensors may be strided in any way."""

    name: str
    reference: Callable[..., Any]  # the formula, in float32, or in float64 for inputs of float64
    decomposition: Callable[..., Any]  # the same for a backend that does not keep the op; the reference, unless a backend has an operator for a part
    launch: Callable[..., Any]  # the Triton kernel, for CUDA tensors and for Triton's interpreter
    kernels: Callable[[int], tuple[Kernel, ...]]  # from an arch, 90 for sm90
    examples: Callable[[Make], Iterator[tuple[Any, ...]]]  # arguments worth testing: usual, odd, empty, of one element

    @property
    def overload(self) -> OpOverload:
        """What stands in a graph."""
        overload: OpOverload = getattr(torch.ops.reelstep, self.name).default
        return overload

    def __call__(self, *arguments: Any) -> Any:
        """The op; where a derivative is wanted, its formula, which torch can differentiate as often as asked."""
        return (self.reference if differentiated(arguments) else self.overload)(*arguments)


def define(
    name: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    launch: Callable[..., Any],
    kernels: Callable[[int], tuple[Kernel, ...]],
    examples: Callable[[Make], Iterator[tuple[Any, ...]]],
    decomposition: Callable[..., Any] | None = None,
    run: Callable[..., Any] | None = None,
) -> Op:
    """Register `reelstep::NAME` with the signature of `reference`, which must give new tensors.

    fake: the same outputs without values. run: what calls run on every device, for an op that chooses by itself; if None, the reference on a CPU and
    in float64, the kernel on a GPU, and the outputs are contiguous, as `fake` must make them. The custom op has no autograd; `Op.__call__` does not use it
    where a derivative is wanted.
    """
    from reelstep.kernels.jit import HAS_TRITON  # here: who only reads the table of ops is spared Triton's import

    def formula(*arguments: Any) -> Any:
        found = reference(*arguments)  # laid out like its inputs, which a compiler that has seen `fake` does not expect
        return found.contiguous() if isinstance(found, Tensor) else tuple(x.contiguous() for x in found)

    schema = torch.library.infer_schema(reference, mutates_args=())
    op = torch.library.custom_op(f"{NAMESPACE}::{name}", run or formula, mutates_args=(), schema=schema)
    op.register_fake(fake)
    if run is None and HAS_TRITON:
        op.register_kernel("cuda")(exactly(launch, formula))
    return Op(name, reference, decomposition or reference, launch, kernels, examples)


def exactly(launch: Callable[..., Any], formula: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, which computes in float32; the formula where an argument is float64 and asks for more."""

    def run(*arguments: Any) -> Any:
        return (formula if any(x.dtype == torch.float64 for x in tensors_of(arguments)) else launch)(*arguments)

    return run


def differentiated(arguments: Any) -> bool:
    """Whether autograd follows any of the arguments: backwards, or forwards with a tangent."""
    tensors = tensors_of(arguments)
    backwards = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return backwards or any(unpack_dual(x).tangent is not None for x in tensors)


def tensors_of(values: Any) -> list[Tensor]:
    """Those in it, also in lists."""
    return [x for x in pytree.tree_leaves(values) if isinstance(x, Tensor)]


def wide(x: Tensor) -> Tensor:
    """x in the precision that formulas run in: float32, or float64 if it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def check_shape(op: str, what: str, given: Tensor, *allowed: tuple[int, ...]) -> None:
    """Raises ConfigError unless `given` has one of the allowed shapes."""
    if tuple(given.shape) not in allowed:
        raise ConfigError(f"{op}: {what} has shape {list(given.shape)}; it must be {' or '.join(str(list(shape)) for shape in allowed)}")


def check_rank(op: str, what: str, given: Tensor, legend: str) -> None:
    """Raises ConfigError unless `given` has as many dims as the legend, such as "B L D", names."""
    if given.ndim != len(legend.split()):
        raise ConfigError(f"{op}: {what} has shape {list(given.shape)}; it must be [{', '.join(legend.split())}]")
