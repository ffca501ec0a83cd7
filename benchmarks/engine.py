"""How fast is one network call through the engine, against PyTorch eager, torch.compile, ONNX Runtime and raw OpenVINO?

All contenders run the same weights on the same inputs, in turn, in one process. Quality beside speed: relative L2 error against eager
float32. "raw openvino" is the same model converted and called by hand, with its tensors bound once: the floor of our own overhead.
The bound: `share_of_peak` is the call's FLOP rate over the best that a large matrix product reaches in the same run.
`reel-tiny-guided` is a call of two rows, as guidance makes them, all others of one.
`wan-block` is two blocks of Wan 2.1 1.3B by diffusers (random weights, a picture of 832 x 480): a model that is none of ours.
Needs the `bench` extra, and diffusers for `wan-block`.
"""

from __future__ import annotations

import io
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnxruntime
import openvino as ov
import torch
from torch import Tensor, nn

from reelstep.benchmarks.harness import Row, interleave, parser, report
from reelstep.compiler.backends import BACKENDS
from reelstep.compiler.capture import capture
from reelstep.compiler.compile import compile_model
from reelstep.compiler.load import load
from reelstep.compiler.passes.decompose_ops import decompose_ops
from reelstep.compiler.passes.define_empty import define_empty
from reelstep.compiler.passes.drop_asserts import drop_asserts
from reelstep.compiler.passes.functionalise import functionalise
from reelstep.compiler.program import BATCH, Precision, Profile, Program, TensorSpec
from reelstep.compiler.signature import Signature
from reelstep.compiler.skus import SKUS
from reelstep.engine.models import MODELS

HINTS: Mapping[Precision, str] = {"float32": "f32", "bfloat16": "bf16"}


def inputs_of(signature: Signature, rows: int, seed: int) -> dict[str, Tensor]:
    """Standard normal inputs; modulation at a tenth, where a trained model has it, timesteps of up to some thousands."""
    generator = torch.Generator().manual_seed(seed)
    scale = {"modulation": 0.1, "timestep": 1000.0}
    return {e.name: torch.randn((rows, *e.sizes), generator=generator) * scale.get(e.name, 1.0) for e in signature.inputs}


def raw_openvino(program: Program, profile: Profile, inputs: Mapping[str, Tensor], precision: Precision) -> Callable[[], Tensor]:
    """The program as somebody would run it without us: convert, static shapes, the runtime's own precision hint, one request."""
    model = ov.convert_model(define_empty(functionalise(decompose_ops(capture(program, profile)))))  # without these it refuses some of the graphs
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


