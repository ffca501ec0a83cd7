"""reel-tiny from words to video, beside the CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from timeit import timeit

import torch
from torch import Tensor

from reelstep.benchmarks.gpu_check.apart import apart
from reelstep.benchmarks.gpu_check.bench import Bench, Finding, checked
from reelstep.benchmarks.gpu_check.bounds import relative
from reelstep.benchmarks.gpu_check.fp8 import without_e4m3

STEPS = 6
Run = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def end_to_end(bench: Bench) -> Iterator[Finding]:
    yield from apart(words_to_video, bench.device)


def words_to_video(bench: Bench) -> Iterator[Finding]:
    """reel-tiny from words to video in a few Euler steps: on the CPU, on the device op by op, and with the denoiser compiled by inductor."""
    from reelstep.compiler.capture import capture  # here: these want einops, and the other parts do not
    from reelstep.compiler.passes import apply_passes
    from reelstep.compiler.passes.quantise import linears, quantise
    from reelstep.compiler.program import Program
    from reelstep.compiler.signature import Signature
    from reelstep.engine.models.byte_text import tokenize
    from reelstep.engine.models.reel_tiny import SPEC

    programs = {program.name: program for program in SPEC.programs(SPEC.build())}
    tokens = torch.tensor([tokenize("a red balloon rises", SPEC.settings.text_length)])
    noise = torch.randn((1, 16, 4, 8, 8), generator=torch.Generator().manual_seed(0))

    def plain(name: str, device: torch.device) -> Run:
        program = programs[name]
        module = program.module.to(device)

        def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {program.outputs[0].name: module(*(inputs[edge.name].to(device) for edge in program.inputs)).cpu()}

        return run

    def timed(runs: Mapping[str, Run]) -> tuple[Tensor, float]:
        text_to_video(runs, tokens, noise)
        began = time.perf_counter()
        video = text_to_video(runs, tokens, noise)
        return video, time.perf_counter() - began

    truth, seconds = timed({name: plain(name, torch.device("cpu")) for name in programs})
    yield Finding("reel-tiny, CPU, op by op, float32", seconds, note=f"{STEPS} steps; what the others are compared with")
    if bench.device.type == "cpu":
        return
    runs = {name: plain(name, bench.device) for name in programs}
    with exact_float32():
        video, seconds = timed(runs)
    yield checked("reel-tiny, op by op, float32", relative(video, truth), 1e-3, seconds)
    from reelstep.compiler.backends.inductor import InductorBackend  # here: without a C++ compiler what is above still ran

    def denoiser() -> Program:
        """With weights of its own: those above have moved."""
        return next(program for program in SPEC.programs(SPEC.build()) if program.name == "denoise")

    denoise = denoiser()
    profile, backend = denoise.profile("video"), InductorBackend(device=str(bench.device), autotune=False)
    signature = Signature.of(denoise, profile)
    exported, _ = apply_passes(capture(denoise, profile), keep=backend.keeps("sm"))
    in_fp8 = quantise(exported, signature, "fp8", linears(exported).values(), {})
    given = {edge.name: edge.zeros(1, bench.device) for edge in signature.inputs}
    module = denoiser().module.to(bench.device, torch.bfloat16)
    halves = [x.bfloat16() for x in signature.ordered(given)]
    peer = per_call(partial(module, *halves), bench)
    yield Finding("reel-tiny, denoiser's call, op by op, bfloat16", peer)

    def beside(what: str, seconds: float) -> Finding:
        return Finding(f"reel-tiny, denoiser's call, {what}", seconds, note=f"{peer / seconds:.1f} times as fast as op by op")

    with TemporaryDirectory() as folder:

        def built_for(dtype: str, cuda_graphs: bool) -> Run:
            graph = {"bfloat16": exported, "E4M3": in_fp8}[dtype]
            return replace(backend, cuda_graphs=cuda_graphs).build(lambda: graph, signature, "bfloat16", Path(folder), dtype)

        for dtype, cuda_graphs in (("bfloat16", False), ("bfloat16", True), ("E4M3", True)):
            if dtype == "E4M3" and (why := without_e4m3(bench)):
                yield Finding("reel-tiny, denoiser by inductor, E4M3", note=why)
                continue
            began = time.perf_counter()
            runs["denoise"] = run = built_for(dtype, cuda_graphs)
            built = time.perf_counter() - began
            video, seconds = timed(runs)
            how = f"by inductor, {dtype}{', CUDA graphs' if cuda_graphs else ''}"
            row = Finding(f"reel-tiny, denoiser {how}", seconds, error=relative(video, truth), note=f"engine ready in {built:.0f} s")
            yield row if dtype == "E4M3" else replace(row, allowed=5e-2, right=row.error is not None and row.error <= 5e-2)
            yield beside(how, per_call(partial(run, given), bench))
    compiled = torch.compile(module, mode="reduce-overhead")
    yield beside("torch.compile, bfloat16, CUDA graphs", per_call(partial(compiled, *halves), bench))


def per_call(run: Callable[[], object], bench: Bench, calls: int = 30) -> float:
    """Seconds until a call has ended, its launches among them: the median."""

    def ended() -> None:
        run()
        bench.wait()

    for _ in range(3):
        ended()
    return statistics.median(timeit(ended, number=1) for _ in range(calls))


@contextmanager
def exact_float32() -> Iterator[None]:
    """Inside, cuDNN does not round float32 to TF32."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def text_to_video(runs: Mapping[str, Run], tokens: Tensor, noise: Tensor) -> Tensor:
    """[1, 3, frames, height, width], without guidance and without a picture."""
    from reelstep.engine.samplers.ns import drive, sample, start
    from reelstep.engine.samplers.paths import PATHS
    from reelstep.engine.samplers.schedules import SCHEDULES
    from reelstep.engine.samplers.tables import SOLVERS

    context = runs["encode_text"]({"tokens": tokens})["context"]
    table = SOLVERS["euler"].build(SCHEDULES["linear"](STEPS), PATHS["condot"])

    def velocity(x: Tensor, t: float) -> Tensor:
        modulation = runs["embed_time"]({"t": torch.tensor([t], dtype=torch.float32)})["modulation"]
        return runs["denoise"]({"x": x, "modulation": modulation, "condition": torch.zeros_like(noise), "context": context})["velocity"]

    return runs["decode"]({"latent": drive(sample(table, start(table, noise)), velocity)})["video"]
