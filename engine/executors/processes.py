"""The ranks of one replica as processes: rank 0 is the engine's own, the others run the programs that it names.

Inputs go out from rank 0 and outputs are whole on every rank, so sampler state lives on rank 0 alone. Commands, reports and heartbeats go through the
store that rank 0 keeps; tensors through collectives. Rows of a call are spread over the mesh's `cfg` axis, so that the branches of guidance run at once,
and over all ranks where each has the whole program: then the tiles of a long decode do too.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache, partial
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore

from reelstep import __version__
from reelstep.compiler.backends import BACKENDS, Executable
from reelstep.compiler.capture import capture
from reelstep.compiler.lora import Layout, adapted_too
from reelstep.compiler.part import Part
from reelstep.compiler.passes import apply_passes
from reelstep.compiler.passes.split_at_collectives import Wanted, build_rank
from reelstep.compiler.program import Precision, Profile, Program
from reelstep.compiler.signature import Signature
from reelstep.compiler.storage import sha256_file
from reelstep.engine.executors import LOOK_S, RETRY_S
from reelstep.engine.request import Call
from reelstep.engine.runner import Outputs, Runner
from reelstep.engine.scheduler import Key
from reelstep.errors import BundleError, ConfigError, ReelstepError, Unavailable, unknown
from reelstep.parallel.collectives import Communicator
from reelstep.parallel.mesh import Axis, Mesh, bounds, spread
from reelstep.parallel.rules import RULES
from reelstep.parallel.shard import layer_at, shard

log = logging.getLogger(__name__)

ROWS: tuple[Axis, ...] = ("cfg", "cp", "tp")
"""Axes that rows are spread over, in turn: the first alone where ranks share a program."""
KILL_S = 2.0
"""For which it is waited that a killed rank ends, and then a call that only it held up."""


@dataclass(frozen=True)
class World:
    """Who takes part, and how long anybody waits."""

    mesh: Mesh
    transport: str  # of torch.distributed: "gloo", "nccl"
    start_s: float  # until every rank has come
    load_s: float  # then until it has loaded, and built what is not in its cache
    collective_s: float  # of one collective
    silence_s: float  # without a heartbeat, then a rank counts as lost


class Ranks(Protocol):
    """What every rank does by itself. Handed to processes, so it pickles: plain values, and things by name."""

    def identity(self) -> Mapping[str, str]:
        """What must be equal on all ranks: hashes of bundles and weights, versions."""
        ...

    def load(self, comm: Communicator) -> Mapping[str, Runner]:
        """This rank's programs by model. Its executables give whole outputs on every rank."""
        ...


@dataclass(frozen=True)
class ShardedModel:
    """Ranks that each read their own slices of one weights file, export their own graph and build its pieces between collectives.

    Its engines are kept where the file lies. lora: of a program beside `denoise`, if there shall be one.
    """

    name: str
    file: Path
    parts: tuple[Part, ...]
    backend: str
    lora: Layout | None = None
    precision: Precision = "float32"

    def identity(self) -> Mapping[str, str]:
        return {"model": self.name, "weights": sha256_file(self.file), "backend": self.backend, "precision": self.precision}

    def load(self, comm: Communicator) -> Mapping[str, Runner]:
        if BACKENDS[self.backend].own_threads:
            torch.set_num_threads(1)  # all that torch does here is to copy what travels
        key = cache(lambda: f"{sha256_file(self.file)} rank {comm.rank} of {comm.mesh}")  # not asked for where no engine is kept
        wanted = Wanted(self.precision, self.file.parent, key)
        executables: dict[tuple[str, str], Executable] = {}
        limits: dict[tuple[str, str], int] = {}
        for part in self.parts:
            module = shard(part.empty(), RULES[part.rules], comm, self.file, part.prefix)
            for program in adapted_too(part.programs_of(module), partial(layer_at, module), self.lora):
                for profile in program.profiles:
                    own = profile.on_rank(comm.mesh)
                    executables[program.name, own.name] = self._build(program, own, comm, wanted)
                    limits[program.name, own.name] = own.max_batch
        return {self.name: Runner(executables, limits)}

    def _build(self, program: Program, profile: Profile, comm: Communicator, wanted: Wanted) -> Executable:
        signature = Signature.of(program, profile)
        exported, _ = apply_passes(capture(program, profile))
        return build_rank(exported, signature, BACKENDS[self.backend], comm, replace(wanted, precision="float32") if program.keep_f32 else wanted)


