"""Replicas on a Ray cluster: the ranks of each are actors in one placement group, joined by torch.distributed as they are on one machine.

The engine's process runs no rank. It sends a call's inputs to rank 0 of a replica and gets the outputs; a pulse tells it that rank 0 lives, and rank 0
watches the others. Whoever is lost ends its replica alone: `Restarting` places it anew, where there is room.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node, state  # the public API knows no draining, and only the sum of what nodes have
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from safetensors.torch import load as unpack
from safetensors.torch import save as pack
from torch import Tensor

from reelstep import errors
from reelstep.compiler.bundle import MANIFEST, SIGNATURE, Bundle
from reelstep.compiler.program import Precision
from reelstep.compiler.skus import SKUS, is_gpu
from reelstep.compiler.skus.cpu import SKU
from reelstep.engine.executors import LOOK_S, RETRY_S
from reelstep.engine.executors.bundles import Stored, WholeBundles
from reelstep.engine.executors.on_mesh import ranks_of, world_of
from reelstep.engine.executors.patience import Allowance
from reelstep.engine.executors.processes import Processes, Ranks, World, identity_of, open_store, serve_rank
from reelstep.engine.executors.replicas import Scaling
from reelstep.engine.executors.restarting import Bounds, Restarting
from reelstep.engine.request import Call
from reelstep.engine.runner import Outputs, Runner
from reelstep.engine.scheduler import Key
from reelstep.errors import BundleError, ConfigError, InternalError, ReelstepError, Unavailable, unknown
from reelstep.parallel.mesh import Mesh

log = logging.getLogger(__name__)
untyped: Any = ray
"""Where its annotations are wrong or absent."""

ACCELERATORS = {
    "a100-80g": "A100", "l40s": "L40S", "h100-sxm": "H100", "h200-sxm": "H200", "b200": "B200", "rtx-4090": "GeForce-RTX-4090",
    "rtx-5090": "GeForce-RTX-5090",
}  # fmt: skip
"""What Ray calls the devices of a SKU: it makes the name from the driver's."""
DRAINS_S = 1.0
"""How often it is looked which nodes shall go."""


@dataclass(frozen=True)
class Share:
    """What one rank takes of its node, and how a replica's ranks lie: STRICT_PACK on one node, or PACK, SPREAD, STRICT_SPREAD."""

    cpus: float
    gpus: int = 0
    accelerator: str | None = None  # as Ray calls it
    strategy: str = "STRICT_PACK"

    @classmethod
    def of(cls, sku: str, cpus: float) -> Share:
        """One device of a SKU, and this many CPUs. Raises ConfigError for a GPU that Ray has no name for here."""
        if not is_gpu(SKUS[sku].arch):
            return cls(cpus)
        if sku not in ACCELERATORS:
            raise ConfigError(f"SKU {sku!r} has no name among Ray's accelerators here; those that have: {', '.join(ACCELERATORS)}")
        return cls(cpus, 1, ACCELERATORS[sku])

    @property
    def resources(self) -> dict[str, float]:
        """Of one rank, as Ray counts them."""
        wanted = {"CPU": self.cpus, "GPU": float(self.gpus)}
        if self.accelerator is not None:
            wanted[f"accelerator_type:{self.accelerator}"] = 0.001  # what Ray itself asks for one; a node has 1 of it
        return {name: amount for name, amount in wanted.items() if amount}


@dataclass(frozen=True)
class Patience:
    """How long is waited beyond what a `World` says, in seconds."""

    place_s: float  # until the cluster has room for a replica
    pulse_s: float  # without a word from rank 0, then it counts as lost


PATIENCE = Patience(place_s=60.0, pulse_s=4.0)
BOUNDS = Bounds(starts=20, window_s=600.0, reruns=5)
"""More than on one machine, where what ends a replica is mostly itself: nodes come and go."""


def open_on_cluster(
    bundles: Sequence[Bundle], *, replicas: int, mesh: Mesh, share: Share, cache: Path, backend: str | None = None, precision: Precision | None = None,
    allowance: Allowance = BOUNDS.calls,
) -> Restarting:  # fmt: skip
    """Replicas on the cluster that this process has joined, each of all bundles on one rank, or of the only one on a mesh.

    A node that has nothing at a bundle's path is sent its files. Raises, before anything starts, as `ranks_of`; then what a replica's start raises.
    """
    ranks: Ranks
    stored: tuple[Stored, ...]
    if mesh.world > 1:
        on_mesh = ranks_of(bundles[0], mesh, cache, backend)
        ranks, stored = on_mesh, (on_mesh.bundle,)
    else:
        stored = tuple(Stored.of(bundle, cache) for bundle in bundles)
        ranks = WholeBundles(stored, backend, precision)
    world = world_of(mesh, "cpu:gloo,cuda:nccl" if share.gpus else "gloo")
    return Restarting([partial(start_on_ray, world, ranks, share, PATIENCE, Cargo(stored))] * replicas, replace(BOUNDS, calls=allowance))


