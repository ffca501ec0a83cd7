"""Files that are whole or not there: written beside their place, then renamed over it. Engines in a cache carry a seal."""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import hmac
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Literal

from reelstep.errors import ConfigError, StorageError

log = logging.getLogger(__name__)

SECRET, SECRET_BYTES = "seal.secret", 32
"""One to a cache folder."""

UNFINISHED = ".new-"
"""In the names of directories that are filled beside where they, or what is in them, will lie."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Of a disk, as an OSError says it."""

Seal = Literal["kept", "damaged", "missing", "made"]

_watched: ContextVar[list[tuple[Path, Seal]] | None] = ContextVar("watched", default=None)


FileState = tuple[int, ...]
"""Changes whenever somebody writes a file or puts another in its place: its time of change is the kernel's to set."""


def file_state(path: Path) -> FileState:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


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


def replace_file(path: Path, data: bytes) -> None:
    """Write the whole file or leave what was there: a temporary beside it, flushed, then renamed. Raises StorageError."""
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
        write_file(temporary, data)
        temporary.chmod(0o666 & ~current_umask())
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error.strerror or error}; what was there is unchanged. Free some space or choose another path") from error


def current_umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextmanager
def whole_directory(target: Path, replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Gives a temporary sibling of `target` to fill; at the end it takes the place of `target`.

    On any failure `target` is as it was and the temporary is gone; what a killed process left goes with the next one. Of two
    that write at once the later one stays. Raises StorageError if the disk fails or is full, or if something that is not
    `replaceable` lies at `target`. A process killed between the two renames leaves the old directory beside `target`,
    named `.NAME.old-*`.
    """
    target = target.resolve()  # what a link leads to is replaced, and not the link
    _refuse_other(target, replaceable)
    begins = f".{target.name}{UNFINISHED}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target.parent, begins)
        with _held_directory(target.parent, begins) as temporary:
            yield temporary
            temporary.chmod(0o755)  # it was made private
            sync(temporary)
            with _turn(target.parent, fcntl.LOCK_EX):
                _exchange(temporary, target)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error}. What was there before is kept; free some space or choose another path") from error


def check_replaceable(target: Path, replaceable: Callable[[Path], bool]) -> None:
    """Raises StorageError if something that may not be replaced lies there, or nothing can be written beside it."""
    _refuse_other(target, replaceable)
    check_writable(target.parent)


def _refuse_other(target: Path, replaceable: Callable[[Path], bool]) -> None:
    if target.exists() and not replaceable(target):
        raise StorageError(f"{target} exists and is not what would be written there; nothing was changed. Remove it or choose another path")


def free_bytes(folder: Path) -> int:
    """Of the disk that a folder is on, or would be made on."""
    return shutil.disk_usage(_there(folder)).free


def _there(folder: Path) -> Path:
    """It, or the one that it would be made in."""
    return next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())


def check_folder(path: Path) -> None:
    """Raises ConfigError if there is no folder for a file that is to be written."""
    if not path.parent.is_dir():
        raise ConfigError(f"cannot write {path}: there is no folder {path.parent}; make it first")


def check_writable(folder: Path) -> None:
    """Raises StorageError if nothing can be written into a folder, or into the one that it would be made in: found by doing it."""
    there = _there(folder)
    try:
        with _held_directory(there, UNFINISHED):
            pass
    except OSError as error:
        raise StorageError(f"cannot write into {there}: {error.strerror}. Choose another path, or free some space") from error


def _exchange(temporary: Path, target: Path) -> None:
    old = temporary.with_name(f".{target.name}.old-{temporary.name.rpartition('-')[2]}")
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
    """Whether `path` is there and is what `seal` put there, byte for byte, under this name and with this folder's secret.

    Warns of a file that is not. Raises StorageError for a secret that others could read or have written.
    """
    note = _seal_path(path)
    if not path.exists():
        _tell(path, "missing")
        return False
    with _turn(path.parent, fcntl.LOCK_SH):
        try:
            kept = note.exists() and hmac.compare_digest(note.read_bytes(), _tag(path.name, sha256_file(path), path.parent))
        except StorageError:  # which is an OSError
            raise
        except OSError:  # one of both was removed meanwhile, is no file, or is on a disk that fails
            kept = False
    if not kept:
        log.warning("%s is damaged, half written, or was not made here: it is not used and will be made again", path)
    _tell(path, "kept" if kept else "damaged")
    return kept


def read_sealed(path: Path) -> bytes:
    """What `seal` put there, into memory, where nobody exchanges it between this look and its use. Raises StorageError for anything else."""
    try:
        with _turn(path.parent, fcntl.LOCK_SH):
            data, note = path.read_bytes(), _seal_path(path).read_bytes()
        if hmac.compare_digest(note, _tag(path.name, hashlib.sha256(data).hexdigest(), path.parent)):
            return data
    except StorageError:  # which is an OSError
        raise
    except OSError as error:
        raise StorageError(f"{path} was removed from the cache since it was found there; open the bundle again, and it is made again") from error
    raise StorageError(f"{path} was exchanged since it was found in the cache; open the bundle again, and it is made again")


def seal(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary, move it to `path`, and put its seal beside it. Raises StorageError; `path` is then not sealed."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_stale(path.parent, UNFINISHED)
        with _held_directory(path.parent, UNFINISHED) as folder:
            temporary = folder / path.name
            write(temporary)
            sync(temporary)
            _make_secret(path.parent, folder / SECRET)
            note = folder / "note"
            write_file(note, _tag(path.name, sha256_file(temporary), path.parent))
            with _turn(path.parent, fcntl.LOCK_EX):
                temporary.replace(path)
                note.replace(_seal_path(path))
    except StorageError:
        raise
    except OSError as error:
        advice = "Free some space or choose another cache directory" if error.errno in FULL else "Choose a cache directory that you can write to"
        raise StorageError(f"cannot write {path}: {error}. {advice}") from error
    _tell(path, "made")


@contextmanager
def _turn(folder: Path, kind: int) -> Iterator[None]:
    """A file and its seal are two names: who puts both there does so alone, and nobody compares them meanwhile."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # as in `_locked_directory`; then what was exchanged between two looks is made once more
            fcntl.flock(descriptor, kind)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _held_directory(parent: Path, begins: str) -> Iterator[Path]:
    """A temporary directory, locked while its builder lives: the kernel lets go of the lock with the process."""
    folder, descriptor = _locked_directory(parent, begins)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _locked_directory(parent: Path, begins: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=begins, dir=parent))
        with suppress(FileNotFoundError):  # as below
            descriptor = os.open(folder, os.O_RDONLY)
            with suppress(OSError):  # a network's file system may have no such locks; then nobody gets one, and nothing is taken for stale
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if folder.exists():
                return folder, descriptor
            os.close(descriptor)  # before it was locked another builder took it for stale


