"""What the tests of this folder run on every rank. Tensors come back as lists of arrays, counters as they are."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from reelstep.compiler.backends import BACKENDS
from reelstep.compiler.backends.openvino import OpenVinoExecutable
from reelstep.compiler.capture import capture
from reelstep.compiler.graphs import ops_of
from reelstep.compiler.lora import Adapted, Layout, adapted_too
from reelstep.compiler.passes import apply_passes
from reelstep.compiler.passes.split_at_collectives import COLLECTIVES, Chain, build_rank, in_pieces
from reelstep.compiler.program import Profile, Program
from reelstep.compiler.signature import Signature
from reelstep.engine.models.byte_text import ByteTextConfig, ByteTextEncoder
from reelstep.engine.models.movie_gen import MovieGenConfig, MovieGenTransformer, denoise_program
from reelstep.errors import Unavailable
from reelstep.parallel.collectives import Communicator
from reelstep.parallel.context import gathered, usp
from reelstep.parallel.mesh import Mesh, bounds, shares
from reelstep.parallel.rules import BYTE_TEXT, MOVIE_GEN, AttentionRule, Rules
from reelstep.parallel.shard import empty_weights, layer_at, shard

# Five heads and 22 FFN units divide by none of 2, 4; 27 tokens do not either.
DIT = MovieGenConfig(
    layers=2, width=40, ffn=22, heads=5, latent_channels=4, condition_channels=0, patch=(1, 2, 2), positions=(3, 3, 3), text_widths=(10,),
    time_frequencies=8, time_scale=1.0, qk_norm=True,
)  # fmt: skip
SHALLOW = replace(DIT, layers=1)  # where a graph is exported, which takes longest
LATENT, TEXT = (4, 3, 6, 6), 7
BYTES = ByteTextConfig(length=12, width=40, layers=2, heads=5)


def serve(rank: int, port: int, link: Any) -> None:
    """Run the named functions of this file until the link closes."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=60))
    while True:
        name, args, ranks, number = link.recv()
        try:
            dist.init_process_group("gloo", rank=rank, world_size=ranks, store=dist.PrefixStore(str(number), store), timeout=timedelta(seconds=60))
            with torch.no_grad():
                answer = True, globals()[name](rank, *args)
        except Exception:  # noqa: BLE001  # whatever it is, the process that asked raises it
            answer = False, traceback.format_exc()
        finally:
            dist.destroy_process_group()
        link.send(answer)


@contextmanager
def links(mesh: str, timeout_s: float = 60.0) -> Iterator[Communicator]:
    comm = Communicator(Mesh.parse(mesh), timeout_s)
    try:
        yield comm
    finally:
        comm.close()


