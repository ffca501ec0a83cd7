"""A replica of processes: right numbers, rows spread over guidance branches, and a clear word about the rank that is wrong, absent or lost."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parent))  # ranks import what they load by name
import rank_programs
from rank_programs import Sums

from reelstep.compiler.part import Part
from reelstep.engine.executors.processes import Processes, ShardedModel, World, open_store, start
from reelstep.engine.pipelines.latent import blend_tiles
from reelstep.engine.request import Call
from reelstep.errors import BundleError, ConfigError, NotFound, Unavailable
from reelstep.parallel.mesh import Mesh


def world(mesh: str, collective_s: float = 60.0, start_s: float = 120.0) -> World:
    return World(Mesh.parse(mesh), "gloo", start_s=start_s, load_s=start_s, collective_s=collective_s, silence_s=4.0)


def add(*values: float) -> Call:
    return Call("add", "p", {"x": torch.tensor(values)})


@pytest.fixture
def sharded(tmp_path: Path) -> Iterator[tuple[Processes, torch.nn.Module]]:
    torch.manual_seed(0)
    module = rank_programs.build().eval()
    file = tmp_path / "w.safetensors"
    save_file({f"denoiser.{name}": w for name, w in module.state_dict().items()}, file)
    part = Part("rank_programs:build", "rank_programs:programs", "movie-gen", "denoiser.")
    replica = start(world("cfg=2,cp=2"), ShardedModel("small", file, (part,), "eager"))
    yield replica, module.double()
    replica.close()


def test_the_store_where_ranks_meet_listens_at_its_own_address_alone() -> None:
    store = open_store("127.0.0.1", 5.0)
    socket.create_connection(("127.0.0.1", store.port), 5).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", store.port), 5)


def test_guidance_branches_on_halves_of_the_mesh_give_one_devices_numbers_and_bad_inputs_harm_nothing(sharded: Any) -> None:
    replica, module = sharded
    assert replica.max_rows == {("small", "denoise", "p"): 2}
    with pytest.raises(ConfigError, match="x is missing"):
        replica.run("small", [Call("denoise", "p", {"modulation": torch.zeros(1, 7, 24), "context": torch.zeros(1, 5, 24)})])
    with pytest.raises(NotFound, match="known: small"):
        replica.run("large", [add(1.0)])
    with pytest.raises(ConfigError, match="already a rank; close that replica first"):
        start(world("cfg=2"), Sums())
    branches = [{"x": torch.randn(1, 4, 3, 4, 4), "modulation": torch.randn(1, 7, 24), "context": torch.randn(1, 5, 24)} for _ in range(3)]
    outputs = replica.run("small", [Call("denoise", "p", inputs) for inputs in branches])
    for inputs, output in zip(branches, outputs, strict=True):
        with torch.no_grad():
            wanted = module(inputs["x"].double(), inputs["modulation"].double(), None, inputs["context"].double())
        assert (output["velocity"] - wanted).norm() < 1e-5 * wanted.norm()


def test_rows_are_spread_over_cfg_and_come_back_in_order() -> None:
    replica = start(world("cfg=2"), Sums())
    (first, second) = replica.run("sums", [add(1.0, 2.0), add(3.0)])
    assert (first["y"].tolist(), first["half"].tolist()) == ([1.0, 2.0], [0.0, 0.0])
    assert (second["y"].tolist(), second["half"].tolist()) == ([3.0], [1.0])
    assert replica.run("sums", [add(5.0)])[0]["y"].tolist() == [5.0], "fewer rows than branches"
    children = list(replica.children.values())
    replica.close()
    replica.close()
    assert [child.exitcode for child in children] == [0]
    with pytest.raises(Unavailable, match="have been stopped"):
        replica.run("sums", [add(1.0)])


def test_tiles_of_an_autoencoder_are_spread_over_all_ranks_and_join_to_one_devices_video() -> None:
    tae, size, begins = rank_programs.autoencoder().double(), 3, [0, 2, 4, 6, 7]
    latent = torch.randn(1, 4, 10, 2, 2)
    tiles = [latent[:, :, begin : begin + size] for begin in begins]
    with torch.no_grad():
        wanted = blend_tiles([tae.decode(tile.double()) for tile in tiles], begins, 2)
    replica = start(world("cfg=2,cp=2"), rank_programs.Tiles())
    try:
        assert replica.max_rows == {("tae", "decode", "p"): 8}, "two on each rank"
        outputs = replica.run("tae", [Call("decode", "p", {"latent": tile}) for tile in tiles])
        assert [int(output["rank"]) for output in outputs] == [0, 0, 1, 2, 3]
        assert (blend_tiles([output["video"] for output in outputs], begins, 2) - wanted).norm() < 1e-5 * wanted.norm()
        for rows in range(1, 10):  # also where a half, or a rank of one, has none, and where they are more than a batch holds
            (output,) = replica.run("tae", [Call("decode", "p", {"latent": torch.cat(tiles * 2)[:rows]})])
            alone = torch.cat([outputs[i % 5]["video"] for i in range(rows)])
            assert (output["video"] - alone).norm() < 1e-5 * alone.norm(), rows
            assert len(set(output["rank"].tolist())) == min(rows, 4)
    finally:
        replica.close()


def test_a_rank_that_is_killed_at_work_is_named_within_five_seconds() -> None:
    replica = start(world("tp=2"), Sums())
    assert replica.run("sums", [add(1.0)])[0]["y"].tolist() == [3.0]
    child = replica.children[1]

    threading.Timer(0.5, lambda: os.kill(child.pid, signal.SIGKILL)).start()
    began = time.monotonic()
    with pytest.raises(Unavailable, match=r"rank 1 of 2 was killed by SIGKILL \(during add p, call 2\)"):
        replica.run("sums", [add(-1.0)])
    assert time.monotonic() - began < 5.5
    with pytest.raises(Unavailable, match="SIGKILL"):
        replica.run("sums", [add(1.0)])
    replica.close()


def test_a_rank_that_is_killed_while_idle_is_noticed_within_five_seconds() -> None:
    replica = start(world("tp=2"), Sums())
    os.kill(replica.children[1].pid, signal.SIGKILL)
    end = time.monotonic() + 5
    while replica.failure is None and time.monotonic() < end:
        time.sleep(0.05)
    assert replica.failure == "rank 1 of 2 was killed by SIGKILL; start the replica again"
    replica.close()


def test_a_rank_whose_program_fails_is_named_with_its_error() -> None:
    replica = start(world("tp=2"), Sums())
    with pytest.raises(Unavailable, match=r"rank 1 of 2 failed: ValueError: x is too large for this rank \(during add p, call 1\)"):
        replica.run("sums", [add(2000.0)])
    replica.close()


@pytest.mark.parametrize(
    ("ranks", "error", "words"),
    [
        (Sums(1, "load"), Unavailable, "rank 1 of 2 failed at 'loaded': ValueError: no memory for weights"),
        (Sums(1, "link"), Unavailable, r"rank 1 of 2 failed at 'tested': InternalError: all_reduce over tp \(ranks 0, 1\) gave rank 1"),
        (Sums(os.getpid(), "other weights"), BundleError, "rank 1 has weights bbb where rank 0 has aaa; give all ranks the same"),
    ],
)
def test_a_rank_that_is_wrong_at_the_start_is_named(ranks: Sums, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        start(world("tp=2"), ranks)


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reelstep.engine.executors.processes.__version__", "9.9")  # of rank 0 alone: the others import for themselves
    with pytest.raises(BundleError, match=r"rank 1 has reelstep 0\.\S+ where rank 0 has 9\.9"):
        start(world("tp=2"), Sums())


def test_a_rank_that_never_comes_is_named() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))
    with pytest.raises(Unavailable, match=r"no word of 'hello' from rank 1, 2 of 3 in 0.3 s \(ranks 0 are there\)"):
        Processes(world("tp=3", start_s=0.3), Sums(), store, {})
