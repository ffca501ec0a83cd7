"""Replicas on Ray, on a cluster of several nodes on this machine: nodes and ranks are killed, and every request gets what it gets undisturbed."""

from __future__ import annotations

import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

# ruff: noqa: E402
ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'reelstep[cluster]'")
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager
from ray.cluster_utils import Cluster

from reelstep.compiler.bundle import Bundle
from reelstep.compiler.compile import compile_model
from reelstep.compiler.part import Part
from reelstep.compiler.skus import SKUS, is_gpu
from reelstep.engine.executors import cluster, on_mesh
from reelstep.engine.executors.bundles import Stored, WholeBundles
from reelstep.engine.executors.cluster import ACCELERATORS, Cargo, OnCluster, OnRay, Patience, Share, connect, open_on_cluster, room, start_on_ray
from reelstep.engine.executors.inline import Inline
from reelstep.engine.executors.patience import Allowance
from reelstep.engine.executors.processes import Ranks, World
from reelstep.engine.executors.replicas import Scaling
from reelstep.engine.executors.restarting import Bounds, Restarting
from reelstep.engine.models import MODELS
from reelstep.engine.models.spec import ModelSpec
from reelstep.engine.request import Call
from reelstep.errors import BundleError, ConfigError, NotFound, Unavailable
from reelstep.parallel.mesh import Mesh
from reelstep.tests.engine.executors import small_model
from reelstep.tests.engine.executors.toy_engine import Heard, ask, check_against_one_process, engine_on, point, until
from reelstep.tests.engine.executors.toy_ranks import MODEL, Toy, Whole, alone

PATIENT = Patience(place_s=30.0, pulse_s=4.0)
MANY = Bounds(starts=30, window_s=60.0, reruns=10)
STORE_BYTES = 80 << 20


def world(mesh: str = "") -> World:
    return World(Mesh.parse(mesh), "gloo", start_s=120.0, load_s=120.0, collective_s=20.0, silence_s=4.0)


class Nodes:
    """A cluster whose head runs nothing, and two nodes of one CPU."""

    def __init__(self) -> None:
        checks = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 2000, "health_check_failure_threshold": 3}
        checks["worker_niceness"] = 0  # by Ray's 15, whatever else this machine does starves the ranks
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES, "_system_config": checks}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        connect(self.cluster.address)  # by the head, while there is no other node that may be killed
        for _ in range(2):
            self.add()

    def add(self) -> str:
        return str(self.cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES).node_id)

    def kill(self, node: str) -> None:
        self.cluster.remove_node(next(each for each in self.cluster.list_all_nodes() if each.node_id == node), allow_graceful=False)

    def drain(self, node: str) -> None:
        command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", self.cluster.address, "--node-id", node]
        subprocess.run(
            [*command, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "moved", "--deadline-remaining-seconds", "600"],
            check=True, capture_output=True,
        )  # fmt: skip

    def whole_again(self) -> None:
        """Two nodes, both free."""
        while len(self.cluster.list_all_nodes()) < 3:
            self.add()
        until(lambda: ray.available_resources().get("CPU") == 2, 30)


@pytest.fixture(scope="module")
def shared() -> Iterator[Nodes]:
    made = Nodes()
    yield made
    ray.shutdown()
    made.cluster.shutdown()


@pytest.fixture
def nodes(shared: Nodes) -> Nodes:
    shared.whole_again()
    return shared


def begin(ranks: Ranks, mesh: str = "", cargo: Cargo | None = None, patience: Patience = PATIENT) -> OnRay:
    return start_on_ray(world(mesh), ranks, Share(1.0 / max(1, world(mesh).mesh.world)), patience, cargo)


def pids(folder: Path) -> list[int]:
    """Of the processes that have run a call, the last one first."""
    return [int(path.name.split("-")[0]) for path in sorted(folder.iterdir(), key=lambda path: int(path.name.split("-")[1]), reverse=True)]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    model = small_model.build()
    return compile_model(
        model="small", version="1", settings=MODELS["dit-mid"].settings.to_json(), programs=small_model.programs(model), backend="eager", sku="cpu",
        precision=None, out=tmp_path_factory.mktemp("small") / "small.reel", solvers={}, fitted={}, card="", cache=None,
    )  # fmt: skip


WANTED = Inline({MODEL: alone()}).run(MODEL, [point(0), point(1)])


