"""A server with the fake engine as a process of its own: prints its address when it serves. Arguments: port, grace in seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import PIPE, Popen

from reelstep.engine.service.server import ServerOptions, serve
from reelstep.errors import ReelstepError
from reelstep.tests.engine.service.fake_engine import FakeEngine

MODULE = "reelstep.tests.engine.service.fake_server"


@contextmanager
def running_server(grace_s: float = 5.0) -> Iterator[tuple[Popen[str], str]]:
    """The process and the address of a server that serves; killed at the end if it still runs."""
    with Popen([sys.executable, "-m", MODULE, "0", str(grace_s)], stdout=PIPE, stderr=PIPE, text=True, cwd="/") as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


if __name__ == "__main__":
    try:
        serve(FakeEngine, ServerOptions(port=int(sys.argv[1]), grace_s=float(sys.argv[2])), lambda address: print(address, flush=True))
    except ReelstepError as error:
        sys.exit(f"reelstep: {error}")
