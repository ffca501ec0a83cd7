"""Regenerate the committed protobuf code: `python -m reelstep.protos.generate`.

Needs grpcio-tools of exactly the version below: code made by an older generator loads on newer runtimes, never the other way
round. Files register as `reelstep/protos/...`, so that they import from the installed package and cannot collide with another's.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from reelstep.errors import ConfigError

GRPCIO_TOOLS = "1.75.1"
PROTOS = ("reelstep/v1/media.proto", "reelstep/v1/lora.proto")


def include_of(package: str) -> Path:
    """The folder to give protoc for the .proto files that `package` ships."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{package} is not installed; run `make setup`")
    return Path(spec.submodule_search_locations[0]).parents[package.count(".")]


def generate(sources: Path, out: Path) -> list[Path]:
    """Write `*_pb2.py` and `*_pb2.pyi` for PROTOS in `sources` below `out`. Returns their paths relative to `out`.

    No stubs: methods are few, and the service and the client name them by the descriptor.
    """
    found = version("grpcio-tools")
    if found != GRPCIO_TOOLS:
        raise ConfigError(f"the committed code is made by grpcio-tools {GRPCIO_TOOLS}, not {found}; install that version")
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-Ireelstep/protos={sources}", f"-I{include_of('google.rpc')}"]
        command += [f"--{kind}_out={scratch}" for kind in ("python", "pyi")]
        subprocess.run(command + [f"reelstep/protos/{name}" for name in PROTOS], check=True)
        made = Path(scratch) / "reelstep/protos"
        files = sorted(p.relative_to(made) for p in made.rglob("*") if p.is_file())
        for file in files:
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(made / file, out / file)
    return files


if __name__ == "__main__":
    here = Path(__file__).parent
    for written in generate(here, here):
        print(here / written)