def right(replica: Any) -> bool:
    outputs = replica.run(MODEL, [point(0), point(1)])
    return all(torch.equal(output["velocity"], want["velocity"]) for output, want in zip(outputs, WANTED, strict=True))


def test_a_replica_of_one_rank_gives_the_same_bits_and_ends_with_its_process(nodes: Nodes, tmp_path: Path) -> None:
    replica = begin(Whole(tmp_path))
    assert replica.max_rows == {(MODEL, *key): rows for key, rows in alone().max_batch.items()}
    assert right(replica)
    with pytest.raises(NotFound, match="known: toy"):
        replica.run("other", [point(0)])
    os.kill(pids(tmp_path)[0], signal.SIGKILL)
    began = time.monotonic()
    until(lambda: replica.failure is not None, 5.0)
    assert time.monotonic() - began < 5.0
    with pytest.raises(Unavailable, match=f"rank 0 of 1 on node {replica.nodes[0]} is lost"):
        replica.run(MODEL, [point(0)])
    replica.close()
    replica.close()
    until(lambda: ray.available_resources().get("CPU") == 2, 10)


def test_a_rank_that_hangs_is_noticed_within_five_seconds_and_its_process_ended(nodes: Nodes, tmp_path: Path) -> None:
    replica = begin(Whole(tmp_path))
    assert right(replica)
    (pid,) = set(pids(tmp_path))
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(Unavailable, match=rf"rank 0 of 1 on node {replica.nodes[0]} has not been heard of for 4 s \(during denoise video, call 2\)"):
        replica.run(MODEL, [point(0)])
    assert time.monotonic() - began < 5.0
    replica.close()
    until(lambda: not Path(f"/proc/{pid}").exists(), 10)


@pytest.mark.parametrize(("mesh", "rank"), [("", 0), ("tp=2", 1)])
def test_a_call_that_never_ends_is_found_by_what_calls_took_and_runs_again(
    mesh: str, rank: int, nodes: Nodes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ranks = Toy(tmp_path, stops=1, rank=rank, first=1, stop_s=3600.0)
    executor = Restarting([partial(begin, ranks, mesh)], replace(MANY, calls=Allowance(first_s=20.0, least_s=1.0)))
    assert right(executor) == (mesh == "tp=2"), "one rank of the two gives its share alone"
    began = time.monotonic()
    executor.run(MODEL, [point(0), point(1)])
    assert time.monotonic() - began > 1.0
    assert (executor.restarts, executor.reruns) == (1, 2)
    world = 2 if mesh else 1
    what = r"denoise video of 'toy' with 2 rows has run for 1\.\d s on replica 0 \(usually \S+ s, at most \S+ s in 1 calls\)"
    assert re.search(rf"replica 0 ended: {what}: rank {rank} of {world} on node \w+ computes and does not come to an end", caplog.text)
    executor.close()


def test_a_mesh_of_two_ranks_is_in_one_placement_group_and_a_lost_rank_is_named(nodes: Nodes, tmp_path: Path) -> None:
    replica = begin(Toy(tmp_path), "tp=2")
    assert right(replica)
    assert replica.nodes[0] == replica.nodes[1], "packed on one node"
    ray.kill(replica.actors[1])
    until(lambda: replica.failure is not None, 5.0)
    assert f"rank 1 of 2 on node {replica.nodes[1]} is lost" in str(replica.failure)
    replica.close()


def test_what_cannot_start_says_why(nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable, match=r"rank 1 of 2 on node \w+ ended: InternalError: ValueError: no memory for weights"):
        begin(Toy(tmp_path, broken=True), "tp=2")
    impatient = replace(PATIENT, place_s=0.5)
    with pytest.raises(Unavailable, match=r"no room for a replica of 1 ranks \(STRICT_PACK\), each with {'CPU': 3.0}, in 0.5 s; free .* {'CPU': [12].0}"):
        start_on_ray(world(), Whole(tmp_path), Share(3.0), impatient)
    monkeypatch.setattr(cluster, "identity_of", lambda ranks: {"reelstep": "0.0.1", "torch": str(torch.__version__), **ranks.identity()})
    with pytest.raises(BundleError, match=r"rank 0 of 1 on node \w+ has reelstep \d.* where this process has 0.0.1; give all nodes the same"):
        begin(Whole(tmp_path))
    until(lambda: ray.available_resources().get("CPU") == 2, 10)


def test_a_cluster_that_is_not_there_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)

    def refuse(**_: Any) -> None:
        raise ConnectionError("no answer")

    monkeypatch.setattr(cluster.ray, "init", refuse)
    with pytest.raises(Unavailable, match=r"no Ray cluster at 'nowhere:1': no answer\. Start one with `ray start --head`"):
        connect("nowhere:1")


