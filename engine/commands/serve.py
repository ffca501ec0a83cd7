"""Load bundles and serve them over gRPC, with health checks and reflection, until SIGTERM."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from typing import TYPE_CHECKING

from reelstep.engine.commands import Command
from reelstep.engine.commands.opening import load_engine
from reelstep.engine.commands.options import PRECISIONS, add_engine_options, add_mesh, by_name, cache_dir, parse_named, parse_path, parse_seconds
from reelstep.errors import ConfigError

if TYPE_CHECKING:
    from reelstep.engine.executors.replicas import Elsewhere

EXAMPLES = (
    "  reelstep serve reel-tiny.reel\n"
    "  reelstep serve a.reel b.reel --port 0\n"
    "  reelstep serve reel-tiny-lora.reel --lora neon=neon.safetensors --allow-lora-uploads\n"
    "  reelstep serve reel-tiny.reel --replicas 2 --mesh cp=2 --cluster head:6379\n"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundles", type=parse_path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=50051, help="0 takes a free one and prints it (50051)")
    parser.add_argument("--allow-plaintext", action="store_true", help="listen without encryption where other machines can connect")
    parser.add_argument("--no-reflection", action="store_true", help="do not tell clients the schema")
    parser.add_argument("--max-running", type=int, default=32, metavar="N", help="requests that hold memory at once (32)")
    parser.add_argument("--max-queue", type=int, default=256, metavar="N", help="requests that may wait for that; more are refused (256)")
    parser.add_argument("--max-seconds", type=parse_seconds, default=600.0, metavar="S", help="longest that one request may take (600)")
    named = "let requests use this LoRA by this name, for a bundle compiled with --lora-rank; may be repeated"
    parser.add_argument("--lora", type=parse_named, action="append", default=[], metavar="NAME=FILE", help=named)
    lets = "let whoever reaches the port load LoRAs into the server while it runs, and unload them: `reelstep lora --help`"
    parser.add_argument("--allow-lora-uploads", action="store_true", help=lets)
    parser.add_argument("--max-loras", type=int, metavar="N", help="that clients may bring a model up to (16)")
    parser.add_argument("--grace", type=float, default=30.0, metavar="S", help="time for running requests after SIGTERM (30)")
    add_engine_options(parser)
    add_mesh(parser)
    states = "keep states of running requests here; a server that is started again goes on with those that are asked for again"
    parser.add_argument("--checkpoints", type=parse_path, metavar="DIR", help=states)
    parser.add_argument("--checkpoint-every", type=int, default=4, metavar="K", help="steps between two of them (4)")
    group = parser.add_argument_group("replicas", "outside this process, on Ray: pip install 'reelstep[cluster]'")
    number = "replicas of all bundles, or LEAST:MOST to have as many as the load needs (1 with --cluster, else none)"
    group.add_argument("--replicas", metavar="N", help=number)
    where = "host:port of a Ray cluster's head, auto for the one that this machine is part of, or local to start one here (local)"
    group.add_argument("--cluster", metavar="ADDRESS", help=where)
    group.add_argument("--rank-cpus", type=float, metavar="N", help="CPUs that each rank takes (its part of this machine on local, else 1)")


def run(args: argparse.Namespace) -> None:
    import logging

    for option, given, least in (("--max-running", args.max_running, 1), ("--max-queue", args.max_queue, 0)):
        if given < least:
            raise ConfigError(f"{option} {given} would leave every request waiting; give at least {least}")
    from reelstep.engine.service.server import MAX_LORAS, ServerOptions, serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    options = ServerOptions(
        host=args.host,
        port=args.port,
        allow_plaintext=args.allow_plaintext,
        reflection=not args.no_reflection,
        grace_s=args.grace,
        max_request_s=args.max_seconds,
        allow_lora_uploads=args.allow_lora_uploads,
        max_loras=MAX_LORAS if args.max_loras is None else args.max_loras,
    )
    if args.max_loras is not None and not args.allow_lora_uploads:
        raise ConfigError("--max-loras is of LoRAs that clients load; add --allow-lora-uploads")
    loras = by_name(args.lora)
    elsewhere = replicas_elsewhere(args)
    if args.checkpoint_every < 1:
        raise ConfigError(f"--checkpoint-every {args.checkpoint_every}; at least 1 step")
    checkpoints = (args.checkpoints, args.checkpoint_every) if args.checkpoints else None
    serve(lambda: load_engine(args, args.bundles, args.max_running, args.max_queue, loras, elsewhere, checkpoints), options, announce)


def announce(address: str) -> None:
    print(f"serving on {address}", flush=True)


def replicas_elsewhere(args: argparse.Namespace) -> Elsewhere | None:
    """What --replicas and --cluster ask for. Raises ConfigError for options that need one of them, and where Ray is not installed."""
    from reelstep.engine.executors.replicas import Scaling
    from reelstep.parallel.mesh import Mesh

    if args.replicas is None and args.cluster is None:
        if args.rank_cpus is not None:
            raise ConfigError("--rank-cpus is of replicas; add --replicas or --cluster")
        return None
    if args.rank_cpus is not None and not args.rank_cpus > 0:
        raise ConfigError(f"--rank-cpus {args.rank_cpus:g}; a number above 0")
    scaling, mesh = Scaling.parse(args.replicas or "1"), Mesh.parse(args.mesh or "")
    if find_spec("ray") is None:
        raise ConfigError("replicas run on Ray, which is not installed here: pip install 'reelstep[cluster]'")
    from reelstep.engine.executors.cluster import OnCluster

    return OnCluster(args.cluster or "local", scaling, mesh, args.rank_cpus, cache_dir(args), args.backend, PRECISIONS.get(args.precision))


COMMAND = Command(__doc__ or "", EXAMPLES, add_arguments, run)
