"""What `generate` and `sample` share: what may be asked of a model, the progress shown meanwhile, and the files at the end."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from reelstep.engine.commands.options import parse_option, parse_path, parse_size

if TYPE_CHECKING:
    from reelstep.engine.client import Options
    from reelstep.engine.result import Artifact, ClientEvent, Generation


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
    from reelstep.compiler.storage import check_folder
    from reelstep.engine.media_types import media_type_of

    check_folder(path)
    return media_type_of(path)


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
