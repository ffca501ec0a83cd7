"""One step of a solver under guidance, in one pass over memory: the guided velocity, then the next row of the solver's table.

u = u_null + scale (u_text - u_null);  x' = a x0 + b[0] u[0] + ... + b[n - 1] u[n - 1] + b[n] u. Ho and Salimans 2022, arXiv:2207.12598; Shaul et al.
2024, arXiv:2403.01329, equation 11. In separate operators that is a read and a write of the latent for every term.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from reelstep.errors import ConfigError
from reelstep.kernels.jit import check_launch, jit, tl
from reelstep.kernels.op import Argument, Kernel, Make, check_shape, define, wide

BLOCK, WARPS = 1024, 4
"""8 values a thread: the loads of all terms are in flight together, so each need not be long."""


def solver_step(
    base: Tensor, text: Tensor, null: Tensor | None, history: Sequence[Tensor], *, scale: float, a: float, b: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The next state and the guided velocity, both in the shape and dtype of `base`.

    base: x[0], or the settled sum that stands for it; text, null: what the network gave, null None for no guidance; history: stored velocities, one
    for each coefficient of b but the last, which is the new one's. All of one shape. Raises ConfigError if shapes or counts differ.
    """
    if len(b) != len(history) + 1:
        raise ConfigError(f"solver_step: {len(b)} coefficients for {len(history)} stored velocities and a new one; give {len(history) + 1}")
    for what, u in (("text", text), *(() if null is None else (("null", null),)), *((f"history[{j}]", u) for j, u in enumerate(history))):
        check_shape("solver_step", what, u, tuple(base.shape))
    out: tuple[Tensor, Tensor] = OP(base, text, null, list(history), scale, a, list(b))
    return out


def reference(base: Tensor, text: Tensor, null: Tensor | None, history: list[Tensor], scale: float, a: float, b: list[float]) -> tuple[Tensor, Tensor]:
    u = wide(text) if null is None else wide(null) + scale * (wide(text) - wide(null))
    x = wide(base) * a
    for coefficient, velocity in zip(b[:-1], history, strict=True):
        x = x + coefficient * wide(velocity)
    x = x + b[-1] * u
    return x.to(base.dtype), u.to(base.dtype, copy=True)  # unguided, u would be the caller's own tensor


def fake(base: Tensor, text: Tensor, null: Tensor | None, history: list[Tensor], scale: float, a: float, b: list[float]) -> tuple[Tensor, Tensor]:
    return base.new_empty(base.shape), base.new_empty(base.shape)


@jit
def solver_step_kernel(
    x: tl.tensor, u: tl.tensor, base: tl.tensor, text: tl.tensor, null: tl.tensor, history: tl.tuple, b: tl.tuple, scale: tl.tensor,
    a: tl.tensor, last: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """history and b are tuples: a kernel for each number of stored velocities, its sum unrolled."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    velocity = tl.load(text + at, mask=inside, other=0.0).to(tl.float32)
    if null is not None:
        unguided = tl.load(null + at, mask=inside, other=0.0).to(tl.float32)
        velocity = unguided + scale * (velocity - unguided)
    state = a * tl.load(base + at, mask=inside, other=0.0).to(tl.float32)
    for j in tl.static_range(len(history)):
        state += b[j] * tl.load(history[j] + at, mask=inside, other=0.0).to(tl.float32)
    state += last * velocity
    tl.store(x + at, state.to(x.dtype.element_ty), mask=inside)
    tl.store(u + at, velocity.to(u.dtype.element_ty), mask=inside)


def launch(base: Tensor, text: Tensor, null: Tensor | None, history: list[Tensor], scale: float, a: float, b: list[float]) -> tuple[Tensor, Tensor]:
    check_launch(solver_step_kernel, base)
    x, u = base.new_empty(base.shape), base.new_empty(base.shape)
    if count := base.numel():
        velocities = tuple(v.contiguous() for v in history)
        uncond = None if null is None else null.contiguous()
        solver_step_kernel[(-(-count // BLOCK),)](
            x, u, base.contiguous(), text.contiguous(), uncond, velocities, tuple(b[:-1]), scale, a, b[-1], count, BLOCK=BLOCK, num_warps=WARPS
        )
    return x, u


def kernels(arch: int) -> tuple[Kernel, ...]:
    made = []
    for stored in (0, 1, 3):
        history: dict[str, Argument] = {"history": ("*fp32",) * stored, "b": ("fp32",) * stored}
        networks = {"text": "*bf16", "null": "*bf16"}
        numbers: dict[str, Argument] = {"scale": "fp32", "a": "fp32", "last": "fp32", "count": "i32", "BLOCK": BLOCK}
        arguments: dict[str, Argument] = {"x": "*fp32", "u": "*fp32", "base": "*fp32", **networks, **history, **numbers}
        made.append(Kernel(f"solver_step_{stored}", solver_step_kernel, arguments, WARPS, 1))
    return tuple(made)


def examples(make: Make) -> Iterator[tuple[Any, ...]]:
    f32 = torch.float32
    for sizes, stored in (((2, 4, 1, 6, 5), 2), ((1,), 1), ((0, 4), 1), ((3, 700), 0), ((2, 3, 5), 5)):
        base, *history = (make(*sizes, dtype=f32) for _ in range(1 + stored))
        yield base, make(*sizes), make(*sizes), history, 3.5, 0.75, [0.25 * (j + 1) for j in range(stored + 1)]
    yield make(2, 9, dtype=f32), make(2, 9), None, [make(2, 9, dtype=f32)], 1.0, 1.0, [-0.5, 0.125]


OP = define("solver_step", reference=reference, fake=fake, launch=launch, kernels=kernels, examples=examples)
