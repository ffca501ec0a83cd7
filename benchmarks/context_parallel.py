"""What does a split sequence cost and save? One Movie Gen block, its tokens over 1, 2 and 4 ranks of this machine.

Bytes sent are counted and set beside the formula; activations are the most that a rank held above its weights and inputs, counted tensor by tensor. The
ranks share one CPU here, so seconds say that it runs, not how fast several devices would be: no speed-up is to be read from them. The block is as long
as Movie Gen's 256 frames of 768 x 768 (73,728 tokens), and narrow.
"""

from __future__ import annotations

import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reelstep.benchmarks.harness import Row, parser, report
from reelstep.engine.executors.processes import World, start
from reelstep.engine.models.movie_gen import MovieGenConfig, MovieGenTransformer
from reelstep.engine.request import Call
from reelstep.engine.runner import Runner
from reelstep.parallel.collectives import Communicator
from reelstep.parallel.mesh import Mesh, shares
from reelstep.parallel.rules import MOVIE_GEN
from reelstep.parallel.shard import empty_weights, shard

TEXT_TOKENS = 64
MESHES = ("", "cp=2", "cp=2,ring=2", "cp=4", "cp=4,ring=4", "cp=4,ring=2", "tp=2", "tp=4")


class Held(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time. Storages are counted once, and until the last tensor of them is gone."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) not in given and key not in self.known:
                self._take(key, x)
        return out

    def _take(self, key: int, x: Tensor) -> None:
        size = x.untyped_storage().nbytes()
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(x.untyped_storage(), self._give, key, size)

    def _give(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@dataclass(frozen=True)
class OneBlock:
    """Ranks with their part of one block of `config`, and a program that measures itself while it runs."""

    config: MovieGenConfig
    file: Path

    def identity(self) -> Mapping[str, str]:
        return {"config": str(self.config)}

    def load(self, comm: Communicator) -> Mapping[str, Runner]:
        torch.set_num_threads(1)
        with empty_weights():
            module: nn.Module = MovieGenTransformer(self.config)
        module = shard(module, MOVIE_GEN, comm, self.file)
        return {"block": Runner({("denoise", "p"): partial(_measured, module, comm)}, {("denoise", "p"): 1})}


def _measured(module: nn.Module, comm: Communicator, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    comm.sent.clear()
    began = time.perf_counter()
    with torch.inference_mode(), Held() as held:
        velocity = module(inputs["x"], inputs["modulation"], None, inputs["context"])
    seconds = time.perf_counter() - began
    sent = sum(bytes_ for (op, _), bytes_ in comm.sent.items() if op != "all_gather_into_tensor")  # without the velocity at the end, which all join
    mine = torch.tensor([[held.most, sent, seconds]], dtype=torch.float64)
    whole = mine
    for axis in ("tp", "cp"):
        whole = comm.all_gather(whole, axis, 0, [len(whole)] * comm.size(axis))
    return {"velocity": velocity, "measured": whole[None]}


def formula(mesh: Mesh, config: MovieGenConfig, tokens: int) -> int:
    """Bytes that rank 0 sends in one block of float32, from the shapes alone."""
    if mesh.tp > 1:
        return 3 * 2 * (mesh.tp - 1) * tokens * config.width * 4 // mesh.tp
    k = config.width // config.heads
    lengths, heads = shares(tokens, mesh.cp, "tokens"), shares(config.heads, mesh.ulysses, "heads")
    stages = [sum(lengths[i : i + mesh.ulysses]) for i in range(0, mesh.cp, mesh.ulysses)]
    values = 3 * k * lengths[0] * (config.heads - heads[0]) + k * heads[0] * (stages[0] - lengths[0])
    if mesh.ring > 1:
        values += 2 * k * heads[0] * (tokens - stages[1])
    return 4 * values


def main(argv: Sequence[str]) -> None:
    options = parser("context_parallel", __doc__ or "")
    options.add_argument("--frames", type=int, default=32, help="latent frames; each is 48 x 48 tokens of a block (default: %(default)s, 73,728 tokens)")
    options.add_argument("--side", type=int, default=48, help="tokens along the height and the width of a frame")
    options.add_argument("--width", type=int, default=128)
    options.add_argument("--meshes", nargs="+", default=list(MESHES), metavar="MESH", help='meshes; "" is one rank (default: %(default)s)')
    args = options.parse_args(argv)
    config = MovieGenConfig(
        layers=1, width=args.width, ffn=args.width * 8 // 3, heads=4, latent_channels=16, condition_channels=0, patch=(1, 2, 2),
        positions=(args.frames, args.side, args.side), text_widths=(16,), time_frequencies=32, time_scale=1.0, qk_norm=True,
    )  # fmt: skip
    tokens = args.frames * args.side**2
    torch.manual_seed(args.seed)
    inputs = {
        "x": torch.randn(1, 16, args.frames, 2 * args.side, 2 * args.side),
        "modulation": torch.randn(1, 7, args.width),
        "context": torch.randn(1, TEXT_TOKENS, args.width),
    }
    rows: list[Row] = []
    reference: Tensor | None = None
    with tempfile.TemporaryDirectory(prefix="reelstep-context-") as folder:
        file = Path(folder) / "block.safetensors"
        save_file(MovieGenTransformer(config).state_dict(), file)
        for text in args.meshes:
            mesh = Mesh.parse(text)
            replica = start(World(mesh, "gloo", start_s=600, load_s=600, collective_s=1800, silence_s=120), OneBlock(config, file))
            output = replica.run("block", [Call("denoise", "p", inputs)])[0]
            replica.close()
            reference = output["velocity"] if reference is None else reference
            measured = output["measured"][0]
            rows.append(
                {
                    "mesh": str(mesh), "ranks": mesh.world, "activation_mb": float(measured[:, 0].max()) / 1e6, "sent_mb": float(measured[0, 1]) / 1e6,
                    "formula_mb": formula(mesh, config, tokens) / 1e6, "seconds": float(measured[:, 2].max()),
                    "rel_error": float((output["velocity"] - reference).norm() / reference.norm()),
                }
            )  # fmt: skip
    report("one block over ranks", rows, args.seed, args.json, {"tokens": tokens, "width": args.width, "text_tokens": TEXT_TOKENS})
