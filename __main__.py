"""The command line: `reelstep --help`. Each command imports what it needs when it runs, so that help is quick."""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import math
import os
import queue
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from reelstep import __version__
from reelstep.errors import AlreadyExists, ConfigError, InvalidRequest, NotFound, ReelstepError, UnsupportedRequest, unknown

if TYPE_CHECKING:
    from reelstep.compiler.planner import Sampling, Workload
    from reelstep.compiler.program import Precision
    from reelstep.compiler.quantisation import Quantisation
    from reelstep.compiler.signing import PublicKey
    from reelstep.engine.client import Lora, Options
    from reelstep.engine.executors.replicas import Elsewhere
    from reelstep.engine.models.spec import ModelSettings
    from reelstep.engine.request import Event, Request
    from reelstep.engine.resolve import Ask, Engine, Served
    from reelstep.engine.result import Artifact, ClientEvent, Generation
    from reelstep.registry import Registry

T = TypeVar("T")
USER_ERRORS = (ConfigError, InvalidRequest, UnsupportedRequest, NotFound, AlreadyExists)
"""Exit status 2."""
QUANTISE_PROMPTS = 4
"""To measure layers on, and as many to compare with."""
MAX_ERROR, MIN_PSNR_DB = 0.05, 35.0
"""Of a quantised model."""
PRECISIONS: dict[str, Precision] = {"f32": "float32", "bf16": "bfloat16"}
EXAMPLES = """\
examples:
  reelstep compile reel-tiny -o reel-tiny.reel      compile a model ahead of time
  reelstep serve reel-tiny.reel                     serve it on localhost:50051
  reelstep generate "a red heart spins" -o heart.mp4  ask the server
  reelstep sample reel-tiny.reel "a dog jumps" -o dog.webp   the same without a server
a bundle for another machine:
  reelstep keygen release                           release.key signs, release.pub verifies
  reelstep compile reel-tiny --portable --sign release.key
  reelstep finalize reel-tiny.reel --require-signature release.pub   there: build its native engines
exit status:
  0 done; 2 the command or the request is wrong; 1 a bundle, the disk, the machine, a build or a server cannot do it; 130 Ctrl-C
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 2 for what is wrong with the command or the request; 1 for what a bundle, the disk, the machine, a build or a server makes of a right
    one; 130 after Ctrl-C."""
    args = build_parser().parse_args(argv)
    run: Callable[[argparse.Namespace], None] = args.run
    try:
        run(args)
        if sys.stdout is not None:  # which it is where it was closed
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads it any more; what is still to be written has to go somewhere
        return 1
    except KeyboardInterrupt:
        print("reelstep: cancelled", file=sys.stderr)
        return 130
    except ReelstepError as error:
        print(f"reelstep: {error}", file=sys.stderr)
        return 2 if isinstance(error, USER_ERRORS) else 1
    return 0


