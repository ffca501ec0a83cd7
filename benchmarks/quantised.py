"""What do 8-bit layers gain in speed and size on this CPU, and what do they lose?

One call of a denoiser through our engine, of one row and, of the small network, of 2 and 16: float32, the backend's default (bfloat16 where the CPU has it)
and each scheme of quantisation, in turn, in one process. The small network is called a few times in a row, as a sampler calls it: its weights fit into
a cache that the others would have emptied. Relative L2 error of the call to float32, and the bytes of the graph's weights as the bundle has them.
Of a model that does tasks also PSNR and SSIM of held-out requests' results to float32 ones, of all tasks and of videos alone. `dit-mid` and `wan-block` have
random weights and random calls, so nothing is said of their videos.
Needs the `bench` and `training` extras, and diffusers for `wan-block`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from reelstep.benchmarks.animation import psnr
from reelstep.benchmarks.engine import Subject as Call
from reelstep.benchmarks.engine import inputs_of, registered, wan_block
from reelstep.benchmarks.harness import Row, interleave, parser, report
from reelstep.benchmarks.steps import ssim
from reelstep.compiler.backends import BACKENDS
from reelstep.compiler.bundle import Bundle
from reelstep.compiler.compile import compile_model
from reelstep.compiler.load import load_later
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
IN_A_ROW = 4
VIDEO = "text_to_video"


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
    """A model, the call that is timed, and requests to quantise it by. videos: more such requests, for their results alone; None where there are none."""

    name: str
    programs: tuple[Program, ...]
    key: tuple[str, str]
    requests: Requests
    videos: Requests | None
    rounds: int
    batches: tuple[int, ...]  # rows of a call
    in_a_row: int  # calls


def sampled(name: str, rounds: int, seed: int) -> Subject:
    """The denoiser of a model that does tasks, on a video."""
    spec = MODELS[name]
    prompts = PROMPTS[name](2 * PROMPTS_EACH, seed)
    films = replace(spec, settings=replace(spec.settings, defaults={VIDEO: spec.settings.defaults[VIDEO]}))
    requests, videos = (TaskRequests.of(each, prompts[:PROMPTS_EACH], prompts[PROMPTS_EACH:], psnr, ssim) for each in (spec, films))
    return Subject(name, spec.programs(spec.build()), ("denoise", "video"), requests, videos, rounds, (1, 2, 16), IN_A_ROW)


def called(made: Call, seed: int) -> Subject:
    """A network without tasks."""
    program = replace(made.program, profiles=(made.profile,))
    requests = RandomCalls(Signature.of(program, made.profile), seed)
    return Subject(made.name, (program,), (program.name, made.profile.name), requests, None, made.rounds, (1,), 1)


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
    engines = {name: load_later(bundle, cache, precision="float32" if name == "float32" else None) for name, bundle in bundles.items()}
    exact = engines["float32"]
    qualities = {name: quality(subject, exact, made) for name, made in engines.items()}
    rows: list[Row] = []
    for batch in subject.batches:
        inputs: Mapping[str, Tensor] = inputs_of(plain.signatures[subject.key], batch, seed)
        calls = {name: partial(each[subject.key], inputs) for name, each in engines.items()}
        outputs = {name: next(iter(call().values())) for name, call in calls.items()}
        times = interleave({name: partial(repeat, call, subject.in_a_row) for name, call in calls.items()}, subject.rounds)
        truth = outputs["float32"]
        for name, bundle in bundles.items():
            record = bundle.plan.program(*subject.key).quantised
            median, p10, p90 = (seconds / subject.in_a_row for seconds in (times[name].median_s, times[name].p10_s, times[name].p90_s))
            rows.append({
                "model": subject.name, "rows": batch, "layers": name, "quantised": record.layers if record else 0, "kept": len(record.kept) if record else None,
                "median_s": median, "p10_s": p10, "p90_s": p90, "rounds": subject.rounds,
                f"ratio_to_{default}": times[default].median_s / times[name].median_s, "rel_l2": float((outputs[name] - truth).norm() / truth.norm()),
                "weights_mb": bundle.weights_bytes(*subject.key, 4) / 1e6, **qualities[name],
            })  # fmt: skip
    return rows


def quality(subject: Subject, exact: Engines, made: Engines) -> dict[str, float | None]:
    """Of held-out results, of all tasks and of videos alone."""
    if subject.videos is None:
        return dict.fromkeys(("psnr_db", "ssim", "video_psnr_db", "video_ssim"))
    (all_psnr, all_ssim, _), (psnr_db, video_ssim, _) = (requests.compare(exact, made) for requests in (subject.requests, subject.videos))
    return {"psnr_db": all_psnr, "ssim": all_ssim, "video_psnr_db": psnr_db, "video_ssim": video_ssim}


def repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def main(argv: Sequence[str]) -> None:
    options = parser("quantised", __doc__ or "")
    options.add_argument("--rounds", type=int, default=20, help="of the large networks; of reel-tiny twice as many (default: %(default)s)")
    options.add_argument("--max-error", type=float, default=0.05, metavar="X", help="of a program, as of `reelstep compile` (%(default)g)")
    options.add_argument("--only", nargs="+", choices=("reel-tiny", "dit-mid", "wan-block"), help="networks (default: all)")
    args = options.parse_args(argv)
    subjects: Mapping[str, Callable[[], Subject]] = {
        "reel-tiny": lambda: sampled("reel-tiny", 2 * args.rounds, args.seed),
        "dit-mid": lambda: called(registered("dit-mid", args.rounds), args.seed),
        "wan-block": lambda: called(wan_block(args.rounds, args.seed), args.seed),
    }
    rows = [row for name, make in subjects.items() if name in (args.only or subjects) for row in measure(make(), args.max_error, args.cache, args.seed)]
    report("one network call in 8 bits", rows, args.seed, args.json)
