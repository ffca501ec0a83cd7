"""Seals of a cache: HMAC-SHA256 of RFC 2104 written out, and what it keeps out; files that are replaced whole or not at all."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from reelstep.compiler import storage
from reelstep.compiler.storage import SECRET, check_replaceable, check_writable, replace_file, seal, sealed, watch_seals, whole_directory, write_file
from reelstep.errors import StorageError


def put(path: Path, data: bytes = b"engine") -> Path:
    seal(path, lambda temporary: write_file(temporary, data))
    return path


def hmac_by_hand(secret: bytes, message: bytes) -> str:
    key = secret.ljust(64, b"\0")
    inner = hashlib.sha256(bytes(b ^ 0x36 for b in key) + message).digest()
    return hashlib.sha256(bytes(b ^ 0x5C for b in key) + inner).hexdigest()


def test_a_seal_is_an_hmac_over_name_and_content(tmp_path: Path) -> None:
    path = put(tmp_path / "cache" / "e.blob")
    secret = (tmp_path / "cache" / SECRET).read_bytes()
    message = f"e.blob\n{hashlib.sha256(b'engine').hexdigest()}".encode()
    assert path.with_name("e.blob.seal").read_text() == hmac_by_hand(secret, message)


def test_what_was_sealed_is_kept_and_the_secret_is_its_owners_alone(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with watch_seals() as seen:
        assert not sealed(cache / "e.blob")
        assert sealed(put(cache / "e.blob"))
    assert [what for _, what in seen] == ["missing", "made", "kept"]
    assert stat.S_IMODE((cache / SECRET).stat().st_mode) == 0o600
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert sorted(p.name for p in cache.iterdir()) == ["e.blob", "e.blob.seal", SECRET]


def test_another_content_or_name_or_folder_is_not_taken_and_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = put(tmp_path / "a" / "e.blob")
    for suffix in ("", ".seal"):
        shutil.copy(f"{path}{suffix}", path.with_name(f"f.blob{suffix}"))
    put(tmp_path / "b" / "own.blob")
    for suffix in ("", ".seal"):
        shutil.copy(f"{path}{suffix}", tmp_path / "b" / f"e.blob{suffix}")
    path.write_bytes(b"eng1ne")
    for wrong in (path, path.with_name("f.blob"), tmp_path / "b" / "e.blob"):
        caplog.clear()
        assert not sealed(wrong)
        assert f"{wrong} is damaged, half written, or was not made here" in caplog.text


def test_a_file_that_goes_while_it_is_looked_at_and_one_that_is_none_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d.blob").mkdir()
    (tmp_path / "d.blob.seal").write_text("0" * 64)
    assert not sealed(tmp_path / "d.blob")
    path, look = put(tmp_path / "e.blob"), storage.sha256_file

    def goes(file: Path) -> str:
        file.unlink()
        return look(file)

    monkeypatch.setattr(storage, "sha256_file", goes)
    assert not sealed(path)


def test_an_engine_with_a_plain_hash_beside_it_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "e.blob").write_bytes(b"engine")
    (tmp_path / "e.blob.seal").write_text(hashlib.sha256(b"engine").hexdigest())
    assert not sealed(tmp_path / "e.blob")
    assert sealed(put(tmp_path / "e.blob"))


def test_a_secret_that_others_can_read_or_that_is_a_link_is_refused(tmp_path: Path) -> None:
    path, secret = put(tmp_path / "e.blob"), tmp_path / SECRET
    secret.chmod(0o640)
    with pytest.raises(StorageError, match="only you can read"):
        sealed(path)
    secret.chmod(0o600)
    assert sealed(path)
    secret.rename(tmp_path / "elsewhere")
    secret.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="cannot read"):
        sealed(path)


def test_a_folder_that_anybody_can_write_to_is_refused_unless_only_owners_can_rename_there(tmp_path: Path) -> None:
    path = put(tmp_path / "cache" / "e.blob")
    path.parent.chmod(0o777)
    with pytest.raises(StorageError, match=r"cache can be written by everybody, who could put forged code there\. .* or `chmod o-w` it"):
        sealed(path)
    path.parent.chmod(0o1777)
    assert sealed(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path / "cache" / "e.blob")
    os.chown(path.parent, 12345, -1)
    with pytest.raises(StorageError, match=r"cache belongs to another user, who could put forged code there\. Choose a cache directory of your own$"):
        sealed(path)


def test_two_that_build_the_same_leave_one_of_them_whole_and_a_reader_sees_no_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, replace, seen = tmp_path / "e.blob", Path.replace, []

    def slowly(self: Path, target: Path) -> Path:
        done = replace(self, target)
        time.sleep(0.05)
        return done

    monkeypatch.setattr(Path, "replace", slowly)
    put(path, b"first")
    with ThreadPoolExecutor(3) as pool:
        builders = [pool.submit(put, path, data) for data in (b"one", b"another")]
        while not all(builder.done() for builder in builders):
            seen.append(sealed(path))
    assert all(seen)
    assert sealed(path)


def test_writing_replaces_a_file_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    path.write_bytes(b"old")
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["out.mp4"]


FULL_DISK = """
import resource, sys
from pathlib import Path
from reelstep.compiler.storage import replace_file
from reelstep.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    replace_file(Path(sys.argv[1]), b"n" * 5000)
except StorageError as error:
    print(error)
