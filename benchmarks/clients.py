"""A server in its own process and the requests that benchmarks and the demo send it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from reelstep.errors import Unavailable


@contextmanager
def server(bundles: Sequence[Path], cache: Path, *options: str) -> Iterator[str]:
    """`reelstep serve` on a free port of this machine; gives its address and ends it afterwards. Raises Unavailable if it does not start."""
    command = [sys.executable, "-P", "-m", "reelstep", "serve", *map(str, bundles), "--port", "0", "--cache", str(cache), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if match := re.search(r"(127\.0\.0\.1|localhost):(\d+)", line):
                yield match.group(0)
                break
        else:
            raise Unavailable(f"the server ended with code {process.wait()} before it was ready; run `{' '.join(command)}` to see why", retry_after_s=0)
    finally:
        process.terminate()
        process.stdout.close()
        process.wait(timeout=30)
