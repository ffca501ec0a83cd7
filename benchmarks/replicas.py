"""What do two replicas on two nodes give, against one, and is any request lost where ranks are killed?

Nodes of a Ray cluster on this machine, each on one core of its own, so that a replica has one thread on one core. The same requests, all together, over
one replica and over two, in turns; then over two whose ranks are killed at random times. Same seeds, same pictures: beside speed and losses stands
the largest difference of a pixel from those of one replica.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ray.cluster_utils import Cluster

from reelstep.benchmarks.concurrency import PROMPTS, run_all
from reelstep.benchmarks.harness import Row, parser, report, timing
from reelstep.compiler.bundle import Bundle
from reelstep.engine.build import build_bundle
from reelstep.engine.executors.bundles import Stored, WholeBundles
from reelstep.engine.executors.cluster import PATIENCE, OnRay, Share, connect, start_on_ray, untyped
from reelstep.engine.executors.on_mesh import world_of
from reelstep.engine.executors.restarting import Bounds, Restarting
from reelstep.engine.loop import Engine, warmed_up
from reelstep.engine.request import Finished
from reelstep.engine.resolve import Ask, resolve
from reelstep.engine.served import ServedModel
from reelstep.errors import ConfigError
from reelstep.parallel.mesh import Mesh

STORE_BYTES = 256 << 20
BOUNDS = Bounds(starts=1000, window_s=600.0, reruns=20)
"""Every kill is ours, and so no reason to give a replica up."""


@contextmanager
def nodes_on_own_cores(cores: Sequence[int]) -> Iterator[None]:
    """A joined cluster whose head runs nothing. What a process starts inherits the cores it may use."""
    all_of_them = os.sched_getaffinity(0)
    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES})
    connect(cluster.address)
    try:
        for core in cores:
            os.sched_setaffinity(0, {core})
            cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
        os.sched_setaffinity(0, all_of_them)
        yield
    finally:
        os.sched_setaffinity(0, all_of_them)
        untyped.shutdown()
        cluster.shutdown()


class Fleet:
    """Replicas of one bundle, and every one that there ever was."""

    def __init__(self, bundle: Bundle, cache: Path, replicas: int) -> None:
        self.made: list[OnRay] = []
        begin = partial(
            start_on_ray, world_of(Mesh.parse(""), "gloo"), WholeBundles((Stored.of(bundle, cache),), None, None), Share(1.0), PATIENCE
        )  # fmt: skip
        self.replicas = Restarting([lambda: self._note(begin)] * replicas, BOUNDS)
        model = ServedModel.of(bundle)
        self.engine = warmed_up(Engine({model.name: model}, self.replicas, max_running=256, release=self.replicas.close))

    def _note(self, begin: Callable[[], OnRay]) -> OnRay:
        replica = begin()
        self.made.append(replica)
        return replica

    def kill_one(self, draw: random.Random) -> bool:
        living = [replica for replica in list(self.made) if replica.failure is None]
        if living:
            os.kill(draw.choice(living).pids[0], signal.SIGKILL)
        return bool(living)


def ask_all(fleet: Fleet, requests: int, seed: int, name: str) -> tuple[float, list[Finished]]:
    asks = [Ask(PROMPTS[i % len(PROMPTS)], seed=seed + i, request_id=f"{name} {i}") for i in range(requests)]
    return run_all(fleet.engine, [resolve(ask, fleet.engine.models) for ask in asks], together=True)


def worst_pixel(one: Sequence[Finished], other: Sequence[Finished]) -> int:
    return max(int(np.abs(a.media.frames.astype(int) - b.media.frames).max()) for a, b in zip(one, other, strict=True))


def main(argv: Sequence[str]) -> None:
    options = parser("replicas", __doc__ or "")
    options.add_argument("--requests", type=int, default=32)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--loaded", type=int, default=200, metavar="N", help="requests of the run with kills (200)")
    options.add_argument("--kills", type=int, default=20)
    args = options.parse_args(argv)
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise ConfigError("two replicas on one core would share it; run this where two cores are free")
    cache = args.cache.absolute()
    bundle = build_bundle("reel-tiny", backend="openvino", precision=None, out=cache / "bench-replicas.reel", cache=cache)
    rows: list[Row] = []
    with nodes_on_own_cores(cores):
        seconds: dict[int, list[float]] = {1: [], 2: []}
        results: dict[int, list[Finished]] = {}
        for number in range(args.rounds):
            for replicas in (1, 2):
                fleet = Fleet(bundle, cache, replicas)
                ask_all(fleet, args.requests, args.seed + 1000, f"warm-up {number} {replicas}")  # every replica meets the sizes of batches
                spent, results[replicas] = ask_all(fleet, args.requests, args.seed, f"{number} {replicas}")
                fleet.engine.close(1.0)
                seconds[replicas].append(spent)
        base = timing(seconds[1]).median_s
        for replicas in (1, 2):
            took = timing(seconds[replicas])
            rows.append(
                {"replicas": replicas, "kills": 0, "requests": args.requests, "median_s": took.median_s, "p10_s": took.p10_s, "p90_s": took.p90_s,
                 "requests_per_s": args.requests / took.median_s, "ratio_to_one": base / took.median_s, "lost": 0, "calls_run_again": 0,
                 "largest_pixel_difference": worst_pixel(results[1], results[replicas])}
            )  # fmt: skip
        if args.kills:
            rows.append(under_fire(bundle, cache, args.loaded, args.kills, args.seed))
    report("replicas on nodes of one core", rows, args.seed, args.json)


def under_fire(bundle: Bundle, cache: Path, requests: int, kills: int, seed: int) -> Row:
    """All requests at once over two replicas, a rank of which is killed as soon as both have lived for a random time. A lost request would raise."""
    fleet, draw, done, killed = Fleet(bundle, cache, 2), random.Random(seed), threading.Event(), [0]

    def kill() -> None:
        while killed[0] < kills and not done.wait(draw.uniform(0.0, 2.0)):
            killed[0] += fleet.kill_one(draw)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    began = time.perf_counter()
    _, stormy = ask_all(fleet, requests, seed, "stormy")
    seconds = time.perf_counter() - began
    done.set()
    killer.join()
    reruns = fleet.replicas.reruns
    fleet.engine.close(1.0)
    calm = Fleet(bundle, cache, 2)
    _, wanted = ask_all(calm, requests, seed, "calm")
    calm.engine.close(1.0)
    return {
        "replicas": 2, "kills": killed[0], "requests": requests, "median_s": seconds, "requests_per_s": requests / seconds,
        "lost": requests - len(stormy), "calls_run_again": reruns, "largest_pixel_difference": worst_pixel(wanted, stormy),
    }  # fmt: skip
