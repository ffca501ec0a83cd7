"""Ask a server for a video, an animation of a picture, or a picture."""

from __future__ import annotations

import argparse
from contextlib import closing

from reelstep.engine.commands import Command
from reelstep.engine.commands.generation import add_generation_options, build_options, follow, report
from reelstep.engine.commands.options import add_server, by_name, parse_seconds, parse_strength

EXAMPLES = (
    '  reelstep generate "a yellow star grows on a purple background" -o star.mp4\n'
    '  reelstep generate "the sticker jumps up and down" --image cat.png -o cat.webp\n'
    '  reelstep generate "a red apple" -o apple.png --seed 7 --count 4\n'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="what to show, in words")
    add_server(parser)
    parser.add_argument("--timeout", type=parse_seconds, metavar="S", help="give up after so many seconds; the server stops then too")
    adds = "add a LoRA that the server has, strength 1 if not given; may be repeated; a wrong name prints those there are"
    parser.add_argument("--lora", type=parse_strength, action="append", default=[], metavar="NAME[=X]", help=adds)
    add_generation_options(parser)


def run(args: argparse.Namespace) -> None:
    from reelstep.engine.client import Client

    options = build_options(args)
    if args.model:
        options["model"] = args.model
    options["lora"] = by_name(args.lora)
    with Client(args.server) as client, closing(client.stream(args.prompt, timeout=args.timeout, **options)) as events:
        report(args, follow(events))


COMMAND = Command(__doc__ or "", EXAMPLES, add_arguments, run)
