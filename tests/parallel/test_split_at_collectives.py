"""Graphs of ranks: exported with functional collectives, cut there, and chained over real links. Beside the ranks that it needs, not in tests/compiler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import on_ranks
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from reelstep.compiler.capture import capture
from reelstep.compiler.passes import apply_passes
from reelstep.compiler.passes.split_at_collectives import Piece, split_at_collectives
from reelstep.engine.models.movie_gen import MovieGenTransformer
from reelstep.errors import CompileError
from reelstep.parallel.collectives import Communicator
from reelstep.parallel.mesh import Mesh


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MovieGenTransformer]:
    torch.manual_seed(0)
    module = MovieGenTransformer(on_ranks.SHALLOW).eval()
    file = tmp_path_factory.mktemp("dit") / "dit.safetensors"
    save_file(module.state_dict(), file)
    return file, module.double()


@pytest.fixture(name="fake")
def fake_ranks() -> Iterator[Any]:
    made: list[Communicator] = []

    def start(mesh: str) -> Communicator:
        world = Mesh.parse(mesh).world
        dist.init_process_group("fake", rank=world - 1, world_size=world, store=FakeStore())
        made.append(Communicator(Mesh.parse(mesh), 1.0))
        return made[-1]

    yield start
    for comm in made:
        comm.close()
    dist.destroy_process_group()


LAYER = {
    "tp=2": ["all_reduce"] * 3,
    "cp=2": ["all_to_all_single"] * 2,
    "cp=2,ring=2": ["ring_attention"],
    "cp=4,ring=2": ["all_to_all_single", "ring_attention", "all_to_all_single"],
    "cp=2,tp=2": ["all_to_all_single", "all_to_all_single", "all_reduce", "all_reduce", "all_reduce"],
}
"""Collectives of a layer; the tokens are gathered once, behind the last."""


@pytest.mark.parametrize(("mesh", "rows", "backend"), [("tp=2", 2, "eager"), ("cp=2", 1, "openvino"), ("cp=2,ring=2", 1, "eager")])
def test_pieces_chained_over_links_are_the_graph_and_the_model(world: Any, dit: Any, mesh: str, rows: int, backend: str) -> None:
    file, module = dit
    x, modulation, context = (value.double() for value in on_ranks.dit_inputs(rows))
    with torch.no_grad():
        wanted = module(x, modulation, None, context).numpy()
    for whole, pieces, collectives, count, _ in world.run(Mesh.parse(mesh).world, on_ranks.chain, file, mesh, rows, backend):
        expected = LAYER[mesh] + ["all_gather_into_tensor"] * ("cp" in mesh)
        assert sorted(collectives) == sorted(expected)
        assert count <= len(collectives) + 1
        for found in (whole, pieces):
            assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)


TOKENS, HELD = 27, 40 * 4
"""Of the latent, and bytes of each."""
SENT = {
    "tp=2": lambda rank, rows: {"all_reduce tp": 3 * rows * TOKENS * HELD},
    # q, k and v of 14 or 13 tokens to the rank of the other heads (3 and 2 of 5), y back; then the tokens, padded to 14, of an output of 16 numbers
    "cp=2": lambda rank, rows: {
        "all_to_all_single ulysses": (14 * 2 * 3 + 13 * 3 if rank == 0 else 13 * 3 * 3 + 14 * 2) * 8 * 4, "all_gather_into_tensor cp": 14 * 16 * 4,
    },
}  # fmt: skip
"""What a rank puts on its links: all-reduce over two ranks sends as much as it holds (ring algorithm), the others what goes to somebody else."""


@pytest.mark.parametrize(("mesh", "rows"), [("tp=2", [2, 1, 2]), ("cp=2", [1])])
def test_collectives_inside_one_engine_give_the_models_numbers_and_send_what_the_formulas_say(world: Any, dit: Any, mesh: str, rows: list[int]) -> None:
    file, module = dit
    for rank, answers in enumerate(world.run(2, on_ranks.in_one_engine, file, mesh, rows, 60.0)):
        assert len(answers) == len(rows)
        for count, (found, sent) in zip(rows, answers, strict=True):
            x, modulation, context = (value.double() for value in on_ranks.dit_inputs(count))
            with torch.no_grad():
                wanted = module(x, modulation, None, context).numpy()
            assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted)
            assert sent == SENT[mesh](rank, count)


def test_a_rank_that_is_late_is_said_so_through_the_engine(world: Any, dit: Any) -> None:
    (said,), nothing = world.run(2, on_ranks.in_one_engine, dit[0], "tp=2", [1], 1.0, 1)
    assert not nothing
    assert said.startswith("all_reduce over tp (ranks 0, 1) failed on rank 0 during denoise video, call 3, with a timeout of 1 s: ")


@pytest.mark.parametrize("mesh", ["cp=2,tp=2", "cp=4,ring=2"])
def test_one_process_exports_the_graph_of_a_rank_over_a_fake_group(fake: Any, dit: Any, mesh: str) -> None:
    part = on_ranks.sharded_dit(dit[0], fake(mesh), config=on_ranks.SHALLOW)
    program, profile, signature = on_ranks.dit_program(part, 1)
    split = split_at_collectives(apply_passes(capture(program, profile))[0], signature)
    names = [step.op._schema.name.split("::")[1] for step in split.steps if not isinstance(step, Piece)]
    assert names == LAYER[mesh] + ["all_gather_into_tensor"]
    assert {arg for step in split.steps if not isinstance(step, Piece) for arg in step.args if str(arg).startswith("reelstep.")} <= {
        "reelstep.cp", "reelstep.tp", "reelstep.ulysses", "reelstep.ring",
    }  # fmt: skip


def test_a_dynamic_batch_that_an_exchange_mixes_with_other_sizes_is_refused(fake: Any, dit: Any) -> None:
    part = on_ranks.sharded_dit(dit[0], fake("cp=2"), config=on_ranks.SHALLOW)
    program, profile, signature = on_ranks.dit_program(part, 4)
    with pytest.raises(CompileError, match=r"'denoise' at profile 'p': .*give the profile max_batch=1"):
        split_at_collectives(apply_passes(capture(program, profile))[0], signature)