def command() -> int:
    """`main` in a process that ends with it."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before gRPC is imported: its own lines say in other words, and first, what our errors do
    ended: list[int] = []
    atexit.register(leave, ended)  # first, so that it runs last: threads have ended by then, and all that anybody registered has run
    ended.append(main())
    return ended[0]


def leave(ended: Sequence[int]) -> None:
    """End the process with this status at once: to take apart all that was imported takes a quarter of a second. Without one, `main` did not return."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a disk that is full, a pipe that nobody reads any more
            if stream is not None:
                stream.flush()
    if ended:
        os._exit(ended[0])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reelstep",
        description="Compile media-generation models and serve them over gRPC.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"reelstep {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_compile(commands)
    add_finalize(commands)
    add_sign(commands)
    add_keygen(commands)
    add_inspect(commands)
    add_plan(commands)
    add_serve(commands)
    add_generate(commands)
    add_lora(commands)
    add_sample(commands)
    add_fit(commands)
    add_bench(commands)
    return parser


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_command(commands: Commands, name: str, run: Callable[[argparse.Namespace], None], text: str, examples: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=text, description=text, epilog=f"examples:\n{examples}", formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.set_defaults(run=run)
    return parser


def add_compile(commands: Commands) -> None:
    text = "Compile a model of the zoo into a bundle: graphs, weights, plan and solver tables."
    examples = "  reelstep compile reel-tiny\n  reelstep compile reel-tiny -o fast --precision bf16 --explain\n"
    parser = add_command(commands, "compile", run_compile, text, examples)
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


def add_finalize(commands: Commands) -> None:
    text = "Build the native engines of a bundle on the machine that will run it. What is in the cache stays, so it may be stopped and run again."
    examples = "  reelstep finalize reel-tiny.reel\n  reelstep finalize reel-tiny.reel --require-signature release.pub --cache engines\n"
    parser = add_command(commands, "finalize", run_finalize, text, examples)
    parser.add_argument("bundle", type=parse_path, metavar="BUNDLE")
    add_engine_options(parser)


def add_sign(commands: Commands) -> None:
    text = "Sign a bundle: its manifest, and by the hashes there every file of it."
    parser = add_command(commands, "sign", run_sign, text, "  reelstep sign reel-tiny.reel --key release.key\n")
    parser.add_argument("bundle", type=parse_path, metavar="BUNDLE")
    parser.add_argument("--key", type=parse_path, required=True, metavar="KEY", help="the private one of `reelstep keygen`")


def add_keygen(commands: Commands) -> None:
    text = "Make a pair of ed25519 keys: NAME.key signs bundles and is secret, NAME.pub goes to those who serve them."
    parser = add_command(commands, "keygen", run_keygen, text, "  reelstep keygen release\n")
    parser.add_argument("name", type=Path, metavar="NAME")


def add_inspect(commands: Commands) -> None:
    text = "Show what a bundle holds, and verify its hashes."
    parser = add_command(commands, "inspect", run_inspect, text, "  reelstep inspect reel-tiny.reel\n  reelstep inspect reel-tiny.reel --json\n")
    parser.add_argument("bundle", type=parse_path, metavar="BUNDLE")
    parser.add_argument("--json", action="store_true", help="for programs")


def add_plan(commands: Commands) -> None:
    text = "Predict latency, memory and cost of a model on N devices of a SKU, for every way to share the work, the best first. Nothing is run."
    examples = (
        "  reelstep plan movie-gen-30b --sku h200-sxm --gpus 8\n"
        "  reelstep plan movie-gen-30b --sku h100-sxm --gpus 16 --deadline 60s --price 2.5\n"
        "  reelstep plan movie-gen-30b --sku b200 --gpus 4 --frames 128 --size 512x512 --solver heun --nfe 20 --json\n"
        "  reelstep bench planner --corrections cpu.json && reelstep plan reel-tiny --sku cpu --corrections cpu.json\n"
        "what a SKU reaches of its datasheet is printed with the plan: measured, published or assumed\n"
    )
    parser = add_command(commands, "plan", run_plan, text, examples)
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


def add_serve(commands: Commands) -> None:
    text = "Load bundles and serve them over gRPC, with health checks and reflection, until SIGTERM."
    examples = (
        "  reelstep serve reel-tiny.reel\n"
        "  reelstep serve a.reel b.reel --port 0\n"
        "  reelstep serve reel-tiny-lora.reel --lora neon=neon.safetensors --allow-lora-uploads\n"
        "  reelstep serve reel-tiny.reel --replicas 2 --mesh cp=2 --cluster head:6379\n"
    )
    parser = add_command(commands, "serve", run_serve, text, examples)
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


def add_generate(commands: Commands) -> None:
    text = "Ask a server for a video, an animation of a picture, or a picture."
    examples = (
        '  reelstep generate "a red heart spins clockwise on a blue background" -o heart.mp4\n'
        '  reelstep generate "the sticker jumps up and down" --image cat.png -o cat.webp\n'
        '  reelstep generate "a green apple" -o apple.png --seed 7 --count 4\n'
    )
    parser = add_command(commands, "generate", run_generate, text, examples)
    parser.add_argument("prompt", metavar="PROMPT", help="what to show, in words")
    add_server(parser)
    parser.add_argument("--timeout", type=parse_seconds, metavar="S", help="give up after so many seconds; the server stops then too")
    adds = "add a LoRA that the server has, strength 1 if not given; may be repeated; a wrong name prints those there are"
    parser.add_argument("--lora", type=parse_strength, action="append", default=[], metavar="NAME[=X]", help=adds)
    add_generation_options(parser)


def add_lora(commands: Commands) -> None:
    text = "List the LoRAs of a running server; load one into it, or unload one, where it was started with --allow-lora-uploads."
    examples = (
        "  reelstep compile reel-tiny --lora-rank 8 -o reel-tiny-lora.reel     LoRAs of up to this rank\n"
        "  reelstep serve reel-tiny-lora.reel --allow-lora-uploads\n"
        "  reelstep lora load neon=neon.safetensors\n"
        '  reelstep generate "a fox" -o fox.mp4 --lora neon=0.8\n'
        "  reelstep lora load neon=neon-2.safetensors --replace\n"
        "  reelstep lora unload neon\n"
        "requests that run or wait keep what was loaded when they came; what was loaded this way is gone when the server ends\n"
    )
    actions = add_command(commands, "lora", run_list_loras, text, examples).add_subparsers(title="commands", metavar="COMMAND", required=True)
    load = add_command(actions, "load", run_load_lora, "Load a LoRA into a running server.", "  reelstep lora load neon=neon.safetensors\n")
    load.add_argument("lora", type=parse_named, metavar="NAME=FILE", help="safetensors; of PEFT with the adapter_config.json beside it")
    load.add_argument("--replace", action="store_true", help="another one of this name, which otherwise is an error")
    unload = add_command(actions, "unload", run_unload_lora, "Drop a LoRA from a running server.", "  reelstep lora unload neon\n")
    unload.add_argument("name", metavar="NAME", help="a wrong one prints those there are")
    listed = add_command(actions, "list", run_list_loras, "What each model takes and has.", "  reelstep lora list\n")
    for parser in (load, unload, listed):
        add_server(parser)


def add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--server", default="localhost:50051", metavar="ADDRESS", help="host:port (localhost:50051)")
    parser.add_argument("--model", help="needed when the server has several")


def add_sample(commands: Commands) -> None:
    text = "The same as generate, without a server: load one bundle, run one request."
    examples = '  reelstep sample reel-tiny.reel "a yellow star bounces" -o star.gif --solver heun --steps 10\n'
    parser = add_command(commands, "sample", run_sample, text, examples)
    parser.add_argument("bundle", type=parse_path, metavar="BUNDLE")
    parser.add_argument("prompt", metavar="PROMPT", help="what to show, in words")
    adds = "add this LoRA, strength 1 if not given, for a bundle compiled with --lora-rank; may be repeated"
    parser.add_argument("--lora", type=parse_lora, action="append", default=[], metavar="FILE[=X]", help=adds)
    add_generation_options(parser)
    add_engine_options(parser)
    add_mesh(parser)


def add_fit(commands: Commands) -> None:
    text = "Fit a solver or guidance to a model; without a name, list what can be fitted."
    parser = add_command(commands, "fit", run_fit, text, "  reelstep fit\n  reelstep fit bns reel-tiny --nfe 5 -o bns_5.json\n")
    parser.add_argument("name", nargs="?", metavar="NAME")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="of that fit; all take MODEL, -o FILE and --help")


def add_bench(commands: Commands) -> None:
    text = "Run a benchmark; without a name, list them."
    parser = add_command(commands, "bench", run_bench, text, "  reelstep bench\n  reelstep bench engine --json engine.json\n")
    parser.add_argument("name", nargs="?", metavar="NAME")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="of that benchmark; all take --json FILE and --help")


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generation", "what is left out is the model's default")
    group.add_argument("-o", "--out", type=parse_path, required=True, metavar="FILE", help="the suffix chooses the format: .mp4 .webp .gif .png")
    group.add_argument("--image", type=parse_path, metavar="FILE", help="a picture to animate: PNG, JPEG, WebP or GIF")
    group.add_argument("--negative-prompt", default="", metavar="TEXT", help="what to steer away from")
    group.add_argument("--seed", type=int, help="the same seed gives the same result; drawn and printed if absent")
    group.add_argument("--count", type=int, metavar="N", help="how many, with seeds counting up; writes FILE-0, FILE-1, ...")
    group.add_argument("--frames", type=int, metavar="N", help="1 is a still picture")
    group.add_argument("--fps", type=float, metavar="N", help="frames per second when played")
    group.add_argument("--size", type=parse_size, default=(None, None), metavar="WxH", help="in pixels; one that was compiled")
    tells = "of the rule; may be repeated; a wrong name prints those there are"
    skips = "skip most of the network where little changes: teacache or first_block; for a bundle compiled with --step-cache"
    group.add_argument("--step-cache", default="", metavar="NAME", help=skips)
    group.add_argument("--step-cache-option", type=parse_option, action="append", default=[], metavar="NAME=X", help=tells)
    chooses = (
        "draft, standard or best, in place of the six options below; `reelstep inspect` prints a bundle's; auto: the best that is expected to be done within "
        "--timeout, which is `generate`'s, without one the best"
    )
    group.add_argument("--quality", default="", metavar="NAME", help=chooses)
    group.add_argument("--steps", type=int, metavar="N", help="of the solver: more is better and slower")
    group.add_argument("--scale", type=float, metavar="S", help="guidance: 1 is none, higher follows the prompt more closely")
    group.add_argument("--guidance", default="", metavar="RULE", help="how the prompt steers: cfg, adaptive, ...; a wrong name prints those there are")
    group.add_argument("--guidance-option", type=parse_option, action="append", default=[], metavar="NAME=X", help=tells)
    group.add_argument("--solver", default="", help="a wrong name prints those there are")
    group.add_argument("--schedule", default="", help="how the solver's times are spaced")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine", "what is left out is the bundle's plan")
    group.add_argument("--backend", help="execute with this one instead")
    signed = "take only bundles that this public key signed; may be repeated"
    group.add_argument("--require-signature", type=parse_path, action="append", default=[], metavar="KEY", help=signed)
    add_precision(group)
    add_cache(group)