@dataclass
class OnCluster:
    """Replicas on the cluster at `address` (see `connect`), which is joined when they are opened.

    cpus: of a rank; None for its part of this machine's cores on a local cluster, else 1. allowance: how long a call may take.
    """

    address: str
    scaling: Scaling
    mesh: Mesh
    cpus: float | None
    cache: Path
    backend: str | None = None
    precision: Precision | None = None
    allowance: Allowance = BOUNDS.calls
    share: Share = field(init=False)  # of a rank, once they are opened

    def open(self, bundles: Sequence[Bundle]) -> Restarting:
        """Raises ConfigError for bundles of different SKUs; then as `connect` and `open_on_cluster`."""
        skus = {bundle.plan.sku for bundle in bundles}
        if len(skus) > 1:
            raise ConfigError(f"bundles for {', '.join(sorted(skus))}: a replica has one SKU; serve each from a server of its own")
        ranks, local = self.scaling.most * self.mesh.world, self.address == "local"
        cpus = self.cpus if self.cpus is not None else max(1.0, SKU.units // ranks) if local else 1.0
        if local and ranks * cpus > SKU.units:
            log.warning("%d ranks of %g CPUs, and this machine has %d cores: they wait for each other", ranks, cpus, SKU.units)
        self.share = Share.of(skus.pop(), cpus)
        connect(self.address, math.ceil(ranks * cpus))
        return open_on_cluster(
            bundles, replicas=self.scaling.least, mesh=self.mesh, share=self.share, cache=self.cache, backend=self.backend, precision=self.precision,
            allowance=self.allowance,
        )  # fmt: skip

    def room(self) -> int:
        return room(self.share, self.mesh.world)


def room(share: Share, ranks: int) -> int:
    """For how many more replicas the cluster has resources now, as if the ranks of each lay on one node."""
    available: Any = available_resources_per_node
    draining = draining_nodes()
    nodes = [free for node, free in available().items() if node not in draining]
    return sum(min(int(free.get(name, 0.0) / (amount * ranks)) for name, amount in share.resources.items()) for free in nodes)


class Cargo:
    """Bundles for nodes that have none. Their files lie in the cluster's object store from the first time that one is sent."""

    def __init__(self, bundles: Sequence[Stored]) -> None:
        self.bundles = bundles
        self._lock = threading.Lock()
        self._files: dict[str, dict[str, Any]] = {}

    def files(self, stored: Stored) -> dict[str, Any]:
        """References by name. Raises BundleError, StorageError for what cannot be read any more."""
        with self._lock:
            if stored.digest not in self._files:
                bundle = stored.open()
                names = [MANIFEST, *bundle.manifest["files"], *([SIGNATURE] if (bundle.path / SIGNATURE).exists() else [])]
                self._files[stored.digest] = {name: ray.put((bundle.path / name).read_bytes()) for name in names}
            return self._files[stored.digest]


def connect(address: str, cpus: int | None = None) -> None:
    """Join a Ray cluster: "local" starts one on this machine, "auto" finds the one it is part of, else host:port of its head. Does nothing where joined.

    cpus: of a local one. Raises Unavailable where none answers.
    """
    if ray.is_initialized():
        return
    local = address == "local"
    logging.getLogger("ray").setLevel(logging.ERROR)  # it warns that it handles no SIGTERM, which is ours to handle
    try:
        # Ray writes to no terminal of ours; what its processes say lies in its own logs.
        ray.init(
            address=address, num_cpus=cpus if local else None, include_dashboard=False if local else None, log_to_driver=False, logging_level=logging.ERROR,
            configure_logging=False,
        )  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError) as error:
        there = f"no Ray cluster at {address!r}: {error}. Start one with `ray start --head`, or use local"
        raise Unavailable(f"Ray did not start on this machine: {error}. Try again" if local else there, retry_after_s=RETRY_S) from error


Told = tuple[str, Any]
"""("", value), or the name of an error and its text: an exception of ours carries more than Ray can send."""


