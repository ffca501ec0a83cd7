"""The same as generate, without a server: load one bundle, run one request."""

from __future__ import annotations

import argparse
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from reelstep.engine.commands import Command
from reelstep.engine.commands.generation import add_generation_options, build_options, follow, report
from reelstep.engine.commands.opening import all_kept, load_engine
from reelstep.engine.commands.options import PRECISIONS, add_engine_options, add_mesh, by_name, cache_dir, parse_lora, parse_path, tell_stage, trusted_keys

if TYPE_CHECKING:
    from reelstep.engine.request import Event, Request
    from reelstep.engine.resolve import Ask, Engine
    from reelstep.engine.result import ClientEvent

EXAMPLES = '  reelstep sample reel-tiny.reel "a yellow star bounces" -o star.gif --solver heun --steps 10\n'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=parse_path, metavar="BUNDLE")
    parser.add_argument("prompt", metavar="PROMPT", help="what to show, in words")
    adds = "add this LoRA, strength 1 if not given, for a bundle compiled with --lora-rank; may be repeated"
    parser.add_argument("--lora", type=parse_lora, action="append", default=[], metavar="FILE[=X]", help=adds)
    add_generation_options(parser)
    add_engine_options(parser)
    add_mesh(parser)


def run(args: argparse.Namespace) -> None:
    from reelstep.parallel.mesh import Mesh

    strengths = by_name([(file.stem, strength) for file, strength in args.lora])
    ask, loras = build_ask(args, strengths), {file.stem: file for file, _ in args.lora}
    on_mesh = Mesh.parse(args.mesh or "").world > 1
    if on_mesh:
        check_ask(args, ask, loras)
    engine = load_engine(args, [args.bundle], 1, 0, loras) if on_mesh else open_for(args, ask, loras)
    try:
        report(args, follow(run_local(engine, ask)))
    finally:
        engine.close(0.0)


def check_ask(args: argparse.Namespace, ask: Ask, loras: dict[str, Path]) -> None:
    """Raises what is wrong with the request before ranks start for it, which takes a minute."""
    from reelstep.compiler.bundle import Bundle
    from reelstep.engine.resolve import resolve
    from reelstep.engine.served import ServedModel

    bundle = Bundle.open(args.bundle, trusted_keys(args))
    resolve(ask, {bundle.plan.model: ServedModel.of(bundle, loras)})


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


COMMAND = Command(__doc__ or "", EXAMPLES, add_arguments, run)
