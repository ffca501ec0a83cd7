"""What do 8-bit layers gain in speed and size on this CPU, and what do they lose?

One call of a denoiser through our engine, of one row and, of the small network, of 16: float32, the backend's default (bfloat16 where the CPU has it) and
each scheme of quantisation, in turn, in one process. Relative L2 error of the call to float32, and the bytes of the graph's weights as the bundle has them.
Of a registered model also PSNR and SSIM of held-out requests' results to float32 ones. `wan-block` has random weights and random calls, so nothing is said
of its videos.
Needs the `bench` and `training` extras, and diffusers for `wan-block`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from reelstep.benchmarks.animation import psnr
from reelstep.benchmarks.engine import inputs_of, wan_block
from reelstep.benchmarks.harness import Row, interleave, parser, report
from reelstep.benchmarks.steps import ssim
from reelstep.compiler.backends import BACKENDS
from reelstep.compiler.bundle import Bundle
from reelstep.compiler.compile import compile_model
from reelstep.compiler.load import load
from reelstep.compiler.passes.quantise import Scheme
from reelstep.compiler.program import Program
from reelstep.compiler.quantisation import Calls, Engines, Quantisation, Requests
from reelstep.compiler.signature import Signature
from reelstep.engine.calibration import TaskRequests
from reelstep.engine.models import MODELS
from reelstep.training.fits import PROMPTS

SCHEMES: tuple[Scheme, ...] = ("int8", "int8-weights")
PROMPTS_EACH = 4  # to measure layers on, and as many to compare with
CALLS = 1  # of a network without requests


class RandomCalls:
    """Of a network that does no task: calls of random numbers, and no results to compare."""

    def __init__(self, signature: Signature, seed: int) -> None:
        self.signature, self.seed = signature, seed

    @property
    def identity(self) -> str:
        return f"random, seed {self.seed}"

    def calls(self, engines: Engines) -> Calls:
        return {key: [inputs_of(self.signature, 1, self.seed + 1 + k) for k in range(CALLS)] for key in engines}

    def compare(self, reference: Engines, quantised: Engines) -> tuple[float, float, int]:
        return 100.0, 1.0, 0


@dataclass(frozen=True)
class Subject:
    """A model, the call that is timed, and requests to quantise it by. results: whether these have any."""

    name: str
    programs: tuple[Program, ...]
    key: tuple[str, str]
    requests: Requests
    results: bool
    rounds: int
    batches: tuple[int, ...]  # rows of a call


def registered(name: str, rounds: int, seed: int) -> Subject:
    """The denoiser of a registered model, on a video."""
    spec = MODELS[name]
    prompts = PROMPTS[name](2 * PROMPTS_EACH, seed)
    requests = TaskRequests.of(spec, prompts[:PROMPTS_EACH], prompts[PROMPTS_EACH:], psnr, ssim)
    return Subject(name, spec.programs(spec.build()), ("denoise", "video"), requests, True, rounds, (1, 16))


def wan(rounds: int, seed: int) -> Subject:
    made = wan_block(rounds, seed)
    requests = RandomCalls(Signature.of(made.program, made.profile), seed)
    return Subject(made.name, (made.program,), (made.program.name, made.profile.name), requests, False, rounds, (1,))


def measure(subject: Subject, max_error: float, cache: Path, seed: int) -> list[Row]:
    compiled = partial(
        compile_model, model=subject.name, version="1", settings={}, programs=subject.programs, backend="openvino", solvers={}, card="", cache=None
    )
    default = BACKENDS["openvino"].default_precision()[0]
    plain = compiled(out=cache / f"bench-{subject.name}.reel")
    bundles: dict[str, Bundle] = {"float32": plain, default: plain}
    for scheme in SCHEMES:
        asked = Quantisation(scheme, max_error, 1.0, subject.requests)
        bundles[scheme] = compiled(out=cache / f"bench-{subject.name}-{scheme}.reel", quantisation=asked)
    engines = {name: load(bundle, None, precision="float32" if name == "float32" else None) for name, bundle in bundles.items()}
    qualities = {name: subject.requests.compare(engines["float32"], engines[name])[:2] if subject.results else (None, None) for name in bundles}
    rows: list[Row] = []
    for batch in subject.batches:
        inputs: Mapping[str, Tensor] = inputs_of(plain.signatures[subject.key], batch, seed)
        calls = {name: partial(each[subject.key], inputs) for name, each in engines.items()}
        outputs = {name: next(iter(call().values())) for name, call in calls.items()}
        times = interleave(calls, subject.rounds)
        exact = outputs["float32"]
        for name, bundle in bundles.items():
            record, time = bundle.plan.program(*subject.key).quantised, times[name]
            rows.append({
                "model": subject.name, "rows": batch, "layers": name, "quantised": record.layers if record else 0, "kept": len(record.kept) if record else None,
                "median_s": time.median_s, "p10_s": time.p10_s, "p90_s": time.p90_s, "rounds": time.rounds,
                f"ratio_to_{default}": times[default].median_s / time.median_s, "rel_l2": float((outputs[name] - exact).norm() / exact.norm()),
                "weights_mb": bundle.weights_bytes(*subject.key, 4) / 1e6, "psnr_db": qualities[name][0], "ssim": qualities[name][1],
            })  # fmt: skip
    return rows


def main(argv: Sequence[str]) -> None:
    options = parser("quantised", __doc__ or "")
    options.add_argument("--rounds", type=int, default=20, help="of wan-block; of reel-tiny four times as many (default: %(default)s)")
    options.add_argument("--max-error", type=float, default=0.05, metavar="X", help="of a program, as of `reelstep compile` (%(default)g)")
    options.add_argument("--only", nargs="+", choices=("reel-tiny", "wan-block"), help="networks (default: both)")
    args = options.parse_args(argv)
    subjects: Mapping[str, Callable[[], Subject]] = {
        "reel-tiny": lambda: registered("reel-tiny", 4 * args.rounds, args.seed),
        "wan-block": lambda: wan(args.rounds, args.seed),
    }
    rows = [row for name, make in subjects.items() if name in (args.only or subjects) for row in measure(make(), args.max_error, args.cache, args.seed)]
    report("one network call in 8 bits", rows, args.seed, args.json)
