"""The command line: exit statuses, one clear line for an error, files that appear whole."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from reelstep import __main__ as cli
from reelstep.benchmarks import BENCHMARKS
from reelstep.engine.commands import sample
from reelstep.tests.engine.service.fake_engine import FakeEngine
from reelstep.tests.engine.service.in_process import Served, served, wait_until
from reelstep.training.fits import FITS


@pytest.fixture(scope="module")
def fake() -> Iterator[Served]:
    with served() as running:
        yield running


def generate(fake: Served, *arguments: str) -> int:
    return cli.main(["generate", "--server", fake.address, *arguments])


def test_help_teaches_and_needs_neither_torch_nor_grpc() -> None:
    code = "import sys, reelstep.__main__ as m; p = m.build_parser(); print(p.format_help()); sys.exit(bool({'torch', 'grpc', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout
    assert "reelstep serve" in done.stdout


def test_generate_writes_the_file_and_prints_seed_and_cost(fake: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fox.webp"
    assert generate(fake, "a fox", "-o", str(out), "--seed", "5", "--steps", "6") == 0
    printed = capsys.readouterr().out
    assert out.read_bytes()[8:12] == b"WEBP"
    assert "seed 5" in printed
    assert "NFE 6, forwards 12; queue 0.25 s; compute 2.00 s" in printed


def test_generate_and_sample_take_a_quality_and_print_what_it_chose(
    fake: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sample, "open_for", lambda *_: FakeEngine())
    out = str(tmp_path / "fox.webp")
    for command in (["generate", "--server", fake.address], ["sample", "fake.reel"]):
        assert cli.main([*command, "a fox", "-o", out, "--quality", "standard"]) == 0
        assert "fake text_to_video, standard: heun on linear, 5 steps, gate at scale 3\n" in capsys.readouterr().out
        assert cli.main([*command, "a fox", "-o", out, "--quality", "standard", "--guidance-option", "stop=0.5"]) == 2
        assert "leave quality out, or else the rule's options" in capsys.readouterr().err
        assert cli.main([*command, "a fox", "-o", out, "--quality", "auto"]) == 0
        assert "fake text_to_video, draft by auto: bns_6 on linear, 6 steps, cfg at scale 2.5\n" in capsys.readouterr().out


def test_generate_and_sample_take_a_step_cache_and_print_what_it_skipped(
    fake: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sample, "open_for", lambda *_: FakeEngine())
    out = str(tmp_path / "fox.webp")
    for command in (["generate", "--server", fake.address], ["sample", "fake.reel"]):
        assert cli.main([*command, "a fox", "-o", out, "--steps", "6", "--step-cache", "skip", "--step-cache-option", "threshold=0.5"]) == 0
        printed = capsys.readouterr().out
        assert "cfg at scale 3, step cache skip\n" in printed
        assert "NFE 6, forwards 6, cached 6; queue" in printed
        assert cli.main([*command, "a fox", "-o", out, "--step-cache", "skip", "--step-cache-option", "treshold=0.5"]) == 2
        assert "unknown option ['treshold']" in capsys.readouterr().err


def test_count_writes_numbered_files(fake: Served, tmp_path: Path) -> None:
    assert generate(fake, "a fox", "-o", str(tmp_path / "fox.png"), "--count", "3", "--seed", "1") == 0
    assert sorted(os.listdir(tmp_path)) == ["fox-0.png", "fox-1.png", "fox-2.png"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a fox", "-o", "out.avi"], "suffix '.avi' is none of"),
        (["a fox", "-o", "nowhere/out.mp4"], "there is no folder"),
        (["", "-o", "out.mp4"], "prompt: is empty"),
        (["caf\udce9", "-o", "out.mp4"], "prompt: is not UTF-8"),
        (["a fox", "-o", "out.mp4", "--steps", "0"], "steps: 0 is not in 1..100"),
        (["a fox", "-o", "out.mp4", "--steps", "-3"], "steps: -3 is not a whole number from 0 to 4294967295"),
        (["a fox", "-o", "out.mp4", "--frames", "99999999999"], "frames: 99999999999 is not a whole number from 0 to 4294967295"),
        (["a fox", "-o", "out.mp4", "--scale", "nan"], "scale: nan is not in 0..20"),
        (["a fox", "-o", "out.mp4", "--size", "63x64"], "width: size 63x64 was not compiled; one of: 64x64, 512x384"),
        (["a fox", "-o", "out.mp4", "--size", "64x32"], "height: size 64x32 was not compiled; one of: 64x64, 512x384"),
        (["a fox", "-o", "out.mp4", "--solver", "magic"], "known: bns_6, euler, heun"),
        (["a fox", "-o", "out.mp4", "--quality", "magic"], "it has: draft, standard, best"),
        (["a fox", "-o", "out.mp4", "--quality", "draft", "--steps", "3"], "leave quality out, or else steps"),
        (["a fox", "-o", "out.mp4", "--model", "magic"], "known: fake"),
        (["a fox", "-o", "out.mp4", "--image", "none.png"], "cannot read none.png"),
        (["a fox", "-o", "out.mp4", "--image", os.devnull], "image: is not a picture that can be read; send one of: PNG"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    fake: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert generate(fake, *arguments) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert printed[-1].startswith("reelstep: ")
    assert says in printed[-1]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["compile", "reel-tny"], 2, "unknown model 'reel-tny'; known: "),
        (["compile", "reel-tny", "--quantise", "int8"], 2, "unknown model 'reel-tny'; known: "),
        (["keygen", "nowhere/release"], 1, "nowhere/release"),
        (["inspect", "nothere.reel"], 1, "nothere.reel"),
    ],
)
def test_what_was_asked_wrongly_is_status_2_and_what_is_not_there_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == status
    assert says in capsys.readouterr().err
    assert "exit status:\n  0 done; 2 the command or the request is wrong; 1 " in cli.build_parser().format_help()


@pytest.mark.parametrize("table", ["bench", "fit"])
def test_benchmarks_and_fits_are_listed_with_what_they_are(table: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([table]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list({"bench": BENCHMARKS, "fit": FITS}[table])
    assert all(len(line.split()) > 5 for line in lines)


def test_a_port_that_is_taken_is_one_line_of_ours() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-P", "-m", "reelstep", "serve", "x.reel", "--port", str(taken.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/", env=environment)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("reelstep: cannot listen on 127.0.0.1:")


def test_no_server_is_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "a fox", "-o", str(tmp_path / "a.mp4"), "--server", "localhost:1"]) == 1
    assert "does not answer" in capsys.readouterr().err


def test_a_full_disk_leaves_the_old_video(fake: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fox.mp4"
    out.write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert generate(fake, "a fox", "-o", str(out)) == 1
    assert "No space left" in capsys.readouterr().err
    assert out.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["fox.mp4"]


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """A shell has what it runs in the background ignore Ctrl-C, and so would the children of these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_cancels_the_work_and_exits_with_130(fake: Served, tmp_path: Path) -> None:
    before = len(fake.engine.requests)
    command = [sys.executable, "-m", "reelstep", "generate", "endless", "-o", str(tmp_path / "a.mp4"), "--server", fake.address]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd="/") as process:
        wait_until(lambda: len(fake.engine.requests) > before, 60)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "cancelled" in stderr
    assert "Traceback" not in stderr
    wait_until(lambda: fake.engine.requests[-1].id in fake.engine.ended)
    assert os.listdir(tmp_path) == []


