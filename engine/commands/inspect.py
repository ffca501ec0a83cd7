"""Show what a bundle holds, and verify its hashes."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from reelstep.engine.commands import Command
from reelstep.engine.commands.options import parse_path

if TYPE_CHECKING:
    from reelstep.engine.models.spec import ModelSettings
    from reelstep.engine.resolve import Served

EXAMPLES = "  reelstep inspect reel-tiny.reel\n  reelstep inspect reel-tiny.reel --explain\n  reelstep inspect reel-tiny.reel --json\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=parse_path, metavar="BUNDLE")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--explain", action="store_true", help="the plan alone: every choice and its reason, with the commonest operators")
    group.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> None:
    from reelstep.compiler.bundle import Bundle
    from reelstep.compiler.describe import describe, describe_json

    bundle = Bundle.open(args.bundle)
    if args.explain:
        print(bundle.plan.explain())
    elif args.json:
        print(json.dumps(describe_json(bundle), indent=2))
    else:
        from reelstep.engine.served import ServedModel

        served = ServedModel.of(bundle)
        menus = describe_menus(served)
        note = "measured without quantisation:\n" if bundle.plan.quality and menus else ""
        print(describe(bundle) + describe_loras(served.settings) + note + menus, end="")


def describe_loras(settings: ModelSettings) -> str:
    """A line for each LoRA in the weights, and one for what requests may bring."""
    from reelstep.compiler.lora import patterns

    lines = [f"LoRA in the weights: {each}, sha256 {each.digest}\n" for each in settings.fused]
    if settings.lora:
        numbers, rank, layers = settings.lora.numbers, settings.lora.rank, settings.lora.layers
        lines.append(f"LoRA of requests: rank up to {rank}, {numbers:,} numbers a row, in {len(layers)} layers: {patterns(layers)}\n")
    return "".join(lines)


def describe_menus(model: Served) -> str:
    """A line for each entry of a task's menu: what runs, and what was measured of it."""
    from reelstep.engine.request import complete

    lines = []
    for task, defaults in model.settings.defaults.items():
        for quality in defaults.qualities:
            entry = defaults.menu[quality]
            choice = complete(entry, task, defaults, model)
            frechet = "" if entry.frechet is None else f", Frechet distance {entry.frechet:.4g}"
            lines.append(
                f"{task} {quality}: {choice.solver} on {choice.schedule}, {choice.steps} steps, {choice.guidance} at scale {choice.scale:g}; "
                f"{entry.forwards:g} forwards, {entry.psnr_db:.2f} dB, SSIM {entry.ssim:.4f}{frechet} ({entry.command})\n"
            )
    return "".join(lines)


COMMAND = Command(__doc__ or "", EXAMPLES, add_arguments, run)
