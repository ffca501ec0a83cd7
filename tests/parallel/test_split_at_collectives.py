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
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from reelstep.compiler.backends import BACKENDS
from reelstep.compiler.backends.openvino import convert
from reelstep.compiler.capture import capture
from reelstep.compiler.passes import apply_passes
from reelstep.compiler.passes.split_at_collectives import COLLECTIVES, RING, Piece, Wanted, build_rank, in_pieces, split_at_collectives
from reelstep.compiler.program import Profile, Program, TensorSpec
from reelstep.compiler.signature import Signature
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


def test_tensorrt_is_given_a_ranks_whole_graph_unless_it_has_a_ring() -> None:
    assert BACKENDS["tensorrt"].collectives == COLLECTIVES - {RING}


class Deep(nn.Module):
    """So many layers with a sum over ranks behind each."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(layer(x), "sum", "reelstep.tp"))
        return x


EDGE = TensorSpec("x", "float32", ("B", 3))


def captured(module: nn.Module, *outputs: str) -> tuple[Any, Signature]:
    program = Program("p", module, (EDGE,), tuple(TensorSpec(name, "float32", ("B", 3)) for name in outputs), (Profile("any", {}, 1),))
    return apply_passes(capture(program, program.profiles[0]))[0], Signature.of(program, program.profiles[0])


def test_a_value_is_held_until_it_was_read_for_the_last_time(fake: Any) -> None:
    fake("tp=2")
    exported, signature = captured(Deep(12), "y")
    split = split_at_collectives(exported, signature)
    held, most = {*split.inputs}, 0
    for step, over in zip(split.steps, split.over, strict=True):
        assert held.issuperset(step.reads)
        held |= {*step.makes}
        most = max(most, len(held))
        held -= over
    assert held == {*split.outputs}
    assert most == 2, "what a step reads and what it makes, of whatever many layers"


class Twice(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = 2 * x
        return y, y, x


class GivesWeight(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return 2 * x, self.weight


def test_outputs_are_in_memory_of_their_own_and_a_weight_is_none(fake: Any) -> None:
    comm = fake("tp=2")
    x = torch.ones(1, 3)
    found = in_pieces(*captured(Twice(), "a", "b", "c"), BACKENDS["eager"], comm)({"x": x})
    assert [found[name].tolist() for name in "abc"] == [[[2.0] * 3], [[2.0] * 3], [[1.0] * 3]]
    assert len({tensor.data_ptr() for tensor in (x, *found.values())}) == 4
    with pytest.raises(CompileError, match="program 'p' at profile 'any' gives back its weight 'weight' as it is"):
        in_pieces(*captured(GivesWeight(3, 1, bias=False), "a", "b"), BACKENDS["eager"], comm)


def test_pieces_are_kept_for_the_same_graph_weights_and_precision(fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comm = fake("cp=2,ring=2,tp=2")  # a graph with a sum, which the backend would run inside: asked for in pieces
    lowered: list[str] = []
    lower = convert.lower
    monkeypatch.setattr(convert, "lower", lambda *args: lowered.append(args[2]) or lower(*args))
    exported, signature = captured(Deep(2), "y")
    x = torch.ones(1, 3)

    def build(key: str = "weights", precision: Any = "float32") -> Tensor:
        lowered.clear()
        return in_pieces(exported, signature, BACKENDS["openvino"], comm, Wanted(precision, tmp_path, lambda: key))({"x": x})["y"]

    first = build()
    assert lowered == ["float32"] * 2
    assert torch.equal(build(), first)
    assert lowered == []
    build(key="other weights")
    assert lowered == ["float32"] * 2
    if "bfloat16" in BACKENDS["openvino"].precisions:
        rounded = build(precision="bfloat16")
        assert lowered == ["bfloat16"] * 2
        torch.testing.assert_close(rounded, first, rtol=2e-2, atol=2e-2)


def test_an_engine_with_collectives_is_not_kept_where_it_cannot_be(fake: Any, tmp_path: Path) -> None:
    comm = fake("tp=2")
    run = build_rank(*captured(Deep(2), "y"), BACKENDS["openvino"], comm, Wanted("float32", tmp_path, lambda: pytest.fail("no key is needed")))
    assert run({"x": torch.ones(1, 3)})["y"].shape == (1, 3)
    assert list(tmp_path.iterdir()) == []
