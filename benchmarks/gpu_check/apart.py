"""A part in a process of its own, and what is known of one that ended it."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from reelstep.benchmarks.gpu_check.bench import LARGE, Bench, Finding


def apart(find: Callable[[Bench], Iterator[Finding]], device: torch.device) -> Iterator[Finding]:
    """What `find` yields in a process of its own, which the native code of an engine may end. Raises RuntimeError if it does, naming the functions it ended
    in, or if `find` fails.
    """
    context = get_context("spawn")
    found, sent = context.Pipe(duplex=False)
    with TemporaryDirectory() as folder:
        said = Path(folder) / "stderr"
        said.touch()  # it may end before it writes there
        process = context.Process(target=_send, args=(find, device, sent, said), daemon=True)
        process.start()
        sent.close()
        try:
            while (one := found.recv()) is not None:
                if isinstance(one, str):
                    raise RuntimeError(one)
                yield one
        except EOFError:
            process.join()
            code = process.exitcode or 0
            ended = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
            raise RuntimeError(f"its process {ended}{last_words(said.read_text())}") from None
        finally:
            process.kill()
            process.join()


def _send(find: Callable[[Bench], Iterator[Finding]], device: torch.device, pipe: Connection, said: Path) -> None:
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    torch._C._set_print_stack_traces_on_fatal_signal(True)
    try:
        with torch.inference_mode():
            for one in find(Bench(device, LARGE)):
                pipe.send(one)
        pipe.send(None)
    except Exception as error:  # noqa: BLE001  # the other process raises it
        pipe.send(f"{type(error).__name__}: {error}")


def last_words(said: str) -> str:
    """Of what torch says of a fatal signal, a paragraph for each thread, the functions of the thread that caught it, the innermost first; and what the
    process had said before.
    """
    signalled = re.search(r"^SIG\w+\(\d+\), PID", said, re.MULTILINE)
    words, threads = (said[: signalled.start()], said[signalled.start() :].split("\n\n")) if signalled else (said, [])
    caught = next((thread for thread in threads if "::fatalSignalHandler" in thread), "")
    frames = re.findall(r"frame #\d+: (.+) \+ 0x\w+ \(0x\w+ in (.+)\)", caught.partition("::fatalSignalHandler")[2])[1:]  # the first calls handlers
    names = [Path(library).name if name == "<unknown function>" else name.replace("(anonymous namespace)::", "").split("(")[0] for name, library in frames]
    lines = [line for line in words.splitlines() if line.strip()]
    return (f" in {' < '.join(names[:12])}" if names else "") + (f"; it said last: {lines[-1]}" if lines else "")
