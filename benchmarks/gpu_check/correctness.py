"""Does every kernel compute what its formula says?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from multiprocessing import get_context

import torch
from torch import Tensor

from reelstep.benchmarks.gpu_check.bench import LARGE, Bench, Finding, checked, tried
from reelstep.benchmarks.gpu_check.bounds import FROM_HALVES, doubled, error_and_bound, worst
from reelstep.kernels import OPS
from reelstep.kernels.jit import HAS_TRITON, interpreted
from reelstep.kernels.op import Op

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def correctness(bench: Bench) -> Iterator[Finding]:
    """Every op over its own examples, each in a process of its own: nearly all the time is Triton's, which compiles a kernel for each shape.

    Attention first, since it tries its tiles on every shape.
    """
    asked = [(name, dtype, bench.device) for name in sorted(OPS, key=lambda name: name != "attention") for dtype in DTYPES]
    with get_context("spawn").Pool(min(len(asked), len(os.sched_getaffinity(0)))) as pool:
        yield from pool.imap(_check_op, asked)


def _check_op(asked: tuple[str, torch.dtype, torch.device]) -> Finding:
    name, dtype, device = asked
    torch.set_num_threads(1)
    with torch.inference_mode():
        return tried(in_dtype(name, dtype), lambda: check_op(OPS[name], dtype, Bench(device, LARGE)), right=False)


def in_dtype(name: str, dtype: torch.dtype) -> str:
    return f"{name} {str(dtype).removeprefix('torch.')}"


def check_op(op: Op, dtype: torch.dtype, bench: Bench) -> Finding:
    """The kernel where one can run here, else what the op runs instead."""
    here = HAS_TRITON and (bench.device.type == "cuda" or interpreted(op.kernels(90)[0].function))

    def make(*sizes: int, dtype: torch.dtype | None = dtype) -> Tensor:
        return torch.randn(sizes, generator=bench.generator, device=bench.device).to(dtype)

    pairs = []
    for arguments in op.examples(make):
        found = op.launch(*arguments) if here else op.overload(*arguments)
        float32 = 4 * torch.finfo(torch.float32).eps if here else FROM_HALVES
        pairs.append(error_and_bound(found, op.reference(*arguments), op.reference(*doubled(arguments)), float32))
    error, allowed = worst(pairs)
    return checked(in_dtype(op.name, dtype), error, allowed, note="kernel" if here else "no Triton kernel here: what the op runs")