def _telling(work: Callable[[], Any]) -> Told:
    try:
        return "", work()
    except Exception as error:
        log.exception("a rank failed")
        known = isinstance(error, ReelstepError)
        return type(error).__name__ if known else "InternalError", str(error) if known else f"{type(error).__name__}: {error}"


def _heard(told: Told) -> Any:
    name, value = told
    if not name:
        return value
    if name in ("Unavailable", "Overloaded"):
        raise Unavailable(value, retry_after_s=RETRY_S)
    kind = getattr(errors, name)
    raise kind(value) if kind in (ConfigError, BundleError, errors.CompileError, errors.NotFound, errors.StorageError) else InternalError(value)


class Rank:
    """The process of one rank on its node, as an actor."""

    def where(self) -> tuple[str, int]:
        """The node, and the process there."""
        return str(ray.get_runtime_context().get_node_id()), os.getpid()

    def lacks(self, bundles: Sequence[Stored]) -> list[Stored]:
        return [stored for stored in bundles if not stored.found]

    def receive(self, stored: Stored, files: Mapping[str, Any]) -> Told:
        return _telling(lambda: stored.receive({name: ray.get(data) for name, data in files.items()}))

    def identity(self, ranks: Ranks) -> Told:
        return _telling(lambda: identity_of(ranks))

    def serve(self, rank: int, world: World, ranks: Ranks, host: str, port: int) -> Told:
        """Be another rank, until the end."""
        return _telling(lambda: serve_rank(rank, world, ranks, host, port))


class FirstRank(Rank):
    """Rank 0. Its methods run on threads, so that it has a pulse while it works."""

    def open(self, world: World) -> tuple[str, int]:
        """Rank 0's store, where the others come to."""
        host: str = untyped.util.get_node_ip_address()
        self._store = open_store(host, world.start_s)
        return host, int(self._store.port)

    def start(self, world: World, ranks: Ranks) -> Told:
        """Be rank 0. Returns the rows that one batch may have."""

        def begin() -> dict[Key, int]:
            self._processes = Processes(world, ranks, self._store, {})
            return self._processes.max_rows

        return _telling(begin)

    def run(self, model: str, key: tuple[str, str], inputs: bytes) -> Told:
        """On rank 0: one call. Tensors come and go as safetensors."""

        def compute() -> bytes:
            outputs = self._processes.run(model, [Call(*key, unpack(inputs))])[0]
            return pack({name: value.contiguous() for name, value in outputs.items()})

        return _telling(compute)

    @ray.method(concurrency_group="pulse")
    def pulse(self) -> str | None:
        """Why the replica has ended, None while it lives."""
        processes = getattr(self, "_processes", None)
        return None if processes is None else processes.failure

    @ray.method(concurrency_group="pulse")
    def behind(self) -> dict[int, str]:
        return self._processes.behind()

    def close(self) -> None:
        self._processes.close()


def start_on_ray(world: World, ranks: Ranks, share: Share, patience: Patience, cargo: Cargo | None = None) -> OnRay:
    """A replica on the cluster that this process has joined: placed, started, tested and waiting. Raises as `OnRay`."""
    resources = [share.resources] * world.mesh.world
    group = placement_group(resources, strategy=share.strategy)
    if not group.wait(patience.place_s):
        free = {name: amount for name, amount in untyped.available_resources().items() if name in share.resources}
        remove_placement_group(group)
        raise Unavailable(
            f"no room for a replica of {world.mesh.world} ranks ({share.strategy}), each with {share.resources}, in {patience.place_s:g} s; free on all nodes "
            f"together: {free}. Add nodes, or take fewer ranks or replicas",
            retry_after_s=RETRY_S,
        )
    try:
        return OnRay(world, ranks, share, patience, group, cargo)
    except BaseException:
        remove_placement_group(group)  # and with it every actor there
        raise


