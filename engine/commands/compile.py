"""Compile a model of the zoo into a bundle: graphs, weights, plan and solver tables."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from reelstep.engine.commands import Command
from reelstep.engine.commands.options import PRECISIONS, add_cache, add_precision, cache_dir, parse_lora, parse_path, tell_stage
from reelstep.errors import ConfigError

if TYPE_CHECKING:
    from reelstep.compiler.quantisation import Quantisation

QUANTISE_PROMPTS = 4
"""To measure layers on, and as many to compare with."""
MAX_ERROR, MIN_PSNR_DB = 0.05, 35.0
"""Of a quantised model."""
EXAMPLES = "  reelstep compile reel-tiny\n  reelstep compile reel-tiny -o fast --precision bf16 --explain\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model's name; a wrong one prints those there are")
    parser.add_argument("-o", "--out", type=parse_path, metavar="DIR", help="bundle to write (MODEL.reel)")
    parser.add_argument("--fitted", type=parse_path, action="append", default=[], metavar="FILE", help="made by `reelstep fit`; may be repeated")
    split = "add the denoiser in pieces, on the same weights, for requests with a step cache; they take memory where they are loaded"
    parser.add_argument("--step-cache", action="store_true", help=split)
    fuses = "fuse a LoRA into the weights: safetensors, strength 1 if not given; may be repeated; it costs nothing to run"
    parser.add_argument("--lora", type=parse_lora, action="append", default=[], metavar="FILE[=X]", help=fuses)
    takes = "add a denoiser that takes LoRAs of up to this rank with each request; it takes memory where it is loaded"
    parser.add_argument("--lora-rank", type=int, metavar="R", help=takes)
    add_quantisation(parser)
    planned = "of the ranks that shall share it, such as cp=8: the plan says what each runs, holds and sends, and no other mesh opens the bundle"
    parser.add_argument("--mesh", metavar="AXIS=N,...", help=planned)
    parser.add_argument("--explain", action="store_true", help="print the plan: every choice and its reason")
    parser.add_argument("--sku", default="cpu", metavar="NAME", help="what it shall run on (cpu); a wrong name prints those there are")
    parser.add_argument("--backend", help="what executes the programs (openvino on a CPU, tensorrt elsewhere; inductor runs on both)")
    portable = "build no native engines, as ever for a SKU that is not here: `reelstep finalize` does on the target"
    parser.add_argument("--portable", action="store_true", help=portable)
    parser.add_argument("--sign", type=parse_path, metavar="KEY", help="sign the bundle with this private key of `reelstep keygen`")
    add_precision(parser)
    add_cache(parser)


def add_quantisation(parser: argparse.ArgumentParser) -> None:
    schemes = "int8 (products of integers), int8-weights (a smaller bundle), fp8 or nvfp4 (for GPUs that have them): the denoiser's linear layers in few bits"
    parser.add_argument("--quantise", metavar="SCHEME", help=schemes)
    keeps = f"relative error of the denoiser on its own calls; its most sensitive layers stay as they are until it is met ({MAX_ERROR:g})"
    parser.add_argument("--max-error", type=float, metavar="X", help=keeps)
    parser.add_argument("--min-psnr", type=float, metavar="DB", help=f"fail if other requests come out worse than this, to float32 ({MIN_PSNR_DB:g})")
    asks = f"one a line: the first {QUANTISE_PROMPTS} of the first half to measure layers on, of the second half to compare (the model's own kind)"
    parser.add_argument("--prompts", type=parse_path, metavar="FILE", help=asks)


def run(args: argparse.Namespace) -> None:
    from reelstep.compiler.backends import BACKENDS
    from reelstep.compiler.bundle import sign_bundle
    from reelstep.compiler.describe import not_run
    from reelstep.compiler.load import on_this_machine
    from reelstep.compiler.signing import read_private_key
    from reelstep.engine.build import build_bundle
    from reelstep.parallel.mesh import Mesh

    out = args.out or Path(f"{args.model}.reel")
    precision = PRECISIONS.get(args.precision)
    key = read_private_key(args.sign) if args.sign else None  # a wrong file is found before the work
    backend = args.backend or ("openvino" if args.sku == "cpu" else "tensorrt")
    bundle = build_bundle(
        args.model, backend=backend, sku=args.sku, precision=precision, out=out, cache=cache_dir(args), portable=args.portable, fitted=args.fitted,
        step_cache=args.step_cache, loras=args.lora, lora_rank=args.lora_rank, quantisation=build_quantisation(args),
        mesh=Mesh.parse(args.mesh) if args.mesh else None, progress=tell_stage,
    )  # fmt: skip
    if key:
        bundle = sign_bundle(out, key, bundle)
    if args.explain:
        print(bundle.plan.explain())
    print(f"{bundle.path}  {bundle.total_bytes / 1e6:.1f} MB, plan {bundle.plan.hash[:16]}{f', signed by {bundle.signed_by}' if key else ''}")
    if unseen := not_run(bundle.plan):
        print(unseen)
    if not BACKENDS[backend].runs:
        print(f"a plan alone: backend {backend!r} computes nothing; read it with `reelstep inspect {bundle.path}`")
    elif not bundle.has_weights:
        print(f"a plan alone: model {args.model!r} comes without weights, so that nothing can run it; read it with `reelstep inspect {bundle.path}`")
    elif bundle.plan.mesh:
        there = "" if on_this_machine(args.sku) else f" on {args.sku}"
        print(f"its ranks build their engines when it is opened{there}: `reelstep serve {bundle.path} --mesh {bundle.plan.mesh_name}`")
    elif args.portable or not on_this_machine(args.sku):
        engines = ", ".join(f"{program} {profile}" for program, profile in bundle.signatures)
        print(f"left to {args.sku}: the engines of {backend} for {engines}; build them there with `reelstep finalize {bundle.path.name}`")


def build_quantisation(args: argparse.Namespace) -> Quantisation | None:
    """What --quantise asks for: prompts of the model's own kind unless a file has others, and the measures of the benchmarks."""
    limits = {"--max-error": args.max_error, "--min-psnr": args.min_psnr, "--prompts": args.prompts}
    if args.quantise is None:
        if inert := [option for option, value in limits.items() if value is not None]:
            raise ConfigError(f"{inert[0]} without --quantise, which it belongs to; add --quantise SCHEME, or leave it out")
        return None
    from reelstep.benchmarks.animation import psnr
    from reelstep.benchmarks.steps import ssim
    from reelstep.compiler.quantisation import Quantisation
    from reelstep.engine.calibration import TaskRequests, check_tasks
    from reelstep.engine.models import MODELS
    from reelstep.training.fits import choose_prompts

    spec = MODELS[args.model]  # a wrong name has no prompts either
    check_tasks(spec)  # before prompts are asked for, which would not help
    args.pairs, args.seed = QUANTISE_PROMPTS, 0
    measured, compared = choose_prompts(args)
    requests = TaskRequests.of(spec, tuple(dict.fromkeys(measured)), tuple(dict.fromkeys(compared)), psnr, ssim, tell_stage)
    max_error = MAX_ERROR if args.max_error is None else args.max_error
    return Quantisation(args.quantise, max_error, MIN_PSNR_DB if args.min_psnr is None else args.min_psnr, requests)


COMMAND = Command(__doc__ or "", EXAMPLES, add_arguments, run)
