"""A world of processes for the tests of this folder: started once, each task on the first so many of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

sys.path.append(str(Path(__file__).parent))  # what runs on ranks is imported there by name

TASK_S = 240


class World:
    """Ranks that wait for tasks: functions of on_ranks.py."""

    def __init__(self, size: int) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=TASK_S))
        import on_ranks

        context = get_context("forkserver")
        context.set_forkserver_preload(["reelstep.engine.executors.processes"])
        self.tasks, self.links, self.children = 0, [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            child = context.Process(target=on_ranks.serve, args=(rank, self.store.port, theirs), daemon=True)
            child.start()
            self.links.append(ours)
            self.children.append(child)

    def run(self, ranks: int, task: Callable[..., Any], *args: Any) -> list[Any]:
        """What `task(rank, *args)` gives on each rank."""
        self.tasks += 1
        for link in self.links[:ranks]:
            link.send((task.__name__, args, ranks, self.tasks))
        answers = []
        for rank, link in enumerate(self.links[:ranks]):
            assert link.poll(TASK_S), f"rank {rank} did not answer within {TASK_S} s"
            answers.append(link.recv())
        failed = [f"rank {rank}: {text}" for rank, (fine, text) in enumerate(answers) if not fine]
        assert not failed, "\n".join(failed)
        return [value for _, value in answers]

    def close(self) -> None:
        for child in self.children:
            child.kill()
            child.join()


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """Four ranks."""
    made = World(4)
    yield made
    made.close()


@pytest.fixture(scope="session")
def world_of_eight() -> Iterator[World]:
    made = World(8)
    yield made
    made.close()
