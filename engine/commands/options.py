"""Options that several commands share, and what their text means."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from reelstep.errors import ConfigError

if TYPE_CHECKING:
    from reelstep.compiler.program import Precision
    from reelstep.compiler.signing import PublicKey

T = TypeVar("T")
PRECISIONS: dict[str, Precision] = {"f32": "float32", "bf16": "bfloat16"}


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


def add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--server", default="localhost:50051", metavar="ADDRESS", help="host:port (localhost:50051)")
    parser.add_argument("--model", help="needed when the server has several")


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


def trusted_keys(args: argparse.Namespace) -> list[PublicKey]:
    if not args.require_signature:
        return []
    from reelstep.compiler.signing import read_public_key

    return [read_public_key(path) for path in args.require_signature]


def tell_stage(stage: str, done: int, total: int) -> None:
    print(f"[{done}/{total}] {stage}" if total else stage, file=sys.stderr, flush=True)
