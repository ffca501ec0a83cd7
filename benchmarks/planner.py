"""How near does the planner come to measured times?

On this CPU: the rates of a large product and of a copy are measured, the corrections are fitted to some shapes of denoisers, and other shapes, held out, tell
the error. With --corrections the fit is written for `reelstep plan`. On GPUs: predictions from datasheets and the planner's own assumptions, fitted to nothing,
against times that others have published. Those differ in what they run, so a row says what share of the dense peak its time implies: one above 1 cannot be a
dense evaluation of the shape that it is said to be, and counts in no error.
"""

from __future__ import annotations

import json
import math
import statistics
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from scipy.optimize import least_squares

from reelstep.benchmarks.engine import inputs_of, peak_flop_per_s
from reelstep.benchmarks.harness import Row, interleave, parser, report, show
from reelstep.compiler.backends import BACKENDS
from reelstep.compiler.compile import compile_model
from reelstep.compiler.cost import Transformer, transformer_of
from reelstep.compiler.load import load
from reelstep.compiler.planner import ASSUMED, Corrections, Device, Figure, Sampling, Workload, device_of, rank, spent_on_call
from reelstep.compiler.program import Precision, Profile
from reelstep.compiler.skus import SKUS
from reelstep.engine.models import dit_mid, reel_tiny
from reelstep.engine.models.movie_gen import MovieGenConfig, MovieGenTransformer, denoise_program
from reelstep.errors import ConfigError
from reelstep.parallel.mesh import Mesh

NETWORKS: Mapping[str, tuple[MovieGenConfig, int]] = {
    "dit-mid": (dit_mid.CONFIG, dit_mid.TEXT_TOKENS),
    "reel-tiny": (reel_tiny.DENOISER_CONFIG, reel_tiny.TEXT_CONFIG.length),
    "wide": (replace(dit_mid.CONFIG, layers=4, width=512, heads=8, ffn=1408, text_widths=(512,)), dit_mid.TEXT_TOKENS),
}
"""Configurations with their text tokens. No correction is fitted to `wide`."""


@dataclass(frozen=True)
class Shape:
    """One network call."""

    network: str
    latent: tuple[int, int, int]  # F, H, W
    rows: int

    def profile(self, max_batch: int) -> Profile:
        return Profile("x".join(map(str, self.latent)), dict(zip("FHW", self.latent, strict=True)), max_batch)


FITTED = (
    Shape("dit-mid", (4, 16, 16), 1), Shape("dit-mid", (8, 16, 16), 2), Shape("dit-mid", (8, 32, 32), 1), Shape("dit-mid", (4, 32, 32), 2),
    Shape("reel-tiny", (1, 8, 8), 1), Shape("reel-tiny", (1, 8, 8), 16), Shape("reel-tiny", (4, 8, 8), 1), Shape("reel-tiny", (4, 8, 8), 4),
)  # fmt: skip
HELD_OUT = (
    Shape("dit-mid", (16, 32, 32), 1), Shape("dit-mid", (4, 32, 32), 1), Shape("dit-mid", (8, 16, 16), 4), Shape("dit-mid", (4, 16, 16), 2),
    Shape("reel-tiny", (1, 8, 8), 4), Shape("reel-tiny", (4, 8, 8), 2), Shape("reel-tiny", (4, 8, 8), 16), Shape("wide", (12, 16, 16), 1),
)  # fmt: skip


@dataclass(frozen=True)
class Timed:
    """A shape, what the planner knows of it, and what it took."""

    shape: Shape
    network: Transformer
    seconds: float


def measure(shapes: Sequence[Shape], precision: Precision, rounds: int, cache: Path, seed: int) -> list[Timed]:
    """The median of each shape, all in turn, through the engine that serves."""
    contenders: dict[str, Callable[[], object]] = {}
    networks: dict[str, Transformer] = {}
    for name in dict.fromkeys(shape.network for shape in shapes):
        config, text = NETWORKS[name]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = MovieGenTransformer(config).eval()
        ours = [shape for shape in shapes if shape.network == name]
        most = max(shape.rows for shape in ours)
        profiles = tuple({shape.latent: shape.profile(most) for shape in ours}.values())
        bundle = compile_model(
            model=name, version="1", settings={}, programs=(denoise_program(module, text, profiles),), backend="openvino", precision=precision,
            out=cache / f"bench-planner-{name}.reel", solvers={}, card="", cache=cache,
        )  # fmt: skip
        engines = load(bundle, cache, precision=precision)
        for shape in ours:
            profile, label = shape.profile(most).name, str(shape)
            engine = engines["denoise", profile]
            inputs = inputs_of(engine.signature, shape.rows, seed)
            contenders[label] = partial(engine, inputs)
            networks[label] = transformer_of(bundle.program("denoise", profile))
    times = interleave(contenders, rounds)
    return [Timed(shape, networks[str(shape)], times[str(shape)].median_s) for shape in shapes]


