"""How fast is one denoise call through the engine, against PyTorch eager, torch.compile and raw OpenVINO?

All contenders run the same weights on the same inputs, in turn, in one process. Quality beside speed: relative L2 error against eager
float32. "raw openvino" is the same model converted and called by hand, with its tensors bound once: the floor of our own overhead.
The bound: `share_of_peak` is the call's FLOP rate over the best that a large matrix product reaches in the same run.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import openvino as ov
import torch
from torch import Tensor, nn

from reelstep.benchmarks.harness import Row, interleave, parser, report
from reelstep.compiler.backends import BACKENDS
from reelstep.compiler.capture import capture
from reelstep.compiler.load import load
from reelstep.compiler.passes.decompose_ops import decompose_ops
from reelstep.compiler.program import Precision, Profile, Program
from reelstep.compiler.signature import Signature
from reelstep.compiler.skus import SKUS
from reelstep.engine.build import build_bundle
from reelstep.engine.models import MODELS

HINTS: Mapping[Precision, str] = {"float32": "f32", "bfloat16": "bf16"}


def inputs_of(signature: Signature, rows: int, seed: int) -> dict[str, Tensor]:
    """Standard normal inputs; modulation at a tenth, where a trained model has it."""
    generator = torch.Generator().manual_seed(seed)
    scale = {"modulation": 0.1}
    return {e.name: torch.randn((rows, *e.sizes), generator=generator) * scale.get(e.name, 1.0) for e in signature.inputs}


def raw_openvino(program: Program, profile: Profile, inputs: Mapping[str, Tensor], precision: Precision) -> Callable[[], Tensor]:
    """The program as somebody would run it without us: convert, static shapes, the runtime's own precision hint, one request."""
    model = ov.convert_model(decompose_ops(capture(program, profile)))  # it knows torch's operators, and not ours
    model.reshape(dict(zip(model.inputs, [ov.PartialShape(list(x.shape)) for x in inputs.values()], strict=True)))
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": HINTS[precision], "INFERENCE_NUM_THREADS": SKUS["cpu"].units}
    request = ov.Core().compile_model(model, "CPU", options).create_infer_request()
    arrays = [x.numpy() for x in inputs.values()]

    def run() -> Tensor:
        for i, array in enumerate(arrays):
            request.set_input_tensor(i, ov.Tensor(array, shared_memory=True))
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data)

    return run


def torch_contenders(module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[tuple[str, Precision], Callable[[], Tensor]]:
    """Eager and torch.compile, in float32 and under bfloat16 autocast; compiled with frozen weights, PyTorch's best on a CPU."""
    arguments = list(inputs.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor warns of freezing being a prototype
        compiled: Any = torch.compile(module, options={"freezing": True})

    def plain(run: Callable[..., Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.no_grad():
                return run(*arguments)

        return call

    def autocast(run: Callable[..., Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                return run(*arguments).float()

        return call

    return {
        ("eager", "float32"): plain(module), ("eager", "bfloat16"): autocast(module),
        ("torch.compile", "float32"): plain(compiled), ("torch.compile", "bfloat16"): autocast(compiled),
    }  # fmt: skip


def peak_flop_per_s(precision: Precision) -> float:
    """What this machine's cores really reach: the best of twenty products of two 2048 x 2048 matrices."""
    a, b = torch.randn(2, 2048, 2048, generator=torch.Generator().manual_seed(0)).to(getattr(torch, precision))
    best = float("inf")
    for _ in range(20):
        began = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - began)
    return 2 * 2048**3 / best


def measure(model: str, profile_name: str, rows: int, rounds: int, cache: Path, seed: int) -> list[Row]:
    """All contenders on one denoise call."""
    spec = MODELS[model]
    program = next(p for p in spec.programs(spec.build()) if p.name == "denoise")
    profile = program.profile(profile_name)
    inputs = inputs_of(Signature.of(program, profile), rows, seed)
    contenders = torch_contenders(program.module, inputs)
    bundle = build_bundle(model, backend="openvino", precision="float32", out=cache / f"bench-{model}.reel", cache=cache)
    precisions = BACKENDS["openvino"].precisions
    contenders = {key: run for key, run in contenders.items() if key[1] in precisions}
    for precision in precisions:
        engine = load(bundle, cache, precision=precision)["denoise", profile_name]
        contenders["reelstep", precision] = lambda engine=engine: engine(inputs)["velocity"]  # type: ignore[misc]
        contenders["raw openvino", precision] = raw_openvino(program, profile, inputs, precision)
    truth = contenders["eager", "float32"]().clone()
    errors = {key: float((run() - truth).norm() / truth.norm()) for key, run in contenders.items()}
    peaks = {precision: peak_flop_per_s(precision) for precision in precisions}
    flops = rows * bundle.plan.program("denoise", profile_name).flops
    times = interleave({"/".join(key): run for key, run in contenders.items()}, rounds)
    base = times["eager/float32"].median_s
    raw = {precision: times[f"raw openvino/{precision}"].median_s for precision in precisions}
    rows_out: list[Row] = []
    for (contender, dtype), error in errors.items():
        t = times[f"{contender}/{dtype}"]
        row = {
            "model": model,
            "program": "denoise",
            "shape": "x".join(map(str, inputs["x"].shape)),
            "dtype": dtype,
            "contender": contender,
            "median_s": t.median_s,
            "p10_s": t.p10_s,
            "p90_s": t.p90_s,
            "rounds": t.rounds,
            "ratio_to_eager_f32": base / t.median_s,
            "over_raw_openvino": t.median_s / raw[dtype],
            "share_of_peak": flops / t.median_s / peaks[dtype],
            "rel_l2": error,
        }
        rows_out.append(row)
    return rows_out


def main(argv: Sequence[str]) -> None:
    options = parser("engine", __doc__ or "")
    options.add_argument("--rounds", type=int, default=30, help="of reel-tiny; the mid-size model runs half as many (default: %(default)s)")
    args = options.parse_args(argv)
    rows = measure("reel-tiny", "video", 1, args.rounds * 4, args.cache, args.seed)
    rows += measure("dit-mid", "video", 1, max(5, args.rounds // 2), args.cache, args.seed)
    report("one denoise call", rows, args.seed, args.json)