def open_store(host: str, timeout_s: float) -> TCPStore:
    """A store that listens at this address and a free port, where one that opens its own socket listens at every address of the machine."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        port, timeout = listening.getsockname()[1], timedelta(seconds=timeout_s)
        return TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listening.detach())


def start(world: World, ranks: Ranks) -> Processes:
    """A replica on this machine: this process becomes rank 0, the others are started, tested and waiting. Raises as `Processes`."""
    _check_alone()
    store = open_store("127.0.0.1", world.start_s)
    # From a server that has imported all of this once: a fork of it starts at once, and shares no thread or device with the engine.
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    children = {
        rank: context.Process(target=serve_rank, args=(rank, world, ranks, "127.0.0.1", store.port), name=f"reelstep-rank-{rank}", daemon=True)
        for rank in range(1, world.mesh.world)
    }
    for child in children.values():
        child.start()
    return Processes(world, ranks, store, children)


class Processes:
    """Rank 0 of a replica, as an executor. Every rank runs a call at once; a failure of any ends the replica.

    store: of this process, as master; the other ranks call `serve_rank` with its address (`start` does, or a launcher on each machine). children:
    the ranks that are processes of ours. Raises ConfigError in a process that is a rank already; naming the rank, Unavailable for one that does not
    come, cannot load or fails the test of its links, and BundleError for one with other software or weights.
    """

    inline, capacity = False, 1
    leaving: str | None = None

    def __init__(self, world: World, ranks: Ranks, store: TCPStore, children: Mapping[int, BaseProcess]) -> None:
        _check_alone()
        self.world, self.children = world, children
        self.failure: str | None = None
        self._store, self._calls, self._lock = store, 0, threading.Lock()
        self._closed = threading.Event()
        self._comm: Communicator | None = None
        self._beats: dict[int, tuple[str, float]] = {}
        self._given_up: str | None = None
        try:
            self._refuse_strangers(identity_of(ranks), self._collect("hello", world.start_s))
            _tell(store, "go", {})
            self._comm = _join(0, world, store)
            self._local = ranks.load(self._comm)
            self._collect("loaded", world.load_s)
            _tell(store, "test", {})
            self._test_links(self._comm)
        except BaseException:
            self._end(clean=False)
            raise
        self._runners = {model: self._spread(model, local) for model, local in self._local.items()}
        self._monitor = threading.Thread(target=self._watch, name="reelstep-ranks", daemon=True)
        self._monitor.start()

    @property
    def max_rows(self) -> dict[Key, int]:
        return {(model, *key): rows for model, runner in self._runners.items() for key, rows in runner.max_batch.items()}

    def run(self, model: str, calls: Sequence[Call]) -> list[Outputs]:
        """Raises Unavailable naming the rank that is lost, now and for every call after; ConfigError for inputs that do not fit, which harm nothing."""
        if model not in self._runners:
            raise unknown("model", model, self._runners)
        return self._runners[model].run(calls)

    def behind(self) -> dict[int, str]:
        """What those ranks do that keep the others waiting: who came through the fewest links, and among them who is in none."""
        assert self._comm is not None
        places = {0: (self._comm.passed, self._comm.inside)} | {rank: _place(beat) for rank, (beat, _) in self._beats.items()}
        last = min((passed, bool(inside)) for passed, inside in places.values())
        return {
            rank: f"waits in {inside}" if inside else "computes and does not come to an end"
            for rank, (passed, inside) in places.items() if (passed, bool(inside)) == last
        }  # fmt: skip

    def give_up(self, why: str) -> str:
        who = [f"rank {rank} of {self.world.mesh.world} {does}" for rank, does in self.behind().items()]
        self.failure = self._given_up = f"{why}: {', '.join(who)}; start the replica again"
        return self.failure

    def close(self) -> None:
        """Stop the ranks and wait for them; one that failed ends theirs by force. Idempotent."""
        if not self._closed.is_set():
            self._end(clean=self.failure is None)
            self._monitor.join()

    def _spread(self, model: str, local: Runner) -> Runner:
        rows = {key: limit * self._shares(local, key) for key, limit in local.max_batch.items()}
        return Runner({key: partial(self._evaluate, model, key) for key in local.executables}, rows)

    def _shares(self, runner: Runner, key: tuple[str, str]) -> int:
        return math.prod(self.world.mesh.size(axis) for axis in _axes(runner, key))

    def _evaluate(self, model: str, key: tuple[str, str], inputs: Mapping[str, Tensor]) -> Outputs:
        runner = self._local[model]
        signature = getattr(runner.executables[key], "signature", None)
        if signature is not None:  # what does not fit is refused before any rank hears of it
            replace(signature, max_batch=signature.max_batch * self._shares(runner, key)).ordered(inputs)
        with self._lock:
            if self.failure is not None or self._closed.is_set():
                raise Unavailable(self.failure or "the ranks have been stopped; start them again", retry_after_s=RETRY_S)
            assert self._comm is not None
            self._calls += 1
            described = [(name, str(x.dtype).removeprefix("torch."), list(x.shape)) for name, x in inputs.items()]
            command = {"model": model, "program": key, "inputs": described, "where": f"{key[0]} {key[1]}, call {self._calls}"}
            try:
                _tell(self._store, f"call/{self._calls}", command)
                outputs = _evaluate(self._comm, runner, command, inputs)
                self._store.delete_key(f"call/{self._calls - 1}")  # every rank has read it, or this call had not ended
            except Exception as error:  # of any kind: the other ranks are at this call, and must not meet the next one
                self.failure = self._given_up or f"{self._cause() or error} (during {command['where']}); start the replica again"
                raise Unavailable(self.failure, retry_after_s=RETRY_S) from error
            return outputs

    def _collect(self, phase: str, timeout_s: float) -> dict[int, Any]:
        """What every other rank says of a phase. Raises Unavailable naming one that failed, ended or says nothing."""
        said: dict[int, Any] = {}
        end, count = time.monotonic() + timeout_s, self.world.mesh.world
        while missing := [rank for rank in range(1, count) if rank not in said]:
            for rank in missing:
                if self._store.check([f"{phase}/{rank}"]):
                    said[rank] = json.loads(self._store.get(f"{phase}/{rank}"))
                    if "error" in said[rank]:
                        raise Unavailable(f"rank {rank} of {count} failed at {phase!r}: {said[rank]['error']}", retry_after_s=RETRY_S)
            missing = [rank for rank in missing if rank not in said]
            if missing and (ended := self._ended(missing)):
                raise Unavailable(f"{ended}, before {phase!r}", retry_after_s=RETRY_S)
            if missing and time.monotonic() > end:
                there = ", ".join(map(str, [0, *said]))
                raise Unavailable(
                    f"no word of {phase!r} from rank {', '.join(map(str, missing))} of {count} in {timeout_s:g} s (ranks {there} are there); is it started, "
                    "and can it reach rank 0?",
                    retry_after_s=RETRY_S,
                )
            time.sleep(0.01)
        return said

    def _refuse_strangers(self, own: Mapping[str, str], others: Mapping[int, Mapping[str, str]]) -> None:
        for rank, identity in others.items():
            names = [name for name in {**own, **identity} if identity.get(name) != own.get(name)]
            different = [f"{name} {identity.get(name, 'none')} where rank 0 has {own.get(name, 'none')}" for name in names]
            if different:
                raise BundleError(f"rank {rank} has {'; '.join(different)}; give all ranks the same")

    def _test_links(self, comm: Communicator) -> None:
        problem = None
        try:
            comm.self_test()
        except ReelstepError as error:
            problem = error
        self._collect("tested", self.world.collective_s + self.world.silence_s)
        if problem is not None:
            raise Unavailable(f"rank 0 of {self.world.mesh.world} failed at 'tested': {problem}", retry_after_s=RETRY_S) from problem

    def _ended(self, ranks: Sequence[int]) -> str | None:
        for rank in ranks:
            code = self.children[rank].exitcode if rank in self.children else None
            if code is not None and code < 0:
                return f"rank {rank} of {self.world.mesh.world} was killed by {signal.Signals(-code).name}"
            if code is not None:
                return f"rank {rank} of {self.world.mesh.world} ended with exit code {code}"
        return None

    def _cause(self) -> str | None:
        """Which rank ended a call: one that was killed, before those that only lost it."""
        end = time.monotonic() + 2 * LOOK_S
        while time.monotonic() < end:
            killed = [rank for rank, child in self.children.items() if child.exitcode is not None and child.exitcode < 0]
            if killed:
                return self._ended(killed)
            time.sleep(0.01)
        for rank in range(1, self.world.mesh.world):
            if self._store.check([f"failed/{rank}"]):
                report = json.loads(self._store.get(f"failed/{rank}"))
                if not report["lost"]:
                    return f"rank {rank} of {self.world.mesh.world} failed: {report['error']}"
        return None

    def _watch(self) -> None:
        """Notices a rank that is gone while nothing runs."""
        store = _client("127.0.0.1" if self._store.host in ("", "localhost") else self._store.host, self._store.port, self.world.start_s)
        while not self._closed.wait(LOOK_S):
            problem = self._ended(list(self.children))
            for rank in range(1, self.world.mesh.world):
                beat = store.get(f"beat/{rank}").decode() if store.check([f"beat/{rank}"]) else ""
                if rank not in self._beats or self._beats[rank][0] != beat:
                    self._beats[rank] = (beat, time.monotonic())
                elif time.monotonic() - self._beats[rank][1] > self.world.silence_s:
                    problem = problem or f"rank {rank} of {self.world.mesh.world} has not been heard of for {self.world.silence_s:g} s"
            if problem and self.failure is None and not self._closed.is_set():
                self.failure = f"{problem}; start the replica again"
                log.error("%s", self.failure)

    def _end(self, clean: bool) -> None:
        self._closed.set()
        if clean:
            with self._lock:
                _tell(self._store, f"call/{self._calls + 1}", {"stop": True})
        else:
            _tell(self._store, "go", {"refused": True})
        for rank, child in self.children.items():
            child.join(self.world.collective_s if clean else 0)
            if child.exitcode is None:
                child.kill()
                child.join(KILL_S)
            if child.exitcode is None:
                log.error("rank %d of %d does not end, although it was killed: a driver holds process %s", rank, self.world.mesh.world, child.pid)
        # A call that was given up ends by itself where a link to a rank that was killed held it, and perhaps never where this process's program does.
        if self._lock.acquire(timeout=KILL_S):
            self._lock.release()
        if self._comm is not None:
            self._comm.close()
            dist.destroy_process_group()


def serve_rank(rank: int, world: World, ranks: Ranks, host: str, port: int) -> None:
    """The life of a rank other than 0: come, load, test the links, run what rank 0 names until it says stop or is gone.

    What goes wrong is reported to rank 0 and raised.
    """
    store = _client(host, port, world.start_s)
    comm: Communicator | None = None
    place = lambda: "0 " if comm is None else f"{comm.passed} {comm.inside}"  # noqa: E731  # it reads what is made below
    threading.Thread(target=_beat, args=(rank, world, host, port, place), name="reelstep-beat", daemon=True).start()
    with _reporting(store, "hello", rank):
        identity = identity_of(ranks)
    _tell(store, f"hello/{rank}", identity)
    if _hear(store, "go", world.start_s):
        return
    with _reporting(store, "loaded", rank):
        comm = _join(rank, world, store)
        models = ranks.load(comm)
    _tell(store, f"loaded/{rank}", {})
    _hear(store, "test", world.load_s)
    with _reporting(store, "tested", rank):
        comm.self_test()
    _tell(store, f"tested/{rank}", {})
    call = 1
    while not (command := _next(store, call, world)).get("stop"):
        with _reporting(store, "failed", rank):
            _evaluate(comm, models[command["model"]], command, None)
        call += 1
    comm.close()
    dist.destroy_process_group()


def _evaluate(comm: Communicator, runner: Runner, command: Mapping[str, Any], inputs: Mapping[str, Tensor] | None) -> Outputs:
    """One call on this rank: inputs from rank 0, this rank's rows through the program, all rows back."""
    comm.where = command["where"]
    tensors = {
        name: comm.broadcast(torch.empty(sizes, dtype=getattr(torch, dtype)) if inputs is None else inputs[name].contiguous())
        for name, dtype, sizes in command["inputs"]
    }
    key = (command["program"][0], command["program"][1])
    run, rows = runner.executables[key], len(next(iter(tensors.values())))
    if rows == 1:  # on every rank, so that nothing needs to come back
        return run(tensors)
    begin, end = 0, rows
    cuts: list[tuple[Axis, tuple[int, ...]]] = []
    for axis in _axes(runner, key):
        cuts.append((axis, spread(end - begin, comm.size(axis))))
        first, last = bounds(cuts[-1][1])[comm.at[axis]]
        begin, end = begin + first, begin + last
    # A rank without a row runs the first one and gives nothing of it: it learns the outputs' shapes, and no rank waits for another.
    outputs = run({name: x[begin:end] if end > begin else x[:1] for name, x in tensors.items()})
    found = {name: outputs[name][: end - begin] for name in sorted(outputs)}
    for axis, sizes in reversed(cuts):
        if any(sizes):
            found = {name: comm.all_gather(x, axis, 0, sizes) for name, x in found.items()}
    return found