def copy_bytes_per_s() -> float:
    """What this machine's memory really gives: the best of twenty copies of 256 MB, read and written."""
    source = torch.ones(64_000_000)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(timeit.repeat(partial(target.copy_, source), number=1, repeat=20))


STARTS = {"product": 0.7, "attention": 0.5, "bandwidth": 0.7, "op_s": 1e-5, "call_s": 1e-4}
BOUNDS = {"product": (0.05, 1.5), "attention": (0.02, 1.5), "bandwidth": (0.05, 20.0), "op_s": (1e-7, 1e-3), "call_s": (1e-6, 1e-2)}
"""A share of bandwidth may pass 1: what fits the caches does not go to memory."""


def fit(timed: Sequence[Timed], device: Device, precision: Precision, source: str) -> Corrections:
    """The corrections with the least squares of log(predicted / measured)."""

    def chosen(logs: Sequence[float]) -> Corrections:
        return replace(ASSUMED, **{name: Figure(math.exp(value), source) for name, value in zip(STARTS, logs, strict=True)})

    def residuals(logs: Sequence[float]) -> list[float]:
        tried = Device(device.sku, {precision: chosen(logs)})
        return [math.log(predict(one, tried, precision) / one.seconds) for one in timed]

    low, high = zip(*(map(math.log, BOUNDS[name]) for name in STARTS), strict=True)
    found = least_squares(residuals, [math.log(value) for value in STARTS.values()], bounds=(low, high))
    return chosen([float(value) for value in found.x])


def predict(timed: Timed, device: Device, precision: Precision) -> float:
    return spent_on_call(timed.network, timed.shape.rows, Mesh.parse(""), device, precision).total


def calibrate(precisions: Sequence[Precision], rounds: int, cache: Path, seed: int) -> tuple[Device, list[Row]]:
    """What this CPU reaches, and how far predictions are from measured times, of shapes that were fitted and of those that were not."""
    peaks: dict[str, float] = {precision: peak_flop_per_s(precision) for precision in precisions}
    source = "measured: product of two 2048 x 2048 matrices, copy of 256 MB"
    sku = replace(SKUS["cpu"], peak_flops=peaks, bandwidth_bytes_per_s=copy_bytes_per_s(), source=source)
    device = Device(sku, {})
    rows: list[Row] = []
    for precision in precisions:
        timed = measure((*FITTED, *HELD_OUT), precision, rounds, cache, seed)
        fitted = fit(timed[: len(FITTED)], device, precision, f"measured: reelstep bench planner, {len(FITTED)} shapes in {precision}")
        device = replace(device, corrections={**device.corrections, precision: fitted})
        for one in timed:
            predicted = predict(one, device, precision)
            rows.append(
                {
                    "shape": f"{one.shape.network} {one.network.tokens} tokens x {one.shape.rows}",
                    "dtype": precision,
                    "fitted": "yes" if one.shape in FITTED else "held out",
                    "measured_s": one.seconds,
                    "predicted_s": predicted,
                    "error": predicted / one.seconds - 1,
                }
            )
    return device, rows


WAN_1_3B = Transformer(30, 1536, 12, 8960, gated=False, tokens=32_760, text_tokens=512, values_in=64, values_out=64, qk_norm=True)
WAN_14B = Transformer(40, 5120, 40, 13824, gated=False, tokens=32_760, text_tokens=512 + 257, values_in=144, values_out=64, qk_norm=True)
WAN_14B_720P = replace(WAN_14B, tokens=75_600)
"""Wan 2.1 (Wan Team 2025, arXiv:2503.20314): 832 x 480 x 81 frames and 1280 x 720 x 81; the 14B from an image, whose 257 tokens join the text."""


@dataclass(frozen=True)
class Published:
    """A time that others state, with guidance unless forwards equal NFE, for implementations without step caches or fewer bits."""

    who: str
    network: Transformer
    sku: str
    devices: int
    nfe: int
    forwards: int
    seconds: float
    source: str


