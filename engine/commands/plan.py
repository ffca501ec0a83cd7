"""Predict latency, memory and cost of a model on N devices of a SKU, for every way to share the work, the best first. Nothing is run."""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import TYPE_CHECKING

from reelstep.engine.commands import Command
from reelstep.engine.commands.options import PRECISIONS, parse_path, parse_seconds, parse_size
from reelstep.errors import ConfigError

if TYPE_CHECKING:
    from reelstep.compiler.planner import Sampling, Workload
    from reelstep.engine.models.spec import ModelSettings

EXAMPLES = (
    "  reelstep plan movie-gen-30b --sku h200-sxm --gpus 8\n"
    "  reelstep plan movie-gen-30b --sku h100-sxm --gpus 16 --deadline 60s --price 2.5\n"
    "  reelstep plan movie-gen-30b --sku b200 --gpus 4 --frames 128 --size 512x512 --solver heun --nfe 20 --json\n"
    "  reelstep bench planner --corrections cpu.json && reelstep plan reel-tiny --sku cpu --corrections cpu.json\n"
    "what a SKU reaches of its datasheet is printed with the plan: measured, published or assumed\n"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model's name; a wrong one prints those there are")
    parser.add_argument("--sku", metavar="NAME", help="what it shall run on (this machine's); a wrong name prints those there are")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="devices; a mesh takes all, or a number that divides them (1)")
    parser.add_argument("--deadline", type=parse_seconds, metavar="S", help="rank only what is done by then, such as 60 or 60s")
    parser.add_argument("--frames", type=int, metavar="N", help="of the video (the model's most)")
    parser.add_argument("--size", type=parse_size, metavar="WxH", help="in pixels (the model's largest)")
    parser.add_argument("--solver", metavar="NAME", help="a wrong name prints those there are (the model's menu or default, else euler)")
    parser.add_argument("--nfe", type=int, nargs="+", metavar="N", help="velocities that the solver asks for (the model's menu or default, else 50 25 12 8)")
    parser.add_argument("--guidance", choices=("cfg", "none"), help="cfg: a velocity is two forwards (the model's default)")
    parser.add_argument("--precision", choices=PRECISIONS, help="of the denoiser (all that the SKU has)")
    parser.add_argument("--price", type=float, metavar="P", help="of one device for an hour, in any currency, to print what a video costs")
    parser.add_argument("--corrections", type=parse_path, metavar="FILE", help="what `reelstep bench planner` measured on the SKU")
    parser.add_argument("--top", type=int, default=12, metavar="N", help="choices to print (12)")
    parser.add_argument("--json", action="store_true", help="all choices, and all that was dropped, for programs")
    parser.add_argument("--plot", type=parse_path, metavar="FILE", help="also draw where the time goes in the best ones: .png, .svg or .pdf")


def run(args: argparse.Namespace) -> None:
    from typing import get_args

    from reelstep.compiler.planner import check_plot, device_of, explain, plot, rank, read_device, to_json
    from reelstep.compiler.program import Precision
    from reelstep.compiler.skus import SKUS, detect
    from reelstep.engine.models import MODELS
    from reelstep.parallel.mesh import MOST_RANKS

    for option, value in (("--gpus", args.gpus), ("--top", args.top), ("--frames", args.frames), ("--price", args.price)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{option} {value:g}; a number above 0")
    if args.gpus > MOST_RANKS:
        raise ConfigError(f"--gpus {args.gpus}; at most {MOST_RANKS}")
    if args.plot:
        check_plot(args.plot)
    spec = MODELS[args.model]
    sku = SKUS[args.sku] if args.sku else detect()
    device = read_device(args.corrections, sku) if args.corrections else device_of(sku)
    samplings = planned_samplings(spec.settings, args)
    precisions = (PRECISIONS[args.precision],) if args.precision else get_args(Precision)
    workload = planned_workload(args, guided=any(s.pairs for s in samplings))
    ranking = rank(workload, device, devices=args.gpus, samplings=samplings, precisions=precisions, deadline_s=args.deadline)
    print(json.dumps(to_json(ranking, args.price), indent=2) if args.json else explain(ranking, args.top, args.price), end="\n" if args.json else "")
    if args.plot:
        plot(ranking, args.top, args.plot)
        print(f"wrote {args.plot}", file=sys.stderr)


def planned_samplings(settings: ModelSettings, args: argparse.Namespace) -> list[Sampling]:
    """What was asked for; where nothing was, the measured menu of the model, its defaults, or 50 evaluations as Movie Gen has them, and fewer."""
    from reelstep.compiler.planner import Sampling
    from reelstep.engine.samplers.tables import SOLVERS

    task = "text_to_video" if (args.frames or max(settings.limits.frames)) > 1 else "text_to_image"
    default = settings.defaults.get(task, next(iter(settings.defaults.values()), None))
    menu = {quality: default.menu[quality] for quality in default.qualities} if default else {}
    if menu and not (args.solver or args.nfe or args.guidance):
        measured = "{quality}: {psnr:.1f} dB to the exact solution ({command})"
        return [
            Sampling(c.solver, c.steps or round(c.forwards / 2), c.forwards, measured.format(quality=quality, psnr=c.psnr_db, command=c.command))
            for quality, c in menu.items()
        ]
    name = args.solver or (default.solver if default else "euler")
    evaluations = SOLVERS[name].evaluations
    counts = args.nfe or ([default.steps * evaluations] if default else [50, 25, 12, 8])
    odd = [nfe for nfe in counts if nfe < 1 or nfe % evaluations]
    if odd:
        raise ConfigError(f"NFE {', '.join(map(str, odd))} of {name!r}, which takes {evaluations} a step; a positive multiple of {evaluations}")
    own = "cfg" if default is None else default.guidance if default.scale > 1 else "none"
    rows = 1 if (args.guidance or own) == "none" else 2
    return [Sampling(name, nfe, rows * nfe, "not measured") for nfe in counts]


def planned_workload(args: argparse.Namespace, guided: bool) -> Workload:
    """The model's programs at the size asked for, one row each. Latents longer than a tile are decoded by overlapping tiles."""
    from reelstep.compiler.planner import workload_of
    from reelstep.engine.models import MODELS
    from reelstep.engine.pipelines.latent import tiles_of

    spec = MODELS[args.model]
    settings = spec.settings
    frames = args.frames or max(settings.limits.frames)
    width, height = args.size or max(settings.limits.sizes)
    side = settings.spatial_stride
    if width % side or height % side or not width * height:
        raise ConfigError(f"size {width}x{height}; {spec.name} needs sides that are multiples of {side} pixels")
    _, f, h, w = settings.latent_shape(frames, width, height)
    tile, begins = tiles_of(settings, f)
    decode = {"F": tile, "H": h, "W": w, "frames": tile * settings.temporal_stride, "height": h * side, "width": w * side}
    sizes = {"encode_text": {}, "embed_time": {}, "denoise": {"F": f, "H": h, "W": w}, "decode": decode}
    calls = {"encode_text": 2 if guided else 1, "embed_time": 1, "decode": len(begins)}
    held = f * settings.temporal_stride
    video = f"{frames} frames of {width}x{height}{f', counted as {held}, as latents hold them' if held != frames else ''}"
    return workload_of(spec.name, video, spec.programs(spec.build()), sizes, calls)


COMMAND = Command(__doc__ or "", EXAMPLES, add_arguments, run)
