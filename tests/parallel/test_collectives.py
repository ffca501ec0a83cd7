from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import on_ranks
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from reelstep.errors import ConfigError, Unavailable
from reelstep.parallel.collectives import Communicator, communicator_of
from reelstep.parallel.mesh import Mesh


@pytest.fixture
def fake_ranks() -> Iterator[None]:
    """Rank 1 of two that exist in name only."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_uneven_pieces_are_joined(world: Any) -> None:
    for gathered, reduced in world.run(2, on_ranks.uneven_collectives):
        assert np.array_equal(gathered, [[0, 1, 10], [3, 4, 13]])
        assert np.array_equal(reduced, [3, 3])


def test_a_rank_that_is_late_is_told_by_op_ranks_and_step(world: Any) -> None:
    message, _ = world.run(2, on_ranks.late)
    assert message.startswith("all_reduce over tp (ranks 0, 1) failed on rank 0 during denoise video, call 3, with a timeout of 0.5 s")


def test_a_group_has_its_axis_for_a_name_and_gives_it_back(fake_ranks: None) -> None:
    comm = Communicator(Mesh.parse("tp=2"), 1.0)
    assert communicator_of("reelstep.tp") is comm
    assert comm.all_gather(torch.ones(1, 1), "cp", 0, (1,)).shape == (1, 1), "an axis of one rank needs no link"
    comm.close()
    with pytest.raises(Unavailable, match=r"no group 'reelstep.tp' in this process; it has: none"):
        communicator_of("reelstep.tp")


def test_a_mesh_of_another_size_is_refused(fake_ranks: None) -> None:
    with pytest.raises(ConfigError, match=r"mesh tp=4 has .* = 4 ranks, and 2 processes are there"):
        Communicator(Mesh.parse("tp=4"), 1.0)