class OnRay:
    """A replica whose ranks are actors of a placement group, as an executor.

    Raises Unavailable naming rank and node for one that does not come, dies, cannot load or fails the test of its links, and BundleError for one with
    other software or weights than this process has; then as `Processes`.
    """

    inline, capacity = False, 1

    def __init__(self, world: World, ranks: Ranks, share: Share, patience: Patience, group: PlacementGroup, cargo: Cargo | None = None) -> None:
        self.world, self.patience = world, patience
        self.failure: str | None = None
        self.leaving: str | None = None
        self._group, self._closed, self._calls = group, threading.Event(), 0
        self.actors = [_actor(group, rank, share) for rank in range(world.mesh.world)]
        self.nodes: list[str] = []
        self.pids: list[int] = []
        self._serving: dict[Any, int] = {}
        self._meet(ranks, cargo)
        host, port = self._wait(self.actors[0].open.remote(world), world.start_s, "start")
        self._serving = {self.actors[rank].serve.remote(rank, world, ranks, host, port): rank for rank in range(1, world.mesh.world)}
        try:
            self._rows: dict[Key, int] = _heard(self._wait(self.actors[0].start.remote(world, ranks), world.start_s + world.load_s, "start"))
        except Unavailable as error:
            raise Unavailable(self._ended() or str(error), retry_after_s=RETRY_S) from error
        executables = {key: partial(self._evaluate, *key) for key in self._rows}
        self._runners = {
            model: Runner({key[1:]: run for key, run in executables.items() if key[0] == model}, {k[1:]: n for k, n in self._rows.items() if k[0] == model})
            for model in {key[0] for key in self._rows}
        }
        self._monitor = threading.Thread(target=self._watch, name="reelstep-pulse", daemon=True)
        self._monitor.start()

    @property
    def max_rows(self) -> dict[Key, int]:
        return self._rows

    def run(self, model: str, calls: Sequence[Call]) -> list[Outputs]:
        """Raises Unavailable naming who is lost, now and for every call after; what the programs raise otherwise."""
        if model not in self._runners:
            raise unknown("model", model, self._runners)
        return self._runners[model].run(calls)

    def give_up(self, why: str) -> str:
        try:
            who: dict[int, str] = ray.get(self.actors[0].behind.remote(), timeout=self.patience.pulse_s / 4)
        except RayError:
            who = {0: "does not say which rank it waits for"}
        return self._fail(f"{why}: {', '.join(f'rank {rank} of {self.world.mesh.world} on node {self.nodes[rank]} {does}' for rank, does in who.items())}")

    def close(self) -> None:
        """Stop the ranks and give their room back. Idempotent."""
        if self._closed.is_set():
            return
        self._closed.set()
        if self.failure is None:
            with contextlib.suppress(RayError):  # they end either way
                ray.get(self.actors[0].close.remote(), timeout=self.patience.pulse_s)
        self._monitor.join()
        for actor in self.actors:
            ray.kill(actor)
        remove_placement_group(self._group)

    def _meet(self, ranks: Ranks, cargo: Cargo | None) -> None:
        """Every rank comes, gets what it lacks, and has the software and weights of this process."""
        own = identity_of(ranks)
        for rank, actor in enumerate(self.actors):
            where = f"rank {rank} of {self.world.mesh.world}"
            try:
                node, pid = ray.get(actor.where.remote(), timeout=self.world.start_s)
                self.nodes.append(node)
                self.pids.append(pid)
                if cargo is not None:
                    for stored in ray.get(actor.lacks.remote(cargo.bundles), timeout=self.world.start_s):
                        log.info("sending %s to node %s", stored.path.name, node)
                        _heard(ray.get(actor.receive.remote(stored, cargo.files(stored)), timeout=self.world.start_s))
                identity = _heard(ray.get(actor.identity.remote(ranks), timeout=self.world.start_s))
            except GetTimeoutError as error:
                raise Unavailable(f"no word from {where} in {self.world.start_s:g} s; does its node answer?", retry_after_s=RETRY_S) from error
            except RayError as error:
                raise Unavailable(f"{where} ended before it had come: {_first_line(error)}", retry_after_s=RETRY_S) from error
            names = [name for name in {**own, **identity} if identity.get(name) != own.get(name)]
            if names:
                different = "; ".join(f"{name} {identity.get(name, 'none')} where this process has {own.get(name, 'none')}" for name in names)
                raise BundleError(f"{where} on node {node} has {different}; give all nodes the same")

    def _evaluate(self, model: str, program: str, profile: str, inputs: Mapping[str, Tensor]) -> Outputs:
        if (failure := self.failure) is not None or self._closed.is_set():
            raise Unavailable(failure or "the replica has been stopped; start it again", retry_after_s=RETRY_S)
        self._calls += 1
        where = f"{program} {profile}, call {self._calls}"
        try:
            told = self._wait(self.actors[0].run.remote(model, (program, profile), pack({name: x.contiguous() for name, x in inputs.items()})), math.inf, where)
            return unpack(_heard(told))
        except Unavailable as error:
            failure = self._fail(self._ended() or str(error))
            raise Unavailable(f"{failure} (during {where})", retry_after_s=RETRY_S) from error

    def _wait(self, answer: Any, timeout_s: float, what: str) -> Any:
        """What rank 0 answers. Raises Unavailable where it, or any other rank, ends or loses its pulse before, or the replica is given up."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            done, _ = ray.wait([answer], timeout=LOOK_S)
            if done:
                try:
                    return ray.get(answer)
                except RayError as error:
                    raise Unavailable(self._lost(0, error), retry_after_s=RETRY_S) from error
            if self.failure is not None:
                raise Unavailable(self.failure, retry_after_s=RETRY_S)
            if what == "start" and (ended := self._ended()):
                raise Unavailable(ended, retry_after_s=RETRY_S)
        raise Unavailable(f"rank 0 of {self.world.mesh.world} on node {self.nodes[0]} gave no answer to {what} in {timeout_s:g} s", retry_after_s=RETRY_S)

    def _watch(self) -> None:
        """Notices a rank that is gone or silent, at work or idle, and a node that shall go."""
        beat, since, looked = self.actors[0].pulse.remote(), time.monotonic(), 0.0
        while not self._closed.wait(LOOK_S) and self.failure is None:
            try:
                problem = self._ended()
                if ray.wait([beat], timeout=0)[0]:
                    problem = problem or ray.get(beat)
                    beat, since = self.actors[0].pulse.remote(), time.monotonic()
                elif time.monotonic() - since > self.patience.pulse_s:
                    problem = problem or f"rank 0 of {self.world.mesh.world} on node {self.nodes[0]} has not been heard of for {self.patience.pulse_s:g} s"
            except RayError as error:
                problem = self._lost(0, error)
            except Exception as error:  # of whatever kind: a replica that nobody watches must not be used
                log.exception("rank 0 on node %s has no pulse", self.nodes[0])
                problem = self._lost(0, error)
            if time.monotonic() - looked > DRAINS_S and self.leaving is None:
                looked = time.monotonic()
                self.leaving = self._drained()
            if problem and not self._closed.is_set():
                self._fail(problem)

    def _drained(self) -> str | None:
        try:
            draining = draining_nodes()
        except Exception:  # the cluster's head may be away for a while, and replicas work on
            log.exception("it is unknown which nodes shall go")
            return None
        return next((f"node {node} is drained" for node in self.nodes if node in draining), None)

    def _fail(self, why: str) -> str:
        """The replica has ended. Returns the first reason that was given."""
        if self.failure is None:
            self.failure = why
            log.error("%s", why)
        return self.failure

    def _ended(self) -> str | None:
        """Which rank other than 0 is over, and why."""
        done, _ = ray.wait(list(self._serving), num_returns=len(self._serving), timeout=0) if self._serving else ([], [])
        said = []
        for answer in done:
            rank = self._serving[answer]
            try:
                name, text = ray.get(answer)
            except RayError as error:
                return self._lost(rank, error)  # before those that only lost it
            said.append(f"rank {rank} of {self.world.mesh.world} on node {self.nodes[rank]} ended: {name or 'told to stop'}{': ' if text else ''}{text or ''}")
        return said[0] if said else None

    def _lost(self, rank: int, error: Exception) -> str:
        return f"rank {rank} of {self.world.mesh.world} on node {self.nodes[rank]} is lost: {_first_line(error)}"


def _actor(group: PlacementGroup, rank: int, share: Share) -> Any:
    """A rank's process in its own part of the group. It is never restarted alone."""
    options: dict[str, Any] = {"num_cpus": share.cpus, "num_gpus": share.gpus, "max_restarts": 0}
    options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, rank)
    if share.accelerator is not None:
        options["accelerator_type"] = share.accelerator
    if rank > 0:
        return untyped.remote(**options)(Rank).remote()
    return untyped.remote(**options, concurrency_groups={"pulse": 1})(FirstRank).remote()


def _first_line(error: Exception) -> str:
    text = str(error)
    cause = next((line for line in text.splitlines() if "dead because" in line or "node" in line.lower()), text.splitlines()[0] if text else "")
    return f"{type(error).__name__}: {cause.strip().partition(' Worker exit detail')[0]}"


def draining_nodes() -> set[str]:
    """Ids of the nodes that shall go, as `ray drain-node` or a cloud's notice says."""
    return set(state.get_draining_nodes())