ONE = (("LightX2V", 5.18), ("SGLang", 6.13), ("FastVideo", 7.35), ("xDiT", 8.93), ("diffusers", 9.77))
EIGHT = (("LightX2V", 0.75), ("SGLang", 1.19), ("xDiT", 2.70), ("FastVideo", 2.94))
LIGHTX2V, VIDEO = "LightX2V README, 2025-12-01, seconds of a step", "LightX2V benchmark_source.md, seconds of a video"
PUBLISHED = (
    *(Published(who, WAN_14B, "h100-sxm", 1, 1, 2, seconds, LIGHTX2V) for who, seconds in ONE),
    *(Published(who, WAN_14B, "h100-sxm", 8, 1, 2, seconds, LIGHTX2V) for who, seconds in EIGHT),
    Published("LightX2V", WAN_14B, "h100-sxm", 8, 1, 1, 0.39, LIGHTX2V),
    *(Published(who, WAN_14B, "h200-sxm", 1, 40, 80, seconds, VIDEO) for who, seconds in (("LightX2V", 216), ("FastVideo", 292), ("Wan", 366))),
    *(Published(who, WAN_14B_720P, "h200-sxm", 1, 40, 80, seconds, VIDEO) for who, seconds in (("LightX2V", 751), ("FastVideo", 914), ("Wan", 974))),
    Published("FastVideo", WAN_1_3B, "a100-80g", 1, 50, 100, 198.1, "FastVideo optimizations.md, compiled, seconds of a video"),
    Published("SGLang", WAN_1_3B, "h100-sxm", 1, 1, 2, 0.1438, "SGLang perf_baselines/h100.json, wan2_1_t2v_1.3b, 2026-10-18"),
    Published("SGLang", WAN_14B_720P, "h100-sxm", 2, 1, 2, 1.92, "SGLang perf_baselines/h100.json"),
    Published("SGLang", WAN_1_3B, "rtx-5090", 1, 1, 2, 0.4266, "SGLang perf_baselines/5090.json"),
)  # fmt: skip


def compare() -> list[Row]:
    """Each published time beside the best that the planner ranks on as many devices."""
    rows: list[Row] = []
    for one in PUBLISHED:
        device = device_of(SKUS[one.sku])
        workload = Workload("Wan 2.1", "the published size", one.network, one.network.block_parameters, ())
        ranking = rank(workload, device, devices=one.devices, samplings=[Sampling("euler", one.nfe, one.forwards, "")], precisions=["bfloat16"])
        best = next(choice for choice in ranking.choices if choice.mesh.world == one.devices)
        implied = one.forwards * one.network.flops() / (one.seconds * one.devices * device.sku.peak_flops["bfloat16"])
        rows.append(
            {
                "network": f"{one.network.layers} x {one.network.width}, {one.network.tokens} tokens",
                "devices": f"{one.devices} x {one.sku}",
                "forwards": one.forwards,
                "who": one.who,
                "published_s": one.seconds,
                "predicted_s": best.latency_s,
                "mesh": str(best.mesh),
                "error": best.latency_s / one.seconds - 1 if implied <= 1 else None,
                "implied_share_of_peak": implied,
                "source": one.source,
            }
        )
    return rows


def errors_of(rows: Sequence[Row]) -> tuple[float, float]:
    """Median and largest size of the errors that count."""
    sizes = [abs(row["error"]) for row in rows if row["error"] is not None]
    return statistics.median(sizes), max(sizes)


def fastest(rows: Sequence[Row]) -> list[Row]:
    """Of each network, device and number of forwards the fastest published time that can be: what a roofline aims at."""
    best: dict[tuple[str, str, int], Row] = {}
    for row in rows:
        key = row["network"], row["devices"], row["forwards"]
        if row["error"] is not None and (key not in best or row["published_s"] < best[key]["published_s"]):
            best[key] = row
    return list(best.values())


def main(argv: Sequence[str]) -> None:
    options = parser("planner", __doc__ or "")
    options.add_argument("--rounds", type=int, default=20, help="of each shape and precision (default: %(default)s)")
    options.add_argument("--corrections", type=Path, metavar="FILE", help="write what was measured here, for `reelstep plan --corrections`")
    options.add_argument("--published-only", action="store_true", help="measure nothing; compare with published times alone")
    args = options.parse_args(argv)
    if args.published_only and args.corrections:
        raise ConfigError("--published-only measures nothing that --corrections could write; leave one of them out")
    summary = {}
    measured: list[Row] = []
    if not args.published_only:
        device, measured = calibrate(BACKENDS["openvino"].precisions, args.rounds, args.cache, args.seed)
        for precision in device.corrections:
            median, worst = errors_of([row for row in measured if row["dtype"] == precision and row["fitted"] == "held out"])
            summary[f"held out, {precision}"] = {"median": median, "worst": worst}
        show("predicted and measured network calls", measured)
        if args.corrections:
            args.corrections.write_text(json.dumps(device.to_json(), indent=1) + "\n")
    published = compare()
    for name, rows in (("published, all", published), ("published, fastest of each shape", fastest(published))):
        median, worst = errors_of(rows)
        summary[name] = {"median": median, "worst": worst}
    report("predicted and published times", published, args.seed, args.json, {"measured": measured, "errors": summary})
    for name, error in summary.items():
        print(f"{name}: median error {error['median']:.1%}, worst {error['worst']:.1%}")