def _axes(runner: Runner, key: tuple[str, str]) -> tuple[Axis, ...]:
    return ROWS if key in runner.whole else ROWS[:1]


def _check_alone() -> None:
    if dist.is_initialized():
        raise ConfigError("this process is already a rank; close that replica first, or start this one in another process")


def identity_of(ranks: Ranks) -> dict[str, str]:
    """What must be equal wherever a rank of these runs."""
    return {"reelstep": __version__, "torch": str(torch.__version__), **ranks.identity()}


def _join(rank: int, world: World, store: TCPStore) -> Communicator:
    dist.init_process_group(
        world.transport, rank=rank, world_size=world.mesh.world, store=PrefixStore("ranks", store), timeout=timedelta(seconds=world.collective_s)
    )
    return Communicator(world.mesh, world.collective_s)


def _client(host: str, port: int, timeout_s: float) -> TCPStore:
    """A connection of its own: one that waits would hold up every other thread's."""
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def _tell(store: TCPStore, key: str, value: Mapping[str, Any]) -> None:
    store.set(key, json.dumps(value))


def _hear(store: TCPStore, key: str, timeout_s: float) -> Any:
    store.wait([key], timedelta(seconds=timeout_s))
    return json.loads(store.get(key))


def _next(store: TCPStore, call: int, world: World) -> Any:
    """The next command, however long it takes. A store that is gone, and rank 0 with it, raises."""
    while True:
        try:
            return _hear(store, f"call/{call}", world.silence_s)
        except dist.DistStoreError:
            store.check([f"call/{call}"])


def _beat(rank: int, world: World, host: str, port: int, place: Callable[[], str]) -> None:
    store, count = _client(host, port, world.start_s), 0
    try:
        while True:
            store.set(f"beat/{rank}", f"{count} {place()}")
            count += 1
            time.sleep(world.silence_s / 8)
    except RuntimeError:
        return  # rank 0 is gone, and the main thread finds that too


def _place(beat: str) -> tuple[int, str]:
    """How many links a rank came through, and in which one it waits, as its heartbeat says."""
    _, passed, inside = (beat or "0 0 ").split(" ", 2)
    return int(passed), inside


@contextmanager
def _reporting(store: TCPStore, phase: str, rank: int) -> Iterator[None]:
    """What goes wrong inside is told to rank 0. lost: it was a link, so that another rank may be the cause."""
    try:
        yield
    except Exception as error:
        _tell(store, f"{phase}/{rank}", {"error": f"{type(error).__name__}: {error}", "lost": isinstance(error, Unavailable)})
        raise
