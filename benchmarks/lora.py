"""What does a step cost with adapters of its own in every row, and do the adapters do what they were trained for?

The denoiser's plain program, where adapters that are fused into the weights run too, against the one that takes them as an input, every row with numbers of
its own; and what the runner spends on joining those of a batch. `rel_l2` is the error against the same modules in float32 and PyTorch. Then the shipped LoRA:
the colour that is left in videos from the same seeds, by its strength, as the mean over pixels of the largest less the smallest of red, green and blue,
0..255. Writes a contact sheet beside the JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from reelstep.benchmarks.concurrency import run_all
from reelstep.benchmarks.contact_sheet import Frames, sheet
from reelstep.benchmarks.harness import Row, interleave, parser, report, show
from reelstep.compiler.bundle import Bundle
from reelstep.compiler.load import load
from reelstep.compiler.lora import INPUT, SUFFIX, Layout, with_lora
from reelstep.engine.build import build_bundle
from reelstep.engine.loop import BatchRecord, open_engine
from reelstep.engine.models.reel_tiny import SPEC, WEIGHTS, adaptable
from reelstep.engine.models.spec import ModelSettings
from reelstep.engine.resolve import Ask, resolve

PROMPTS = (
    "a red heart spins clockwise on a light blue background", "the sun grows on a blue background", "a red apple bounces on a yellow background",
    "a fox slides left on a green background", "an octopus shakes on a pink background", "a red car jumps up and down on teal",
)  # fmt: skip
LORA = WEIGHTS / "reel-tiny-grey-lora.safetensors"
STRENGTHS = (0.0, 0.5, 1.0)
ROWS = (1, 2, 4, 8, 16)


def inputs_of(bundle: Bundle, program: str, rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    edges = bundle.signatures[program, "video"].inputs
    return {edge.name: torch.randn((rows, *edge.sizes), generator=generator) * (0.01 if edge.name == INPUT else 1.0) for edge in edges}


def costs(bundle: Bundle, layout: Layout, cache: Path, rounds: int) -> list[Row]:
    engines, model = load(bundle, cache), SPEC.build()
    program = next(program for program in SPEC.programs(model) if program.name == "denoise")
    modules = {each.name: each.module for each in (program, with_lora(program, adaptable(model), layout))}
    found: list[Row] = []
    for rows in ROWS:
        given = {program: inputs_of(bundle, program, rows) for program in ("denoise", "denoise" + SUFFIX)}
        packed = given["denoise" + SUFFIX][INPUT].split(1)
        took = interleave(
            {
                "plain": lambda given=given: engines["denoise", "video"](given["denoise"]),  # type: ignore[misc]
                "adapted": lambda given=given: engines["denoise" + SUFFIX, "video"](given["denoise" + SUFFIX]),  # type: ignore[misc]
                "joining": lambda packed=packed: torch.cat(packed),  # type: ignore[misc]
            },
            rounds,
        )
        errors = {name: rel_l2(engines[name, "video"](given[name])["velocity"], modules[name], given[name]) for name in given}
        found.append(
            {
                "rows": rows,
                **{f"{name}_rel_l2": error for name, error in zip(("plain", "adapted"), errors.values(), strict=True)},
                **{f"{name}_ms": took[name].median_s * 1e3 for name in ("plain", "adapted")},
                "adapted_over_plain": took["adapted"].median_s / took["plain"].median_s,
                "joining_ms": took["joining"].median_s * 1e3,
                "packed_mb": sum(part.nbytes for part in packed) / 1e6,
            }
        )
    return found


@torch.no_grad()
def rel_l2(found: Tensor, module: nn.Module, given: Mapping[str, Tensor]) -> float:
    expected = module(*given.values())
    return float((found - expected).norm() / expected.norm())


def colour(frames: Frames) -> float:
    return float((frames.max(-1).astype(float) - frames.min(-1)).mean())


def main(argv: Sequence[str]) -> None:
    options = parser("lora", __doc__ or "")
    options.add_argument("--rank", type=int, default=8, metavar="R", help="that the bundle takes (%(default)s)")
    options.add_argument("--rounds", type=int, default=15)
    args = options.parse_args(argv)
    bundle = build_bundle("reel-tiny", backend="openvino", precision=None, out=args.cache / "bench-lora.reel", cache=args.cache, lora_rank=args.rank)
    layout = ModelSettings.from_json(bundle.settings).lora
    assert layout is not None
    rows = costs(bundle, layout, args.cache, args.rounds)
    records: list[BatchRecord] = []
    engine = open_engine([bundle.path], cache=args.cache, loras={"grey": LORA}, on_batch=records.append)
    asks = [
        Ask(prompt, seed=args.seed + k, lora={"grey": strength}, request_id=f"{k} {strength}") for k, prompt in enumerate(PROMPTS) for strength in STRENGTHS
    ]
    records.clear()
    _, done = run_all(engine, [resolve(ask, engine.models) for ask in asks], together=True)
    engine.close(1.0)
    clips = {strength: [each.media.frames[0] for ask, each in zip(asks, done, strict=True) if ask.lora["grey"] == strength] for strength in STRENGTHS}
    colours: list[Row] = [{"strength": strength, "colour": float(np.mean([colour(clip) for clip in each]))} for strength, each in clips.items()]
    mixed = max(record.rows for record in records if record.key[1] == "denoise" + SUFFIX)
    report("lora", rows, args.seed, args.json, {"rank": args.rank, "layers": len(layout.layers), "colours": colours, "most_rows_of_a_batch": mixed})
    show("colour by strength", colours)
    if args.json is not None:
        names = "; ".join(f"{strength:g}" for strength in STRENGTHS)
        shown = [(f"{prompt} (strength {names})", [clips[strength][k][::2] for strength in STRENGTHS]) for k, prompt in enumerate(PROMPTS)]
        sheet(shown, args.json.with_name(f"{args.json.stem}_sheet.png"))