ENDING = """
import atexit, sys, threading, time
import reelstep.__main__ as cli

class Imported:
    def __del__(self):
        print("taken apart")

def main():
    atexit.register(print, "what was registered")
    threading.Thread(target=lambda: (time.sleep(0.2), print("a thread"))).start()
    return 3

cli.kept, cli.main = Imported(), main
sys.exit(cli.command())
"""


def test_a_command_ends_after_threads_and_what_was_registered_and_takes_nothing_apart() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", ENDING], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (3, "a thread\nwhat was registered\n", "")


TALKING = """
import sys
from dataclasses import replace
import reelstep.__main__ as cli
from reelstep.engine.commands import inspect
inspect.COMMAND = replace(inspect.COMMAND, run=lambda args: print("a line\\n" * 100_000))
sys.exit(cli.command())
"""


@pytest.mark.parametrize(("ends", "status"), [("| head -1; echo ${PIPESTATUS[0]} >&2", "1\n"), (">&-; echo $? >&2", "0\n")])
def test_a_reader_that_went_and_an_output_that_was_closed_are_no_crash(ends: str, status: str) -> None:
    shell = ["bash", "-c", f'"$0" -P -c "$1" inspect x.reel {ends}', sys.executable, TALKING]
    assert subprocess.run(shell, capture_output=True, text=True, timeout=60).stderr == status


@pytest.mark.parametrize("option", [["--max-running", "0"], ["--max-queue", "-1"]])
def test_a_server_that_would_serve_nobody_is_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "x.reel", *option]) == 2
    assert "would leave every request waiting; give at least" in capsys.readouterr().err


def test_sample_makes_what_the_server_makes(fake: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "open_for", lambda *_: FakeEngine())
    assert cli.main(["sample", "fake.bundle", "a fox", "-o", str(tmp_path / "local.png"), "--seed", "9"]) == 0
    assert generate(fake, "a fox", "-o", str(tmp_path / "served.png"), "--seed", "9") == 0
    assert (tmp_path / "local.png").read_bytes() == (tmp_path / "served.png").read_bytes()