def dit_inputs(rows: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return tuple(torch.randn(rows, *sizes, generator=g) for sizes in (LATENT, (7, DIT.width), (TEXT, DIT.width)))  # type: ignore[return-value]


def sharded_dit(file: Path, comm: Communicator, text: str | None = None, config: MovieGenConfig = DIT) -> nn.Module:
    with empty_weights():
        module = MovieGenTransformer(config)
    return shard(module, MOVIE_GEN.on(text=text), comm, file)


def dit(rank: int, file: Path, cases: list[tuple[str, str | None]]) -> list[tuple[np.ndarray, dict[Any, int], int]]:
    """Velocity, bytes sent, and weights held, for every (mesh, axis of the text)."""
    answers = []
    for mesh, text in cases:
        with links(mesh) as comm:
            part = sharded_dit(file, comm, text)
            x, modulation, context = dit_inputs(2)
            y = part(x, modulation, None, context)
            held = sum(p.untyped_storage().nbytes() // 4 for p in part.parameters())
            answers.append((y.numpy(), dict(comm.sent), held))
    return answers


def text_encoder(rank: int, file: Path, mesh: str, tokens: list[list[int]]) -> np.ndarray:
    with links(mesh) as comm:
        with empty_weights():
            module = ByteTextEncoder(BYTES)
        return shard(module, BYTE_TEXT, comm, file)(torch.tensor(tokens)).numpy()


def attentions(rank: int, mesh: str, q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None) -> dict[str, tuple[np.ndarray, dict[Any, int]]]:
    """This rank's part of the output by the mesh's exchange and by gathering, with the bytes sent."""
    answers = {}
    with links(mesh) as comm:
        lengths = shares(q.shape[2], comm.size("cp"), "tokens")
        start, stop = bounds(lengths)[comm.at["cp"]]
        mine = [torch.from_numpy(x)[:, :, start:stop] for x in (q, k, v)]
        bias = None if mask is None else torch.from_numpy(mask)[..., start:stop]
        for name, function in (("usp", usp), ("gathered", gathered)):
            comm.sent.clear()
            answers[name] = function(*mine, bias, lengths, comm).numpy(), dict(comm.sent)
    return answers


def deepspeed_ulysses(rank: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """This rank's part by DeepSpeed's DistributedAttention, and by ours."""
    import deepspeed
    from deepspeed.sequence.layer import DistributedAttention

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # an all-reduce, minutes of C++, which an all-to-all does not use
    deepspeed.comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    with links(f"cp={dist.get_world_size()}") as comm:
        lengths = shares(q.shape[2], comm.size("cp"), "tokens")
        start, stop = bounds(lengths)[rank]
        mine = [torch.from_numpy(x)[:, :, start:stop].contiguous() for x in (q, k, v)]

        def local(*qkv: Tensor) -> Tensor:  # [B, L, N, K], as DeepSpeed lays them out
            return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv)).transpose(1, 2).contiguous()

        theirs = DistributedAttention(local, comm.groups["cp"], scatter_idx=2, gather_idx=1)(*(x.transpose(1, 2).contiguous() for x in mine), 0)
        return theirs.transpose(1, 2).numpy(), usp(*mine, None, lengths, comm).numpy()


def late(rank: int) -> str | None:
    """Rank 1 comes too late to an all-reduce: what rank 0 is told."""
    with links("tp=2", timeout_s=0.5) as comm:
        comm.where = "denoise video, call 3"
        if rank == 1:
            time.sleep(1.5)
            return None
        try:
            comm.all_reduce(torch.ones(2), "tp")
        except Unavailable as error:
            return str(error)
    return "nothing"


def uneven_collectives(rank: int) -> list[np.ndarray]:
    with links("tp=2") as comm:
        x = torch.arange(6.0).reshape(2, 3)[:, : 2 - rank] + 10 * rank
        return [comm.all_gather(x, "tp", 1, (2, 1)).numpy(), comm.all_reduce(torch.full((2,), rank + 1.0), "tp").numpy()]


class Joint(nn.Module):
    """A block in the manner of MM-DiT: text and image keep their own projections and are joined for attention. QK-norm over the whole width, biases."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 6
        for stream in ("image", "text"):
            self.add_module(f"{stream}_qkv", nn.Linear(24, 72))
            self.add_module(f"{stream}_out", nn.Linear(24, 24))
        self.q_norm, self.k_norm = nn.RMSNorm(24, eps=1e-6), nn.RMSNorm(24, eps=1e-6)
        self.attention = JointAttention(self.heads)
        self.image_in, self.text_in, self.image_end, self.text_end = (nn.Identity() for _ in range(4))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        image, text = self.image_in(image), self.text_in(text)
        size = image.shape[1]
        q, k, v = torch.cat([self.image_qkv(image), self.text_qkv(text)], 1).chunk(3, -1)
        y = self.attention(self.q_norm(q), self.k_norm(k), v)
        return self.image_end(self.image_out(y[:, :size])), self.text_end(self.text_out(y[:, size:]))


class JointAttention(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, *qkv: Tensor) -> Tensor:
        return rearrange(F.scaled_dot_product_attention(*(rearrange(x, "B L (N K) -> B N L K", N=self.heads) for x in qkv)), "B N L K -> B L (N K)")


JOINT_RULES = Rules(
    axes={"heads": "tp", "image": "cp", "text": "cp"},
    parameters={"*_qkv.weight": ("3 heads", ""), "*_qkv.bias": ("3 heads",), "*_out.weight": ("", "heads"), "*_out.bias": (), "[qk]_norm.weight": ("heads",)},
    attributes={"attention.heads": "heads"},
    inputs={"image_in": {0: ("", "image", "")}, "text_in": {0: ("", "text", "")}},
    made={},
    outputs={"image_end": ("", "image", ""), "text_end": ("", "text", "")},
    attention={"attention": AttentionRule(("image", "text"), ("image", "text"), "context")},
)


def sharded_joint(file: Path, comm: Communicator) -> nn.Module:
    with empty_weights():
        module = Joint()
    return shard(module, JOINT_RULES, comm, file)


def joint(rank: int, file: Path, meshes: list[str], image: np.ndarray, text: np.ndarray) -> list[list[np.ndarray]]:
    answers = []
    for mesh in meshes:
        with links(mesh) as comm:
            part = sharded_joint(file, comm)
            answers.append([y.numpy() for y in part(torch.from_numpy(image), torch.from_numpy(text))])
    return answers


def dit_program(module: nn.Module, rows: int) -> tuple[Program, Profile, Signature]:
    program = denoise_program(module, TEXT, [Profile("p", {"F": 3, "H": 6, "W": 6}, rows)])  # type: ignore[arg-type]
    return program, program.profiles[0], Signature.of(program, program.profiles[0])


def chain(rank: int, file: Path, mesh: str, rows: int, backend: str) -> tuple[np.ndarray, np.ndarray, list[str], int, str]:
    """Velocity of the whole exported graph, and of its pieces chained; the collectives in order; how many pieces; the graph."""
    with links(mesh) as comm:
        part = sharded_dit(file, comm, config=SHALLOW)
        program, profile, signature = dit_program(part, rows)
        exported, _ = apply_passes(capture(program, profile))
        run = in_pieces(exported, signature, BACKENDS[backend], comm)
        split = run.split
        x, modulation, context = dit_inputs(rows)
        pieces = run({"x": x, "modulation": modulation, "context": context})["velocity"]
        whole = exported.module(check_guards=False)(x, modulation, context)
        left = [op for piece in split.pieces for op in ops_of(piece.exported) if "c10d" in op or "ring" in op]
        assert not left, left
        names = [step.op._schema.name.split("::")[1] for step in split.steps if hasattr(step, "op")]
        return whole.numpy(), pieces.numpy(), names, len(split.pieces), str(exported.graph)


def in_one_engine(rank: int, file: Path, mesh: str, rows: list[int], timeout_s: float, late_rank: int = -1) -> list[Any]:
    """Of calls of so many rows on OpenVINO's engine with collectives inside: velocity and bytes sent, or what it raised. One rank comes too late."""
    answers: list[Any] = []
    with links(mesh, timeout_s) as comm:
        part = sharded_dit(file, comm, config=SHALLOW)
        program, profile, signature = dit_program(part, max(rows))
        run = build_rank(apply_passes(capture(program, profile))[0], signature, BACKENDS["openvino"], comm)
        assert isinstance(run, OpenVinoExecutable)
        comm.where = "denoise video, call 3"
        if rank == late_rank:
            time.sleep(2 * timeout_s)
            return []
        for count in rows:
            comm.sent.clear()
            try:
                outputs = run(dict(zip(("x", "modulation", "context"), dit_inputs(count), strict=True)))
                answers.append((outputs["velocity"].numpy(), {f"{op} {axis}": sent for (op, axis), sent in comm.sent.items()}))
            except Unavailable as error:
                answers.append(str(error))
    return answers


def with_adapters(part: nn.Module, rows: int, layout: Layout) -> tuple[Program, ...]:
    """`denoise` and `denoise_lora` of a rank's transformer."""
    return adapted_too([dit_program(part, rows)[0]], partial(layer_at, part), layout)


def adapted_dit(rank: int, file: Path, meshes: list[str], layout: Layout, packed: np.ndarray) -> list[tuple[np.ndarray, dict[Any, int], dict[Any, int]]]:
    """Velocity of rows with these adapters, and the bytes that were sent with and without them, on every mesh."""
    answers = []
    for mesh in meshes:
        with links(mesh) as comm:
            inputs = dit_inputs(len(packed))
            plain, adapted = with_adapters(sharded_dit(file, comm), len(packed), layout)
            plain.module(*inputs)
            without = dict(comm.sent)
            comm.sent.clear()
            y = adapted.module(*inputs, torch.from_numpy(packed))
            answers.append((y.numpy(), dict(comm.sent), without))
    return answers


def adapted_joint(rank: int, file: Path, meshes: list[str], image: np.ndarray, text: np.ndarray, layout: Layout, packed: np.ndarray) -> list[list[np.ndarray]]:
    answers = []
    for mesh in meshes:
        with links(mesh) as comm:
            part = sharded_joint(file, comm)
            adapted = Adapted(part, {name: layer_at(part, name) for name, *_ in layout.layers}, layout)
            answers.append([y.numpy() for y in adapted(*map(torch.from_numpy, (image, text, packed)))])
    return answers


def adapted_graph(rank: int, file: Path, mesh: str, backend: str, layout: Layout, packed: np.ndarray) -> tuple[np.ndarray, list[str], int]:
    """Velocity of a rank's exported `denoise_lora` on a backend, the collectives in it, and how many pieces it is."""
    with links(mesh) as comm:
        rows = len(packed)
        _, program = with_adapters(sharded_dit(file, comm, config=SHALLOW), rows, layout)
        exported, _ = apply_passes(capture(program, program.profiles[0]))
        run = build_rank(exported, Signature.of(program, program.profiles[0]), BACKENDS[backend], comm)
        inputs = zip(("x", "modulation", "context", "lora"), (*dit_inputs(rows), torch.from_numpy(packed)), strict=True)
        velocity = run(dict(inputs))["velocity"]
        names = [node.target._schema.name.split("::")[1] for node in exported.graph.nodes if node.target in COLLECTIVES]
        return velocity.numpy(), names, len(run.split.pieces) if isinstance(run, Chain) else 1
