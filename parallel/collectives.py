"""Collectives between the ranks of one replica: functional, so that they export; counted, so that formulas can be checked; bounded in time.

A graph names a group by its axis ("reelstep.tp"), not by its ranks, so every rank of a line exports the same text, also over a fake process group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # registers torch.ops._c10d_functional
from torch import Tensor
from torch._C._distributed_c10d import _register_process_group, _unregister_process_group
from torch.distributed.distributed_c10d import GroupName

from reelstep.errors import InternalError, Unavailable
from reelstep.parallel.mesh import LINES, Axis, Mesh

c10d = torch.ops._c10d_functional

GROUP = "reelstep."
"""Before the axis, in the name of a group."""


class Communicator:
    """This rank's links along every axis of a mesh. Collective to make: all ranks of the default process group do so at once.

    timeout_s: of one collective. where: what is running, for errors ("denoise video, call 17"). sent: bytes that this rank put on links, by
    (op, axis); for an all-reduce those of the ring algorithm, the fewest there are. passed: how many times this rank came through a link, so that
    who is behind is known; inside: where it waits now, empty where it computes. Raises ConfigError if the process group has another size.
    """

    def __init__(self, mesh: Mesh, timeout_s: float) -> None:
        mesh.check_world(dist.get_world_size())
        self.mesh, self.rank, self.timeout_s = mesh, dist.get_rank(), timeout_s
        self.at = mesh.coordinates(self.rank)
        self.where = "start"
        self.passed, self.inside, self.closed = 0, "", False
        self.sent: Counter[tuple[str, Axis]] = Counter()
        self.lines: dict[Axis, tuple[int, ...]] = {}
        self.groups: dict[Axis, dist.ProcessGroup] = {}
        for axis in LINES:
            for line in mesh.lines(axis):
                if len(line) > 1:  # every rank makes every group, as torch wants it
                    group = dist.new_group(list(line), timeout=timedelta(seconds=timeout_s))
                if self.rank in line:
                    self.lines[axis] = line
                    if len(line) > 1:
                        self.groups[axis] = group
        for axis, group in self.groups.items():
            _register_process_group(GroupName(GROUP + axis), group)
            _BY_GROUP[GROUP + axis] = self

    def close(self) -> None:
        """Take the names back; the process group stays its maker's."""
        for axis in self.groups:
            _unregister_process_group(GroupName(GROUP + axis))
            _BY_GROUP.pop(GROUP + axis, None)
        self.groups = {}
        self.closed = True

    def size(self, axis: Axis) -> int:
        return self.mesh.size(axis)

    def all_reduce(self, x: Tensor, axis: Axis) -> Tensor:
        """Sum over the ranks of an axis."""
        if self.size(axis) == 1:
            return x
        return self.run(c10d.all_reduce.default, (x.contiguous(), "sum", GROUP + axis))

    def all_gather(self, x: Tensor, axis: Axis, dim: int, sizes: Sequence[int]) -> Tensor:
        """Join the ranks' pieces along `dim`, where rank i of the axis has sizes[i]. Uneven ones travel padded to the largest."""
        if self.size(axis) == 1:
            return x
        moved, most = x.movedim(dim, 0), max(sizes)
        if moved.shape[0] < most:
            moved = torch.cat([moved, moved.new_zeros((most - moved.shape[0], *moved.shape[1:]))])
        whole = self.run(c10d.all_gather_into_tensor.default, (moved.contiguous(), len(sizes), GROUP + axis))
        if min(sizes) < most:
            whole = torch.cat([whole[i * most : i * most + size] for i, size in enumerate(sizes)])
        return whole.movedim(0, dim)

    def all_to_all(self, x: Tensor, axis: Axis, received: Sequence[int], sent: Sequence[int]) -> Tensor:
        """Give rank i the next sent[i] values of x [sum(sent)]; what came from the ranks, in their order: [sum(received)]."""
        if self.size(axis) == 1:
            return x
        return self.run(c10d.all_to_all_single.default, (x.contiguous(), list(received), list(sent), GROUP + axis))

    def run(self, op: Any, args: tuple[Any, ...]) -> Tensor:
        """A functional collective with its own arguments, the group's name last, waited for. What a graph holds is run by this too.

        Raises Unavailable naming op, axis, ranks and what was running, if it fails or takes longer than the timeout.
        """
        axis: Axis = args[-1].removeprefix(GROUP)
        name = op._schema.name.split("::")[1]
        if not torch.compiler.is_exporting():
            self.sent[name, axis] += self._bytes(name, args, axis)
        result: Tensor = self.guarded(name, axis, lambda: c10d.wait_tensor(op(*args)))
        return result

    def run_into(self, op: Any, args: tuple[Any, ...], out: Tensor) -> None:
        """As `run`, with the result in memory that the caller brings. Nothing of it is exported, so nothing is copied but what all-reduce writes over."""
        axis: Axis = args[-1].removeprefix(GROUP)
        name, x = op._schema.name.split("::")[1], args[0]
        self.sent[name, axis] += self._bytes(name, args, axis)

        def work() -> None:
            group = self.groups[axis]
            if name == "all_reduce":
                out.copy_(x)
                group.allreduce([out]).wait()
            elif name == "all_gather_into_tensor":
                group._allgather_base(out, x).wait()
            else:
                group.alltoall_base(out, x, args[1], args[2]).wait()

        self.guarded(name, axis, work)

    def shift(self, x: Tensor, received: Tensor, axis: Axis) -> Callable[[], None]:
        """Begin to send x to the next rank of an axis, and to fill `received` from the one before. The returned call waits for both."""
        line, group = self.lines[axis], self.groups[axis]
        place = line.index(self.rank)
        self.sent["shift", axis] += x.numel() * x.element_size()

        def begin() -> list[dist.Work | None]:
            after, before = line[(place + 1) % len(line)], line[place - 1]
            return [dist.isend(x, after, group=group), dist.irecv(received, before, group=group)]

        def wait() -> None:
            for work in works:
                assert work is not None
                work.wait()

        works = self.guarded("shift", axis, begin)
        return lambda: self.guarded("shift", axis, wait)

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x, on every rank of the mesh, written into the x that each brings."""
        if self.mesh.world > 1:
            self.guarded("broadcast", None, lambda: dist.broadcast(x, 0))
        return x

    def guarded(self, op: str, axis: Axis | None, work: Callable[[], Any]) -> Any:
        """The result of `work`; where a link fails, the error that says which. axis: None for the whole mesh.

        Raises Unavailable too once these links are closed: a call that was given up must not wake up and use those of the next replica.
        """
        if self.closed:
            raise Unavailable(f"the links of rank {self.rank} are closed, and {op} came later", retry_after_s=1.0)
        self.inside = f"{op} over {axis or 'the mesh'}"
        try:
            return work()
        except RuntimeError as error:
            if torch.compiler.is_exporting():
                raise
            line = range(self.mesh.world) if axis is None else self.lines[axis]
            raise Unavailable(
                f"{op} over {axis or 'the mesh'} (ranks {', '.join(map(str, line))}) failed on rank {self.rank} during {self.where}, with a timeout of "
                f"{self.timeout_s:g} s: {error}",
                retry_after_s=1.0,
            ) from error
        finally:
            self.passed += 1
            self.inside = ""

    def self_test(self) -> None:
        """Every collective once on every axis, against sums known beforehand. Raises InternalError naming the first that is wrong.

        Where ranks have GPUs a sum over all of them too, which makes the NCCL communicator that their engines take. To be called when all have loaded: who
        waits for another in NCCL waits no longer than for any collective.
        """
        for axis, line in self.lines.items():
            p, place = len(line), line.index(self.rank)
            if p == 1:
                continue
            mine = torch.arange(p, dtype=torch.float32) + 10 * place
            everyone = torch.arange(p, dtype=torch.float32)[None] + 10 * torch.arange(p, dtype=torch.float32)[:, None]
            buffer = torch.empty_like(mine)
            wait = self.shift(mine, buffer, axis)
            wait()
            found = {
                "shift": (buffer, everyone[place - 1]),
                "all_reduce": (self.all_reduce(mine, axis), everyone.sum(0)),
                "all_gather": (self.all_gather(mine, axis, 0, [p] * p), everyone.flatten()),
                "all_to_all": (self.all_to_all(mine, axis, [1] * p, [1] * p), everyone[:, place]),
            }
            for op, (got, wanted) in found.items():
                if not torch.equal(got, wanted):
                    raise InternalError(f"{op} over {axis} (ranks {', '.join(map(str, line))}) gave rank {self.rank} {got.tolist()}, not {wanted.tolist()}")
        if "cuda:nccl" in dist.get_backend_config().split(","):
            everyone = torch.ones(1, device="cuda")
            self.guarded("all_reduce", None, lambda: dist.all_reduce(everyone))
            if everyone.item() != self.mesh.world:
                raise InternalError(f"a sum of 1 over the GPUs of {self.mesh.world} ranks gave rank {self.rank} {everyone.item():g}")
        self.sent.clear()

    def _bytes(self, name: str, args: tuple[Any, ...], axis: Axis) -> int:
        x: Tensor = args[0]
        p, each = self.size(axis), x.element_size()
        if name == "all_reduce":
            return 2 * (p - 1) * x.numel() * each // p
        if name == "all_gather_into_tensor":
            return (p - 1) * x.numel() * each
        own: int = args[2][self.lines[axis].index(self.rank)]
        return (x.numel() - own * x.numel() // max(x.shape[0], 1)) * each


_BY_GROUP: dict[str, Communicator] = {}
"""The process's links by group name, beside torch's own table of groups: an operator in a graph can hold no object."""


def communicator_of(group: str) -> Communicator:
    """Raises Unavailable if this process has no group of that name."""
    if group not in _BY_GROUP:
        raise Unavailable(f"no group {group!r} in this process; it has: {', '.join(sorted(_BY_GROUP)) or 'none'}. Start the ranks first", retry_after_s=1.0)
    return _BY_GROUP[group]
