"""List the LoRAs of a running server; load one into it, or unload one, where it was started with --allow-lora-uploads."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from reelstep.engine.commands import Command
from reelstep.engine.commands.options import add_server, parse_named
from reelstep.errors import unknown

if TYPE_CHECKING:
    from reelstep.engine.client import Lora

EXAMPLES = (
    "  reelstep compile reel-tiny --lora-rank 8 -o reel-tiny-lora.reel     LoRAs of up to this rank\n"
    "  reelstep serve reel-tiny-lora.reel --allow-lora-uploads\n"
    "  reelstep lora load neon=neon.safetensors\n"
    '  reelstep generate "a fox" -o fox.mp4 --lora neon=0.8\n'
    "  reelstep lora load neon=neon-2.safetensors --replace\n"
    "  reelstep lora unload neon\n"
    "requests that run or wait keep what was loaded when they came; what was loaded this way is gone when the server ends\n"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    Command("Load a LoRA into a running server.", "  reelstep lora load neon=neon.safetensors\n", add_load, run_load).add_to(actions, "load")
    Command("Drop a LoRA from a running server.", "  reelstep lora unload neon\n", add_unload, run_unload).add_to(actions, "unload")
    Command("What each model takes and has.", "  reelstep lora list\n", add_server, run_list).add_to(actions, "list")


def add_load(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("lora", type=parse_named, metavar="NAME=FILE", help="safetensors; of PEFT with the adapter_config.json beside it")
    parser.add_argument("--replace", action="store_true", help="another one of this name, which otherwise is an error")
    add_server(parser)


def add_unload(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="a wrong one prints those there are")
    add_server(parser)


def run_load(args: argparse.Namespace) -> None:
    from reelstep.engine.client import Client

    name, file = args.lora
    with Client(args.server) as client:
        print(describe_lora(client.load_lora(name, file, model=args.model, replace=args.replace)))


def run_unload(args: argparse.Namespace) -> None:
    from reelstep.engine.client import Client

    with Client(args.server) as client:
        client.unload_lora(args.name, model=args.model)


def run_list(args: argparse.Namespace) -> None:
    from reelstep.engine.client import Client

    with Client(args.server) as client:
        models = {model.name: model for model in client.models()}
    if args.model and args.model not in models:
        raise unknown("model", args.model, models)
    for name in [args.model] if args.model else models:
        takes = f"LoRAs of rank up to {models[name].lora_rank}" if models[name].lora_rank else "compiled to take no LoRA"
        print("\n  ".join([f"{name}: {takes}", *map(describe_lora, models[name].loras)]))


def describe_lora(lora: Lora) -> str:
    return f"{lora.name}  rank {lora.rank} in {lora.layers} layers, sha256 {lora.sha256}"


COMMAND = Command(__doc__ or "", EXAMPLES, add_arguments, run_list)
