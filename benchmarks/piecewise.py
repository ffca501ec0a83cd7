"""What do the collectives of a rank's graph cost a backend, beside what travels?

One rank of tp=2 of a denoiser, over links that carry nothing: its graph in pieces between the collectives, and inside one engine where the backend runs
them itself, against the same graph in one engine with each collective replaced by its input. All do the same arithmetic, which is checked.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.export import ExportedProgram

from reelstep.benchmarks.engine import inputs_of
from reelstep.benchmarks.harness import Row, interleave, parser, report
from reelstep.compiler.backends import BACKENDS, Executable
from reelstep.compiler.capture import capture
from reelstep.compiler.passes import apply_passes
from reelstep.compiler.passes.drop_dead import drop_dead
from reelstep.compiler.passes.split_at_collectives import COLLECTIVES, build_rank, in_pieces
from reelstep.compiler.program import Profile
from reelstep.compiler.signature import Signature
from reelstep.compiler.skus import SKUS
from reelstep.engine.models import dit_mid, reel_tiny
from reelstep.engine.models.movie_gen import MovieGenConfig, MovieGenTransformer, denoise_program
from reelstep.parallel.collectives import c10d
from reelstep.parallel.mesh import Mesh
from reelstep.parallel.pretend import pretended_rank
from reelstep.parallel.rules import RULES
from reelstep.parallel.shard import empty_weights, shard

WAN_SHAPED = MovieGenConfig(
    layers=2, width=1536, ffn=8960, heads=12, latent_channels=16, condition_channels=0, patch=(1, 2, 2), positions=(16, 32, 32),
    text_widths=(1536,), time_frequencies=256, time_scale=1000.0, qk_norm=True,
)  # fmt: skip
"""Blocks of Movie Gen's kind with the sizes of Wan 2.1 1.3B."""

SUBJECTS: dict[str, tuple[MovieGenConfig, int, tuple[int, int, int], int]] = {
    "reel-tiny": (reel_tiny.DENOISER_CONFIG, reel_tiny.TEXT_CONFIG.length, (4, 8, 8), 200),
    "dit-mid": (dit_mid.CONFIG, dit_mid.TEXT_TOKENS, (4, 32, 32), 30),
    "dit-mid, whole video": (dit_mid.CONFIG, dit_mid.TEXT_TOKENS, (16, 32, 32), 10),
    "Wan-shaped blocks": (WAN_SHAPED, 512, (4, 30, 52), 10),
}
"""Configuration, text tokens, latent F, H, W, and rounds."""
MESH = Mesh.parse("tp=2")


def without_collectives(exported: ExportedProgram) -> ExportedProgram:
    """The same graph with the input of each collective in place of its output."""
    alone = copy.copy(exported)
    alone._graph_module = copy.deepcopy(exported.graph_module)
    for node in list(alone.graph.nodes):
        if node.target in COLLECTIVES or node.target is c10d.wait_tensor.default:
            node.replace_all_uses_with(node.args[0])
    return drop_dead(alone)


def measure(name: str, backend: str, seed: int) -> Row:
    config, text, (f, h, w), rounds = SUBJECTS[name]
    runs = BACKENDS[backend]
    torch.set_num_threads(1 if runs.own_threads else SKUS["cpu"].units)  # as on a rank
    with torch.random.fork_rng(), tempfile.TemporaryDirectory(prefix="reelstep-piecewise-") as folder:
        torch.manual_seed(seed)
        file = Path(folder, "weights.safetensors")
        save_file(MovieGenTransformer(config).state_dict(), file)
        with pretended_rank(MESH, 0) as comm:
            with empty_weights():
                module = MovieGenTransformer(config)
            profile = Profile("p", {"F": f, "H": h, "W": w}, 1)
            program = denoise_program(shard(module, RULES["movie-gen"], comm, file), text, (profile,))  # type: ignore[arg-type]
            signature = Signature.of(program, profile)
            exported, _ = apply_passes(capture(program, profile))
            pieces = in_pieces(exported, signature, runs, comm)
            whole = runs.build(lambda: without_collectives(exported), signature, "float32", None, "")
            engines: dict[str, Executable] = {"whole": whole, "pieces": pieces}
            if runs.collectives:
                engines["inside"] = build_rank(exported, signature, runs, comm)
            inputs = inputs_of(signature, 1, seed)
            found = {how: engine(inputs)["velocity"] for how, engine in engines.items()}
            times = interleave({how: partial(engine, inputs) for how, engine in engines.items()}, rounds)
    row: dict[str, Any] = {"model": name, "tokens": config.tokens(f, h, w), "mesh": str(MESH), "backend": backend, "pieces": len(pieces.split.pieces)}
    row |= {f"{how}_s": timing.median_s for how, timing in times.items()}
    for how, overhead, error in (("pieces", "overhead", "rel_l2"), ("inside", "inside_overhead", "inside_rel_l2")):
        if how in engines:
            row[overhead] = times[how].median_s / times["whole"].median_s - 1
            row[error] = float((found[how] - found["whole"]).norm() / found["whole"].norm())
    return {**row, "rounds": rounds}


def main(argv: Sequence[str]) -> None:
    options = parser("piecewise", __doc__ or "")
    options.add_argument("--backends", nargs="+", default=["openvino", "eager"], metavar="NAME", help="(openvino eager)")
    options.add_argument("--models", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS), metavar="NAME", help="(all)")
    args = options.parse_args(argv)
    rows = [measure(name, backend, args.seed) for backend in args.backends for name in args.models]
    report("a graph in pieces", rows, args.seed, args.json)
