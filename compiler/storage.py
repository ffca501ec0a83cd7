"""Files that are whole or not there: written beside their place, then renamed over it."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from reelstep.errors import StorageError


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """Write and flush to the disk. Raises OSError."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Flush a file that somebody else wrote, or a directory's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_directory(target: Path, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Gives a temporary sibling of `target` to fill; at the end it takes the place of `target`.

    On any failure `target` is as it was and the temporary is gone. Raises StorageError if the disk fails or is full, or if
    something that is not `replaceable` lies at `target`. A process killed between the two renames leaves the old
    directory beside `target`, named `.NAME.old-*`.
    """
    if target.exists() and not replaceable(target):
        raise StorageError(f"{target} exists and is not what would be written there; nothing was changed. Remove it or choose another path")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
    except OSError as error:
        raise StorageError(f"cannot write beside {target}: {error}") from error
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp made it private
        sync(temporary)
        _exchange(temporary, target)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error}. What was there before is kept; free some space or choose another path") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(temporary: Path, target: Path) -> None:
    old = temporary.with_name(temporary.name.replace(".new-", ".old-"))
    replaces = target.exists()
    if replaces:
        target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        if replaces:
            old.rename(target)
        raise
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def sealed(path: Path) -> bool:
    """Whether `path` is there and is what `seal` put there, byte for byte."""
    seal_path = _seal_path(path)
    return path.exists() and seal_path.exists() and seal_path.read_text() == sha256_file(path)


def seal(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary, move it to `path`, and note its sha256 beside it. Raises StorageError; `path` is then not sealed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            write(temporary)
            sync(temporary)
            note = Path(folder) / "note"
            write_file(note, sha256_file(temporary).encode())
            temporary.replace(path)
            note.replace(_seal_path(path))
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error}. Free some space or choose another cache directory") from error


def _seal_path(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")