"""


def test_when_the_disk_takes_no_more_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    path.write_bytes(b"old")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] != 0
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, timeout=60, cwd="/")
    assert "what was there is unchanged" in done.stdout, done.stderr
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out.mp4"]


def test_a_missing_folder_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        replace_file(tmp_path / "none" / "out.png", b"x")


def test_of_two_that_write_one_directory_at_once_both_end_well_and_one_stays_whole(tmp_path: Path) -> None:
    target = tmp_path / "toy.reel"

    def write(name: str) -> None:
        for _ in range(40):
            with whole_directory(target, lambda _: True) as folder:
                for file in ("a", "b"):
                    (folder / file).write_text(name)

    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(write, "12345678")] == [None] * 8
    assert (target / "a").read_text() == (target / "b").read_text()
    assert os.listdir(tmp_path) == ["toy.reel"]


def test_what_a_link_leads_to_is_replaced_and_not_the_link(tmp_path: Path) -> None:
    (tmp_path / "first.reel").mkdir()
    (tmp_path / "link.reel").symlink_to("first.reel")
    with whole_directory(tmp_path / "link.reel", lambda _: True) as folder:
        (folder / "a").touch()
    assert (tmp_path / "link.reel").is_symlink()
    assert os.listdir(tmp_path / "first.reel") == ["a"]
    assert sorted(os.listdir(tmp_path)) == ["first.reel", "link.reel"]


def test_a_directory_that_a_killed_writer_began_goes_with_the_next_and_one_that_is_being_filled_stays(tmp_path: Path) -> None:
    (tmp_path / ".toy.reel.new-killed").mkdir()
    (tmp_path / ".new-of-somebody-else").mkdir()
    with whole_directory(tmp_path / "toy.reel", lambda _: True) as filled:
        with whole_directory(tmp_path / "toy.reel", lambda _: True) as later:
            (later / "a").touch()
        assert filled.is_dir()
    assert sorted(os.listdir(tmp_path)) == [".new-of-somebody-else", "toy.reel"]


def test_a_folder_that_cannot_be_written_or_made_is_found_before_and_nothing_is_left_in_one_that_can(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for check in (lambda: check_writable(tmp_path / "file" / "cache"), lambda: check_replaceable(tmp_path / "file" / "toy.reel", lambda _: True)):
        with pytest.raises(StorageError, match=r"cannot write into .*file: Not a directory\. Choose another path"):
            check()
    check_writable(tmp_path / "deep" / "cache")
    assert os.listdir(tmp_path) == ["file"]