def add_mesh(parser: argparse.ArgumentParser) -> None:
    shares = (
        "ranks that share one bundle's model, such as cp=2,tp=1; in float32 unless the bundle was planned for a mesh, and on this machine if there are no "
        "replicas (one process)"
    )
    parser.add_argument("--mesh", metavar="AXIS=N,...", help=shares)


def add_precision(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--precision", choices=PRECISIONS, help="of the networks (the best that this machine has)")


def add_cache(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--cache", type=parse_path, metavar="DIR", help="compiled engines ($REELSTEP_CACHE, else ~/.cache/reelstep)")


def parse_path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("an empty name; give a file or a folder, or leave the option out")
    return Path(text)


def parse_size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 64x64")
    return int(width), int(height)


def parse_seconds(text: str) -> float:
    try:
        seconds = float(text.removesuffix("s"))
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time in seconds above 0, such as 60s")
    return seconds


def parse_option(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER, such as threshold=0.99") from None


def parse_strength(text: str) -> tuple[str, float]:
    """NAME, or NAME=STRENGTH. A name may have a '=' of its own."""
    name, equals, strength = text.rpartition("=")
    try:
        return (name, float(strength)) if equals else (text, 1.0)
    except ValueError:
        return text, 1.0


def parse_lora(text: str) -> tuple[Path, float]:
    file, strength = parse_strength(text)
    return Path(file), strength


def parse_named(text: str) -> tuple[str, Path]:
    name, _, file = text.partition("=")
    if not name or not file:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE, such as neon=neon.safetensors")
    return name, Path(file)


def by_name(pairs: Sequence[tuple[str, T]]) -> dict[str, T]:
    """Raises ConfigError for a LoRA that is given twice."""
    names = [name for name, _ in pairs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"--lora names {', '.join(twice)} twice; give each once")
    return dict(pairs)


def cache_dir(args: argparse.Namespace) -> Path:
    """--cache, else $REELSTEP_CACHE, else the user's cache folder."""
    if args.cache:
        return Path(args.cache)
    if "REELSTEP_CACHE" in os.environ:
        return Path(os.environ["REELSTEP_CACHE"])
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reelstep"
    except RuntimeError as error:
        raise ConfigError("nobody knows where this user's home folder is; say where compiled engines go with --cache DIR or $REELSTEP_CACHE") from error


def tell_stage(stage: str, done: int, total: int) -> None:
    print(f"[{done}/{total}] {stage}" if total else stage, file=sys.stderr, flush=True)


def run_compile(args: argparse.Namespace) -> None:
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


def run_finalize(args: argparse.Namespace) -> None:
    from reelstep.compiler.bundle import Bundle
    from reelstep.compiler.finalize import explain, finalize

    bundle, cache = Bundle.open(args.bundle, trusted_keys(args)), cache_dir(args)
    done = finalize(bundle, cache, args.backend, PRECISIONS.get(args.precision), tell_stage)
    print(explain(done, cache), end="")


def run_sign(args: argparse.Namespace) -> None:
    from reelstep.compiler.bundle import sign_bundle
    from reelstep.compiler.signing import read_private_key

    bundle = sign_bundle(args.bundle, read_private_key(args.key))
    print(f"{bundle.path}  signed by {bundle.signed_by}")


def run_keygen(args: argparse.Namespace) -> None:
    from reelstep.compiler.signing import make_keys

    if args.name.name in ("", ".."):
        raise ConfigError(f"{str(args.name)!r} is no name for a pair of keys; give a file's name without a suffix, such as `release`")
    private, public = (args.name.with_name(args.name.name + suffix) for suffix in (".key", ".pub"))
    made = make_keys(private, public)
    print(f"{private}  keep it secret: who has it signs in your name\n{public}  give it to those who serve your bundles: {made}")


def trusted_keys(args: argparse.Namespace) -> list[PublicKey]:
    if not args.require_signature:
        return []
    from reelstep.compiler.signing import read_public_key

    return [read_public_key(path) for path in args.require_signature]


def run_inspect(args: argparse.Namespace) -> None:
    from reelstep.compiler.bundle import Bundle
    from reelstep.compiler.describe import describe, describe_json
    from reelstep.engine.served import ServedModel

    bundle = Bundle.open(args.bundle)
    if args.json:
        print(json.dumps(describe_json(bundle), indent=2))
    else:
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


def run_plan(args: argparse.Namespace) -> None:
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
    from reelstep.engine.models.tae import tile_starts

    spec = MODELS[args.model]
    settings = spec.settings
    frames = args.frames or max(settings.limits.frames)
    width, height = args.size or max(settings.limits.sizes)
    side = settings.spatial_stride
    if width % side or height % side or not width * height:
        raise ConfigError(f"size {width}x{height}; {spec.name} needs sides that are multiples of {side} pixels")
    _, f, h, w = settings.latent_shape(frames, width, height)
    tile = min(f, settings.tile_frames)
    tiles = len(tile_starts(f, tile, min(settings.tile_overlap, tile - 1)))
    decode = {"F": tile, "H": h, "W": w, "frames": tile * settings.temporal_stride, "height": h * side, "width": w * side}
    sizes = {"encode_text": {}, "embed_time": {}, "denoise": {"F": f, "H": h, "W": w}, "decode": decode}
    calls = {"encode_text": 2 if guided else 1, "embed_time": 1, "decode": tiles}
    held = f * settings.temporal_stride
    video = f"{frames} frames of {width}x{height}{f', counted as {held}, as latents hold them' if held != frames else ''}"
    return workload_of(spec.name, video, spec.programs(spec.build()), sizes, calls)


def run_serve(args: argparse.Namespace) -> None:
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


@contextmanager
def all_kept() -> Iterator[None]:
    """For imports of what stays to the end: to look for garbage takes a third of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def load_engine(
    args: argparse.Namespace,
    bundles: list[Path],
    max_running: int,
    max_queued: int,
    loras: dict[str, Path],
    elsewhere: Elsewhere | None = None,
    checkpoints: tuple[Path, int] | None = None,
) -> Engine:
    with all_kept():
        from reelstep.engine.loop import open_engine
    from reelstep.parallel.mesh import Mesh

    return open_engine(
        bundles,
        cache=cache_dir(args),
        backend=args.backend,
        precision=PRECISIONS.get(args.precision),
        max_running=max_running,
        max_queued=max_queued,
        progress=tell_stage,
        trusted=trusted_keys(args),
        mesh=Mesh.parse(args.mesh) if args.mesh else None,
        loras=loras,
        elsewhere=elsewhere,
        checkpoints=checkpoints,
    )


def run_generate(args: argparse.Namespace) -> None:
    from reelstep.engine.client import Client

    options = build_options(args)
    if args.model:
        options["model"] = args.model
    options["lora"] = by_name(args.lora)
    with Client(args.server) as client, closing(client.stream(args.prompt, timeout=args.timeout, **options)) as events:
        report(args, follow(events))


def run_load_lora(args: argparse.Namespace) -> None:
    from reelstep.engine.client import Client

    name, file = args.lora
    with Client(args.server) as client:
        print(describe_lora(client.load_lora(name, file, model=args.model, replace=args.replace)))


def run_unload_lora(args: argparse.Namespace) -> None:
    from reelstep.engine.client import Client

    with Client(args.server) as client:
        client.unload_lora(args.name, model=args.model)


def run_list_loras(args: argparse.Namespace) -> None:
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


def build_options(args: argparse.Namespace) -> Options:
    width, height = args.size
    return {
        "media_type": check_out(args.out),
        "negative_prompt": args.negative_prompt,
        "image": args.image,
        "seed": args.seed,
        "count": args.count,
        "width": width,
        "height": height,
        "frames": args.frames,
        "frames_per_second": args.fps,
        "steps": args.steps,
        "scale": args.scale,
        "solver": args.solver,
        "schedule": args.schedule,
        "guidance": args.guidance,
        "guidance_options": dict(args.guidance_option),
        "quality": args.quality,
        "step_cache": args.step_cache,
        "step_cache_options": dict(args.step_cache_option),
    }


def check_out(path: Path) -> str:
    """The media type of an output, before any work is done for it. Raises ConfigError."""
    from reelstep.engine.media_types import media_type_of

    if not path.parent.is_dir():
        raise ConfigError(f"cannot write {path}: there is no folder {path.parent}; make it first")
    return media_type_of(path)


def run_sample(args: argparse.Namespace) -> None:
    from reelstep.parallel.mesh import Mesh

    strengths = by_name([(file.stem, strength) for file, strength in args.lora])
    ask, loras = build_ask(args, strengths), {file.stem: file for file, _ in args.lora}
    on_mesh = Mesh.parse(args.mesh or "").world > 1
    engine = load_engine(args, [args.bundle], 1, 0, loras) if on_mesh else open_for(args, ask, loras)
    try:
        report(args, follow(run_local(engine, ask)))
    finally:
        engine.close(0.0)


def open_for(args: argparse.Namespace, ask: Ask, loras: dict[str, Path]) -> Engine:
    """An engine for this one request."""
    from reelstep.engine.ahead import open_ahead

    ahead = open_ahead(
        args.bundle, ask, cache=cache_dir(args), backend=args.backend, precision=PRECISIONS.get(args.precision), progress=tell_stage, trusted=trusted_keys(args)
    )
    with all_kept():
        from reelstep.engine.loop import open_once
    return open_once(ahead, loras)


def build_ask(args: argparse.Namespace, lora: dict[str, float]) -> Ask:
    from reelstep.engine.request import read_file
    from reelstep.engine.resolve import Ask

    options = build_options(args)
    return Ask(
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        seed=args.seed,
        count=args.count,
        width=args.size[0],
        height=args.size[1],
        frames=args.frames,
        frames_per_second=args.fps,
        steps=args.steps,
        scale=args.scale,
        solver=args.solver,
        schedule=args.schedule,
        guidance=args.guidance,
        guidance_options=dict(args.guidance_option),
        quality=args.quality,
        step_cache=args.step_cache,
        step_cache_options=dict(args.step_cache_option),
        lora=lora,
        image=read_file("image", args.image) if args.image else None,
        media_type=options["media_type"] or "",
    )


def run_local(engine: Engine, ask: Ask) -> Iterator[ClientEvent]:
    """Run one request on an engine of this process, with the events that a client would see. It has begun when this returns."""
    from reelstep.engine.resolve import resolve

    request = resolve(ask, engine.models)
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    engine.submit(request, events.put)
    return as_client_events(request, ask, events)


def as_client_events(request: Request, ask: Ask, events: queue.SimpleQueue[Event]) -> Iterator[ClientEvent]:
    """What a client would see of a request that runs. Imports come here, while it does."""
    from reelstep.engine.media import encode
    from reelstep.engine.request import AUTO, Failed, Finished, Preview
    from reelstep.engine.result import Artifact, Cost, Generation

    while not isinstance(event := events.get(), Finished):
        if isinstance(event, Failed):
            raise event.error
        if not isinstance(event, Preview):
            yield event
    artifacts = []
    for index, (frames, seed) in enumerate(zip(event.media.frames, event.media.seeds, strict=True)):
        data = encode(frames, event.media.frames_per_second, ask.media_type)
        artifacts.append(Artifact(f"artifacts/{index}", ask.media_type, data, request.width, request.height, len(frames), seed))
    usage = Cost(event.usage.nfe, event.usage.forwards, event.usage.cached, event.usage.queue_s, event.usage.compute_s)
    ran = request.settled(event.usage.quality)
    yield Generation(
        ran.id, ran.model, ran.task, ran.solver, ran.schedule, ran.steps, ran.guidance, ran.scale, event.usage.quality or ask.quality,
        ran.step_cache, tuple(artifacts), usage, ran.lora, ask.quality == AUTO,
    )  # fmt: skip


def follow(events: Iterator[ClientEvent]) -> Generation:
    """Show a progress bar on stderr until the result is there."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    from reelstep.engine.request import Progress, Queued
    from reelstep.engine.result import Generation

    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("waiting", total=None)
        for event in events:
            if isinstance(event, Queued):
                bar.update(task, description=f"queued, {event.position} before")
            elif isinstance(event, Progress):
                bar.update(task, description=event.stage, completed=event.step, total=event.steps)
            elif isinstance(event, Generation):
                return event
    raise AssertionError("a stream ends with a Generation or an error")


def report(args: argparse.Namespace, result: Generation) -> None:
    """Write the files and print what they are and what they took."""
    from reelstep.compiler.storage import replace_file

    for index, artifact in enumerate(result.artifacts):
        path = args.out if args.count in (None, 1) else args.out.with_stem(f"{args.out.stem}-{index}")
        replace_file(path, artifact.data)
        print(describe_artifact(path, artifact))
    usage = result.usage
    compute = ", ".join(f"{program} {spent:.2f} s" for program, spent in usage.compute_s.items())
    quality = f", {result.quality}{' by auto' if result.auto else ''}" if result.quality else ""
    cache, cached = (f", step cache {result.step_cache}", f", cached {usage.cached}") if result.step_cache else ("", "")
    lora = "".join(f", LoRA {name} at {strength:g}" for name, strength in result.lora.items())
    choice = f"{result.solver} on {result.schedule}, {result.steps} steps, {result.guidance} at scale {result.scale:g}{cache}{lora}"
    print(f"{result.model} {result.task}{quality}: {choice}")
    print(f"NFE {usage.nfe}, forwards {usage.forwards}{cached}; queue {usage.queue_s:.2f} s; compute {sum(usage.compute_s.values()):.2f} s ({compute})")


def describe_artifact(path: Path, artifact: Artifact) -> str:
    frames = f", {artifact.frames} frames" if artifact.frames > 1 else ""
    return f"{path}  {artifact.width}x{artifact.height}{frames}, {len(artifact.data) / 1e3:.1f} kB, seed {artifact.seed}"


def listed(registry: Registry[T]) -> str:
    """A line for each entry: its name and what it is."""
    width = max(map(len, registry))
    return "\n".join(f"{name:<{width}}  {registry.about(name)}" for name in registry)


def run_fit(args: argparse.Namespace) -> None:
    from reelstep.training.fits import FITS

    if args.name is None:
        print(listed(FITS))
    else:
        FITS[args.name](args.arguments)


def run_bench(args: argparse.Namespace) -> None:
    from reelstep.benchmarks import BENCHMARKS

    if args.name is None:
        print(listed(BENCHMARKS))
    else:
        BENCHMARKS[args.name](args.arguments)


if __name__ == "__main__":
    sys.exit(command())