def onnx_runtime(program: Program, profile: Profile, inputs: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """The program in ONNX Runtime with static shapes, its tensors bound once. In float32 alone: its CPU kernels have no bfloat16."""
    rows = len(next(iter(inputs.values())))
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # the exporter tells its steps
        warnings.simplefilter("ignore")
        made: Any = torch.onnx.export(decompose_ops(capture(program, replace(profile, max_batch=rows))), (), dynamo=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = SKUS["cpu"].units
    session = onnxruntime.InferenceSession(made.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for port, x in zip(session.get_inputs(), inputs.values(), strict=True):
        binding.bind_cpu_input(port.name, x.numpy())
    binding.bind_output(session.get_outputs()[0].name)

    def run() -> Tensor:
        session.run_with_iobinding(binding)
        return torch.from_numpy(binding.get_outputs()[0].numpy())

    return run


def torch_contenders(program: Program, profile: Profile, inputs: Mapping[str, Tensor]) -> dict[tuple[str, Precision], Callable[[], Tensor]]:
    """Eager and torch.compile, in float32 and under bfloat16 autocast; compiled with frozen weights, PyTorch's best on a CPU.

    torch.compile gets the captured graph, in which our ops are their formulas: into the ops themselves it does not look, and would fuse less.
    """
    arguments, module = list(inputs.values()), program.module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor warns of freezing being a prototype
        graph = drop_asserts(decompose_ops(capture(program, replace(profile, max_batch=len(arguments[0]))))).module()  # its checks of types refuse autocast
        compiled: Any = torch.compile(graph, options={"freezing": True})

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


@dataclass(frozen=True)
class Subject:
    """One call of a network."""

    name: str
    program: Program
    profile: Profile
    rounds: int
    rows: int = 1


def registered(name: str, rounds: int, rows: int = 1) -> Subject:
    """The denoiser of a registered model, on a video."""
    spec = MODELS[name]
    program = next(p for p in spec.programs(spec.build()) if p.name == "denoise")
    return Subject(name, program, program.profile("video"), rounds, rows)


class WanBlocks(nn.Module):
    """Two blocks of Wan 2.1 1.3B (Wan Team 2025, arXiv:2503.20314) with what is before and after them, as diffusers has it."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import WanTransformer3DModel  # not at the top: seconds that every other benchmark would wait for, by way of `inputs_of`

        network: Any = WanTransformer3DModel(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=2, text_dim=4096)  # type: ignore[no-untyped-call]
        self.network = network

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        velocity: Tensor = self.network(x, timestep, context, return_dict=False)[0]
        return velocity


def wan_block(rounds: int, seed: int) -> Subject:
    """1,560 tokens of the picture, 512 of text."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = WanBlocks().eval()
    latent = (BATCH, 16, "F", "H", "W")
    inputs = (TensorSpec("x", "float32", latent), TensorSpec("timestep", "float32", (BATCH,)), TensorSpec("context", "float32", (BATCH, 512, 4096)))
    profile = Profile("picture", {"F": 1, "H": 60, "W": 104}, 1)
    return Subject("wan-block", Program("denoise", module, inputs, (TensorSpec("velocity", "float32", latent),), (profile,)), profile, rounds)


def measure(subject: Subject, cache: Path, seed: int) -> list[Row]:
    """All contenders on one call."""
    program, profile = subject.program, subject.profile
    inputs = inputs_of(Signature.of(program, profile), subject.rows, seed)
    contenders = torch_contenders(program, profile, inputs)
    bundle = compile_model(
        model=subject.name, version="1", settings={}, programs=(replace(program, profiles=(profile,)),), backend="openvino", precision="float32",
        out=cache / f"bench-{subject.name}.reel", solvers={}, card="", cache=cache,
    )  # fmt: skip
    precisions = BACKENDS["openvino"].precisions
    contenders = {key: run for key, run in contenders.items() if key[1] in precisions}
    contenders["onnx runtime", "float32"] = onnx_runtime(program, profile, inputs)

    def ours(backend: str, precision: Precision) -> Callable[[], Tensor]:
        engine = load(bundle, cache, backend, precision)[program.name, profile.name]
        return lambda: engine(inputs)["velocity"]

    contenders["reelstep, inductor", "float32"] = ours("inductor", "float32")
    for precision in precisions:
        contenders["reelstep", precision] = ours("openvino", precision)
        contenders["raw openvino", precision] = raw_openvino(program, profile, inputs, precision)
    truth = contenders["eager", "float32"]().clone()
    errors = {key: float((run() - truth).norm() / truth.norm()) for key, run in contenders.items()}
    peaks = {precision: peak_flop_per_s(precision) for precision in precisions}
    flops = subject.rows * bundle.plan.program(program.name, profile.name).flops
    times = interleave({"/".join(key): run for key, run in contenders.items()}, subject.rounds)
    base = times["eager/float32"].median_s
    raw = {precision: times[f"raw openvino/{precision}"].median_s for precision in precisions}
    rows_out: list[Row] = []
    for (contender, dtype), error in errors.items():
        t = times[f"{contender}/{dtype}"]
        row = {
            "model": subject.name,
            "program": program.name,
            "rows": subject.rows,
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
    options.add_argument(
        "--rounds",
        type=int,
        default=30,
        help="of reel-tiny four times as many, with both rows of guidance twice, of the larger networks half (default: %(default)s)",
    )
    options.add_argument("--only", nargs="+", choices=("reel-tiny", "reel-tiny-guided", "dit-mid", "wan-block"), help="networks (default: all)")
    args = options.parse_args(argv)
    few = max(5, args.rounds // 2)
    subjects: Mapping[str, Callable[[], Subject]] = {
        "reel-tiny": lambda: registered("reel-tiny", args.rounds * 4),
        "reel-tiny-guided": lambda: registered("reel-tiny", args.rounds * 2, 2),
        "dit-mid": lambda: registered("dit-mid", few),
        "wan-block": lambda: wan_block(few, args.seed),
    }
    rows = [row for name, make in subjects.items() if name in (args.only or subjects) for row in measure(make(), args.cache, args.seed)]
    report("one network call", rows, args.seed, args.json)
