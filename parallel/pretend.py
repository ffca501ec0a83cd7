"""One process as any rank of a mesh that is not there, so that what the rank would run can be captured and counted. Nothing travels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore  # where torch registers the transport "fake"

from reelstep.errors import ConfigError
from reelstep.parallel.collectives import Communicator
from reelstep.parallel.mesh import Mesh


@contextmanager
def pretended_rank(mesh: Mesh, rank: int) -> Iterator[Communicator]:
    """Inside, this process is `rank`: its links give tensors of the right shapes and no values. Raises ConfigError in a process that is a rank already."""
    if dist.is_initialized():
        raise ConfigError("this process is a rank of a replica, which cannot pretend to be another; plan the mesh in a process of its own")
    dist.init_process_group("fake", rank=rank, world_size=mesh.world, store=FakeStore())
    try:
        comm = Communicator(mesh, timeout_s=1.0)
        try:
            yield comm
        finally:
            comm.close()
    finally:
        dist.destroy_process_group()