def _remove_stale(parent: Path, begins: str) -> None:
    """What builders left that were killed. A directory whose lock somebody holds is being filled."""
    for folder in parent.glob(f"{glob.escape(begins)}*/"):
        with suppress(OSError):  # locked, or removed by another meanwhile
            descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


@contextmanager
def watch_seals() -> Iterator[list[tuple[Path, Seal]]]:
    """Gives a list of what `sealed` finds and `seal` makes inside, in this thread."""
    seen: list[tuple[Path, Seal]] = []
    token = _watched.set(seen)
    try:
        yield seen
    finally:
        _watched.reset(token)


def _tell(path: Path, what: Seal) -> None:
    seen = _watched.get()
    if seen is not None:
        seen.append((path, what))


def _seal_path(path: Path) -> Path:
    return path.with_name(path.name + ".seal")


def _tag(name: str, content: str, folder: Path) -> bytes:
    """HMAC-SHA256 over name and content, of which this is the sha256. The secret keeps out what another user, or another machine's cache, put there; the
    name, what was moved.
    """
    return hmac.digest(_secret(folder), f"{name}\n{content}".encode(), "sha256").hex().encode()


def _make_secret(folder: Path, temporary: Path) -> None:
    """Written whole and then linked, so that of two processes that begin together both use the first one's. temporary: where only its owner may look."""
    if (folder / SECRET).exists():
        return
    write_file(temporary, os.urandom(SECRET_BYTES))
    temporary.chmod(0o600)
    with suppress(FileExistsError):
        os.link(temporary, folder / SECRET)


def _secret(folder: Path) -> bytes:
    path, place = folder / SECRET, folder.stat()
    others_write = place.st_mode & stat.S_IWOTH and not place.st_mode & stat.S_ISVTX  # who can rename what lies there can exchange what was verified
    if others_write or place.st_uid not in (0, os.geteuid()):
        text = f"{folder} {'can be written by everybody' if others_write else 'belongs to another user'}, who could put forged code there"
        raise StorageError(f"{text}. Choose a cache directory of your own{', or `chmod o-w` it' if others_write else ''}")
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            status, secret = os.fstat(file.fileno()), file.read()
    except FileNotFoundError:
        return os.urandom(SECRET_BYTES)  # nothing in this folder was sealed with it
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error}; choose a cache directory of your own, or remove the file and its engines are built again") from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o077 or len(secret) != SECRET_BYTES:
        text = f"{path} must be {SECRET_BYTES} bytes that belong to you and that only you can read: others could forge compiled code"
        raise StorageError(f"{text}. Choose a cache directory of your own, or remove the file and its engines are built again")
    return secret