def test_nodes_without_the_bundle_are_sent_it_and_one_with_another_is_refused(nodes: Nodes, tmp_path: Path, compiled: Bundle) -> None:
    stored = Stored(tmp_path / "elsewhere.reel", compiled.manifest["sha256"], tmp_path / "cache")
    here = Stored.of(compiled, tmp_path)
    cargo = Cargo([stored])
    cargo._files[stored.digest] = Cargo([here]).files(here)  # as if this process's path were on no other node
    name = compiled.plan.model
    replica = begin(Sent(WholeBundles((stored,), "eager", "float32"), here.digest, stored.path.name), cargo=cargo)
    assert Bundle.open(tmp_path / "cache" / "bundles" / f"{stored.digest}.reel").plan == compiled.plan
    t = torch.tensor([0.1, 0.8])
    (output,) = replica.run(name, [Call("embed_time", "any", {"t": t})])
    (want,) = WholeBundles((here,), "eager", "float32").load(None)[name].run([Call("embed_time", "any", {"t": t})])  # type: ignore[arg-type]
    assert torch.equal(output["modulation"], want["modulation"])
    replica.close()
    other = replace(here, digest="f" * 64)
    with pytest.raises(BundleError, match="was replaced while it was served"):
        other.open()
    with pytest.raises(BundleError, match=rf"has bundle {here.path.name} {here.digest} where this process has {'f' * 64}"):
        begin(Sent(WholeBundles((other,), "eager", "float32"), "f" * 64, here.path.name))


class Sent:
    """Ranks as another process sees them: there, the bundle's digest is what its own path holds."""

    def __init__(self, ranks: WholeBundles, digest: str, name: str) -> None:
        self.ranks, self.digest, self.name, self.made_by = ranks, digest, name, os.getpid()

    def identity(self) -> dict[str, str]:
        return {f"bundle {self.name}": self.digest} if os.getpid() == self.made_by else dict(self.ranks.identity())

    def load(self, comm: Any) -> Any:
        return self.ranks.load(comm)


def replicas(folder: Path, count: int = 2, call_s: float = 0.0) -> Restarting:
    return Restarting([partial(begin, Whole(folder, call_s))] * count, MANY)


@contextmanager
def requests(executor: Restarting, steps: int) -> Iterator[list[Heard]]:
    """As long as the block runs, requests come, so that whatever ends then is in use; afterwards each has what it gets in one process."""
    engine, heard, coming = engine_on(executor), list[Heard](), threading.Event()
    coming.set()

    def submit() -> None:
        while coming.is_set():
            listener = Heard()
            engine.submit(ask(len(heard), steps), listener)
            heard.append(listener)
            if len(heard) > 16:
                heard[-16].ended.wait(300)

    submitter = threading.Thread(target=submit, daemon=True)
    submitter.start()
    try:
        yield heard
        coming.clear()
        submitter.join(300)
        for each in heard:
            each.result(300)
    finally:
        coming.clear()
        engine.close(1.0)
    check_against_one_process(heard, lambda _: steps)


