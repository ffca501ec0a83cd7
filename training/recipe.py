"""What the commands of all recipes share: an error is a line, and the weights that come out are written whole."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from reelstep.compiler.storage import check_folder, check_writable, replace_file
from reelstep.errors import ReelstepError


def run(command: Callable[[], None]) -> None:
    """A recipe's command as a program: status 2 and a line for an error of ours, 130 after Ctrl-C."""
    try:
        command()
    except ReelstepError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).stem}: cancelled; what was saved is gone on with when it is run again", file=sys.stderr)
        sys.exit(130)


def check_paths(out: Path, target: Path | None = None) -> None:
    """Raises StorageError, before any work, for checkpoints that cannot be written to `out`, and ConfigError for weights that would have no folder."""
    check_writable(out)
    if target is not None:
        check_folder(target)


def write_weights(target: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """As safetensors, in the types that they have. Raises StorageError; what was there is then kept."""
    replace_file(target, save({name: value.contiguous() for name, value in weights.items()}, dict(metadata) if metadata else None))
