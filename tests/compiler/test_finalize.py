"""Bundles that leave their engines to the target, with backends that really compile."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reelstep import __main__ as cli
from reelstep.compiler import finalize as module
from reelstep.compiler import load as load_module
from reelstep.compiler import sources
from reelstep.compiler.backends import BACKENDS, Backend, Executable, Graph, Watch, unwatched
from reelstep.compiler.backends.null import NullExecutable
from reelstep.compiler.bundle import Bundle
from reelstep.compiler.compile import choose_precision, compile_model
from reelstep.compiler.finalize import Finalized, explain, finalize
from reelstep.compiler.load import load
from reelstep.compiler.program import Precision, Program
from reelstep.compiler.signature import Signature
from reelstep.compiler.skus import SKUS
from reelstep.compiler.storage import seal, sealed
from reelstep.errors import CompileError, ConfigError, NotFound, StorageError

CompileToy = Callable[..., Bundle]


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory, programs: tuple[Program, ...], compile_toy: CompileToy) -> Bundle:
    """For openvino, without engines: the toy's lookup, which compiles in no time, also as a program in the plan's precision."""
    lookup, sizes = programs[1], programs[0].profiles
    find = replace(lookup, name="find", keep_f32=False, profiles=tuple(replace(profile, sizes={"L": profile.sizes["L"]}) for profile in sizes))
    return compile_toy(tmp_path_factory.mktemp("portable") / "toy.reel", (find, lookup), "openvino")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, portable: Bundle) -> Path:
    """A cache with all engines of `portable`. Not to be changed."""
    cache = tmp_path_factory.mktemp("full") / "cache"
    finalize(portable, cache)
    return cache


@pytest.fixture
def cache(full: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(full, tmp_path / "cache"))


def states(done: tuple[Finalized, ...]) -> dict[str, str]:
    return {f"{each.program} {each.profile}": each.state for each in done}


def test_a_portable_bundle_holds_no_engine_and_stays_as_it_is(portable: Bundle, full: Path) -> None:
    assert {path.suffix for path in portable.path.rglob("*") if path.is_file()} == {".json", ".md", ".safetensors"}
    assert list(full.glob("openvino-*.blob"))


def test_finalizing_builds_each_engine_once_and_loading_builds_none(
    portable: Bundle, tmp_path: Path, programs: tuple[Program, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[str, int, int]] = []
    first = finalize(portable, tmp_path / "cache", progress=lambda *step: steps.append(step))
    assert states(first) == {"find l4": "built", "find l3": "built", "lookup l4": "built"}
    assert [step for step in steps if "build" in step[0]] == [(f"openvino: build {name}", i, 3) for i, name in enumerate(states(first))]
    engines = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert sum(each.engine_bytes for each in first) == sum(path.stat().st_size for path in engines if path.suffix == ".blob")
    again = finalize(portable, tmp_path / "cache")
    assert {*states(again).values()} == {"cached"}
    assert "nothing to do: all 3 engines are in" in explain(again, tmp_path / "cache")
    monkeypatch.setattr(Bundle, "program", lambda *_: pytest.fail("a graph was read, so an engine is built"))
    loaded = load(portable, tmp_path / "cache")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()} == engines
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(loaded["lookup", "l4"]({"ids": ids})["sum"], programs[1].module(ids).detach(), rtol=1e-6, atol=1e-6)


def test_a_damaged_engine_is_built_again_and_said(portable: Bundle, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = next(path for path in sorted(cache.glob("*.blob")))
    one.write_bytes(b"not an engine")
    done = finalize(portable, cache)
    assert sorted(states(done).values()) == ["cached", "cached", "rebuilt"]
    assert caplog.text.count(f"{one} is damaged") == 1
    assert "1 built in" in explain(done, cache)
    assert "(what was in the cache was damaged or not made here)" in explain(done, cache)
    assert {*states(finalize(portable, cache)).values()} == {"cached"}


def test_engines_of_another_machines_cache_are_not_trusted(portable: Bundle, cache: Path) -> None:
    """Native code runs only if this user sealed it here: a copy of the files without the secret is not enough."""
    (cache / "seal.secret").unlink()
    assert {*states(finalize(portable, cache)).values()} == {"rebuilt"}


def test_a_bundle_for_a_mesh_leaves_nothing_to_finalize(portable: Bundle, tmp_path: Path) -> None:
    meshed = copy(portable)
    meshed.plan = replace(portable.plan, mesh={"cp": 3})
    with pytest.raises(CompileError, match=r"was planned for mesh cp=3: its ranks build their own .* Open it with `reelstep serve \S+toy\.reel --mesh cp=3`"):
        finalize(meshed, tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_engines_that_other_sources_made_are_left_and_made_again(portable: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as edited:
        edited.setattr(sources, "source_hash", lambda *folders: "of an edited pass")
        assert {*states(finalize(portable, cache)).values()} == {"built"}
    assert {*states(finalize(portable, cache)).values()} == {"cached"}


def test_a_finalize_that_was_killed_goes_on_where_it_stopped(portable: Bundle, tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, time\n"
        "from reelstep.compiler.bundle import Bundle\n"
        "from reelstep.compiler.finalize import finalize\n"
        "def tell(stage, done, total):\n"
        "    if 'build' in stage and done == 2: print('killed here', flush=True); time.sleep(60)\n"
        "finalize(Bundle.open(pathlib.Path(sys.argv[1])), pathlib.Path(sys.argv[2]), progress=tell)\n"
    )
    cache = tmp_path / "cache"
    with subprocess.Popen([sys.executable, "-P", "-c", code, str(portable.path), str(cache)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "killed here\n"
        process.send_signal(signal.SIGKILL)
    assert states(finalize(portable, cache)) == {"find l4": "cached", "find l3": "cached", "lookup l4": "built"}


def test_what_a_killed_builder_left_goes_with_the_next_build_and_what_a_live_one_fills_stays(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\n"
        "from reelstep.compiler.storage import seal\n"
        "def write(path):\n"
        "    path.write_bytes(b'half'); print(path.parent, flush=True); sys.stdin.readline(); path.write_bytes(b'whole')\n"
        "seal(pathlib.Path(sys.argv[1]), write)\n"
    )

    def builder(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", "-c", code, str(tmp_path / f"{name}.blob")]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    with builder("killed") as killed, builder("live") as live:
        assert killed.stdout is not None
        assert live.stdout is not None
        left, filled = Path(killed.stdout.readline().strip()), Path(live.stdout.readline().strip())
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert {*tmp_path.glob(".new-*")} == {left, filled}
        seal(tmp_path / "next.blob", lambda path: path.write_bytes(b"engine"))
        assert {*tmp_path.glob(".new-*")} == {filled}
        live.communicate("\n")
    assert live.returncode == 0
    assert not {*tmp_path.glob(".new-*")}
    assert sealed(tmp_path / "live.blob")
    assert (tmp_path / "live.blob").read_bytes() == b"whole"
    assert not sealed(tmp_path / "killed.blob")


def test_an_engine_that_is_killed_half_written_is_not_taken(portable: Bundle, cache: Path) -> None:
    one = next(path for path in sorted(cache.glob("*.blob")))
    one.with_name(one.name + ".seal").unlink()
    assert sorted(states(finalize(portable, cache)).values()) == ["cached", "cached", "rebuilt"]


def test_engines_of_another_backend_version_or_precision_are_not_taken(portable: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = next(precision for precision in ("float32", "bfloat16") if precision != portable.plan.precision)
    if other in BACKENDS["openvino"].precisions:
        assert states(finalize(portable, cache, precision=other)) == {"find l4": "built", "find l3": "built", "lookup l4": "cached"}
    monkeypatch.setattr("reelstep.compiler.backends.openvino.ov.__version__", "9999.0")
    assert {*states(finalize(portable, cache)).values()} == {"built"}


@pytest.mark.parametrize("backend", ["eager", "null"])
def test_a_backend_that_compiles_nothing_ahead_has_nothing_to_do(portable: Bundle, tmp_path: Path, backend: str) -> None:
    done = finalize(portable, tmp_path / "cache", backend)
    assert {*states(done).values()} == {"stateless"}
    assert "nothing to do: this backend compiles nothing ahead" in explain(done, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow  # the C++ compiler
def test_inductor_is_finalized_too(portable: Bundle, tmp_path: Path, programs: tuple[Program, ...], compile_toy: CompileToy) -> None:
    bundle = compile_toy(tmp_path / "toy.reel", programs[1:], "inductor")
    assert states(finalize(bundle, tmp_path / "cache")) == {"lookup l4": "built"}
    began = time.monotonic()
    assert states(finalize(bundle, tmp_path / "cache")) == {"lookup l4": "cached"}
    assert time.monotonic() - began < 5
    ids = torch.tensor([[1, 2, 3, 4]])
    found = load(bundle, tmp_path / "cache")["lookup", "l4"]({"ids": ids})["sum"]
    torch.testing.assert_close(found, programs[1].module(ids).detach(), rtol=1e-6, atol=1e-6)


def test_a_full_disk_is_found_before_anything_is_built(portable: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 11 * 8 * (4 + 2 * (2 if portable.plan.precision == "bfloat16" else 4))  # one table in each of three engines
    for free in (needed - 1, needed):
        monkeypatch.setattr(module, "free_bytes", lambda _, free=free: free)
        if free < needed:
            monkeypatch.setattr(Bundle, "program", lambda *_: pytest.fail("a graph was read"))
            with pytest.raises(StorageError, match=r"the engines to build \(find l4, find l3, lookup l4\) hold .* of weights\. Nothing was built"):
                finalize(portable, tmp_path / "cache")
            monkeypatch.undo()
    assert {*states(finalize(portable, tmp_path / "cache")).values()} == {"built"}


def test_a_cache_that_cannot_be_written_is_found_before_anything_is_built(portable: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(Bundle, "program", lambda *_: pytest.fail("a graph was read"))
    with pytest.raises(StorageError, match=r"cannot write into .*file: Not a directory"):
        finalize(portable, tmp_path / "file" / "cache")


def test_too_little_memory_is_found_before_anything_is_built(portable: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SKUS", {"cpu": replace(SKUS["cpu"], memory_bytes=100)})
    with pytest.raises(CompileError, match=r"(find|lookup) l4 holds .* of weights, and cpu has 1e-07 GB of memory; compile with a smaller --precision"):
        finalize(portable, tmp_path / "cache")


class Apart(Backend):
    """Its engines hold no weights, and its builds have phases."""

    name, runs, weights_apart = "apart", True, True
    precisions = ("float32", "bfloat16")

    def __init__(self, watch: Watch = unwatched) -> None:
        self.watch = watch

    def watched(self, watch: Watch) -> Backend:
        return Apart(watch)

    def build(self, graph: Graph, signature: Signature, precision: Precision, cache: Path | None, key: str) -> Executable:
        assert cache is not None
        path = cache / f"apart-{key}"
        if not sealed(path):
            graph()
            for step in range(3):
                self.watch("tactics", step, 3)
            seal(path, lambda temporary: temporary.write_bytes(b"plan"))
        return NullExecutable(signature)


def test_engines_without_weights_need_no_room_for_them_and_their_builds_are_told_of(portable: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SKUS", {"cpu": replace(SKUS["cpu"], memory_bytes=100)})
    monkeypatch.setattr(module, "choose", lambda *_: (Apart(), "float32"))
    told: list[tuple[str, int, int]] = []
    done = finalize(portable, tmp_path, progress=lambda *stage: told.append(stage))
    assert {each.state for each in done} == {"built"}
    program, profile = next(iter(portable.signatures))
    mine = [stage for stage in told if stage[0].startswith(f"apart: build {program} {profile}")]
    assert mine == [(f"apart: build {program} {profile}", 0, len(done)), (f"apart: build {program} {profile}: tactics", 0, len(done))]


def test_of_engines_that_may_leave_weights_on_the_host_the_largest_is_loaded_last(portable: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = list(portable.signatures)
    assert len(keys) == 3
    needs = dict(zip(keys, (3, 1, 2), strict=True))
    monkeypatch.setattr(load_module, "choose", lambda *_: (Apart(), "float32"))
    monkeypatch.setattr(load_module, "weights_of_engines", lambda *_: needs)
    told: list[str] = []
    engines = load(portable, tmp_path, progress=lambda stage, *_: told.append(stage))
    assert [" ".join(key) for key in sorted(keys, key=needs.__getitem__)] == [stage.removeprefix("apart: ") for stage in told if stage.count(":") == 1][:3]
    assert list(engines) == keys


@pytest.fixture(scope="module")
def for_h200(tmp_path_factory: pytest.TempPathFactory, programs: tuple[Program, ...]) -> Bundle:
    """Planned for a GPU that is not here, with the one backend that needs nothing of it, and marked as if it ran."""
    return compile_model(
        model="toy", version="1", settings={}, programs=programs[1:], backend="null", sku="h200-sxm", out=tmp_path_factory.mktemp("h200") / "toy.reel",
        solvers={}, card="# Toy\n", cache=None,
    )  # fmt: skip


def test_a_bundle_for_another_sku_is_compiled_anywhere_and_says_what_it_is_for(for_h200: Bundle) -> None:
    plan = for_h200.plan
    assert (plan.sku, plan.arch, plan.precision) == ("h200-sxm", "sm90", "bfloat16")
    assert "SKU h200-sxm (sm90)" in plan.explain()


def test_a_bundle_for_another_sku_is_refused_with_both_names(for_h200: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "detect", lambda: SKUS["b200"])
    monkeypatch.setattr(type(BACKENDS["null"]), "runs", True)
    for use in (lambda: finalize(for_h200, tmp_path / "cache"), lambda: load(for_h200, None)):
        with pytest.raises(CompileError, match=r"for h200-sxm \(sm90\), and this machine is b200 \(sm100.*\)\. Use it on h200-sxm, or .*--sku b200"):
            use()
    monkeypatch.setattr(load_module, "detect", lambda: SKUS["h200-sxm"])
    assert {*states(finalize(for_h200, tmp_path / "cache")).values()} == {"stateless"}


def test_another_backend_may_still_run_it_here(for_h200: Bundle) -> None:
    assert load(for_h200, None, "eager")["lookup", "l4"]({"ids": torch.zeros(2, 4, dtype=torch.int64)})["sum"].shape == (2, 8)


def test_a_backend_and_a_sku_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"backend 'openvino' does not run on h200-sxm; choose .*null"):
        choose_precision("openvino", SKUS["h200-sxm"], None)
    assert choose_precision("null", SKUS["h200-sxm"], "float32") == ("float32", "asked for")
    with pytest.raises(NotFound, match="h200-sxm"):
        SKUS["h20"]


def test_the_command_says_what_was_built_and_then_that_there_is_nothing_to_do(portable: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["finalize", str(portable.path), "--cache", str(tmp_path / "cache")]
    assert cli.main(command) == 0
    assert "3 built in" in capsys.readouterr().out
    assert cli.main(command) == 0
    assert "nothing to do: all 3 engines are in" in capsys.readouterr().out