def test_a_node_and_a_rank_killed_while_videos_are_made_change_no_pixel(nodes: Nodes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    executor = replicas(tmp_path, call_s=0.02)
    assert executor.capacity == 2
    with requests(executor, 40):
        until(lambda: len(set(pids(tmp_path))) == 2 and len(pids(tmp_path)) > 20)
        replica: Any = executor._places[0].replica
        nodes.kill(replica.nodes[0])
        until(lambda: executor.reruns > 0)
        calls = len(pids(tmp_path))
        until(lambda: len(pids(tmp_path)) > calls)  # the last call until now may have been one of the replica that is gone, and the next one is not
        os.kill(pids(tmp_path)[0], signal.SIGKILL)
        nodes.add()
        until(lambda: executor.restarts >= 2 and executor.capacity == 2, 120)


def test_a_replica_on_a_drained_node_is_replaced_first_and_then_closed(nodes: Nodes, tmp_path: Path) -> None:
    executor = replicas(tmp_path, 1)
    (place,) = executor._places
    old: Any = place.replica
    nodes.drain(old.nodes[0])
    until(lambda: old.leaving is not None, 10)
    assert right(executor), "nobody waits for the other one"
    until(lambda: old._closed.is_set(), 30)
    assert old.failure is None
    until(lambda: len(executor._places) == 1)
    (place,) = executor._places
    new: Any = place.replica
    assert new.nodes != old.nodes
    assert right(executor)
    executor.close()
    nodes.kill(old.nodes[0])


@pytest.mark.slow
def test_replicas_are_added_and_taken_away_and_room_is_what_is_left(nodes: Nodes, tmp_path: Path) -> None:
    executor = replicas(tmp_path, 1)
    assert room(Share(1.0), 1) == 1
    assert room(Share(0.5), 2) == 1
    assert room(Share(1.0), 2) == 0, "no node has two"
    executor.resize(2)
    until(lambda: executor.capacity == 2, 30)
    assert room(Share(1.0), 1) == 0
    assert right(executor)
    executor.resize(1)
    until(lambda: ray.available_resources().get("CPU") == 1, 30)
    assert executor.capacity == 1
    assert right(executor)
    executor.close()


@pytest.mark.slow
def test_a_bundle_on_a_mesh_of_actors_gives_one_devices_numbers(nodes: Nodes, compiled: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = Part(f"{small_model.__name__}:build_denoiser", f"{small_model.__name__}:denoiser_programs", rules="movie-gen", prefix="denoiser.")
    spec = ModelSpec("small", "1", MODELS["dit-mid"].settings, small_model.build, small_model.programs, None, sharding=(part,))
    monkeypatch.setattr(on_mesh, "MODELS", {"small": spec})
    executor = open_on_cluster([compiled], replicas=1, mesh=Mesh.parse("cp=2"), share=Share(0.5), cache=tmp_path)
    assert executor.max_rows == {("small", "denoise", "video"): 1, ("small", "embed_time", "any"): 16}, "rows of what is not sharded go to both"
    module: Any = small_model.build().double().denoiser
    inputs = {"x": torch.randn(2, 4, 3, 4, 4), "modulation": torch.randn(2, 7, 24), "context": torch.randn(2, 5, 24)}
    (output,) = executor.run("small", [Call("denoise", "video", inputs)])
    with torch.no_grad():
        wanted = module(inputs["x"].double(), inputs["modulation"].double(), None, inputs["context"].double())
    assert (output["velocity"] - wanted).norm() < 1e-5 * wanted.norm()
    executor.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_kills_at_random_times_under_two_hundred_requests_lose_none(nodes: Nodes, tmp_path: Path) -> None:
    draw = random.Random(7)
    executor = replicas(tmp_path, call_s=0.02)
    with requests(executor, 10) as heard:
        killed = 0
        while killed < 20:  # here, as Ray adds nodes in a main thread only
            time.sleep(draw.uniform(0.0, 2.0))
            alive = [pid for pid in dict.fromkeys(pids(tmp_path)) if Path(f"/proc/{pid}").exists()]
            if killed % 5 == 4:
                nodes.kill(draw.choice(sorted(node.node_id for node in nodes.cluster.worker_nodes)))
                nodes.add()
                killed += 1
            elif alive:
                os.kill(draw.choice(alive), signal.SIGKILL)
                killed += 1
        until(lambda: len(heard) >= 200, 300)
    assert executor.reruns > 0


def test_every_gpu_has_the_name_that_ray_gives_it_and_a_share_asks_for_it() -> None:
    names = {name: {NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(n) for n in SKUS[name].device_names} for name in SKUS if is_gpu(SKUS[name].arch)}
    assert names == {name: {called} for name, called in ACCELERATORS.items()}
    assert Share.of("h200-sxm", 4.0).resources == {"CPU": 4.0, "GPU": 1.0, "accelerator_type:H200": 0.001}
    assert Share.of("cpu", 2.0).resources == {"CPU": 2.0}


def test_bundles_of_different_skus_are_refused(compiled: Bundle, tmp_path: Path) -> None:
    other: Any = SimpleNamespace(plan=SimpleNamespace(sku="h100-sxm"))
    on = OnCluster("local", Scaling(1, 1), Mesh.parse(""), 1.0, tmp_path)
    with pytest.raises(ConfigError, match="bundles for cpu, h100-sxm: a replica has one SKU"):
        on.open([compiled, other])
