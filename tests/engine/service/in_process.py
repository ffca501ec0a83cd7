"""Serve a fake engine on a thread of the test's own process, so that the test can look inside the engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from reelstep.engine.resolve import Engine
from reelstep.engine.service.server import Server, ServerOptions
from reelstep.tests.engine.service.fake_engine import FakeEngine


@dataclass(frozen=True)
class Served:
    address: str
    engine: FakeEngine


class ThreadServer(Server):
    """Signals belong to the main thread; here `stop` is set directly."""

    def _catch_signals(self) -> None:
        pass


@contextmanager
def served(engine: FakeEngine | None = None, options: ServerOptions | None = None) -> Iterator[Served]:
    engine = engine or FakeEngine()
    options = options or ServerOptions(port=0, grace_s=0.2)
    ready = threading.Event()
    address: list[str] = []
    handle: list[Callable[[], object]] = []

    def load() -> Engine:
        return engine

    def announce(where: str) -> None:
        address.append(where)
        ready.set()

    async def run() -> None:
        server = ThreadServer(options)
        loop = asyncio.get_running_loop()
        handle.append(lambda: loop.call_soon_threadsafe(server.stop.set))
        await server.run(load, announce)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    assert ready.wait(10)
    try:
        yield Served(address[0], engine)
    finally:
        handle[0]()
        thread.join(10)
        assert not thread.is_alive()


def wait_until(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Fail unless `condition` comes true in time."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.01)
