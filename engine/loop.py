"""The engine's loop: schedule, run, postprocess. One thread owns it; everything else talks to it through a queue.

Batches for replicas elsewhere are handed to workers, as many at once as there are free replicas, and their outputs come back through the same queue.
"""

from __future__ import annotations

import json
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reelstep import __version__
from reelstep.compiler.bundle import Bundle
from reelstep.compiler.load import Progress as LoadProgress
from reelstep.compiler.load import load, silent
from reelstep.compiler.lora import SUFFIX
from reelstep.compiler.program import Precision
from reelstep.engine.ahead import Ahead
from reelstep.engine.checkpoints import Checkpoints
from reelstep.engine.executors import LOOK_S, RETRY_S, Executor
from reelstep.engine.executors.bundles import runner_of
from reelstep.engine.executors.inline import Inline
from reelstep.engine.executors.patience import Allowance
from reelstep.engine.executors.replicas import Elsewhere, Load, Scaler
from reelstep.engine.lora import Adapter
from reelstep.engine.pipelines import PIPELINES
from reelstep.engine.pipelines.latent import Job, Pipeline, profile_of, tiles_of
from reelstep.engine.pipelines.state import PipelineState
from reelstep.engine.request import Call, Event, Failed, Finished, Media, Preview, Progress, Queued, Request, Usage, validate
from reelstep.engine.runner import Outputs
from reelstep.engine.scheduler import Key, Round, Scheduler, Ticket, first_in_time, rounds_of, rows_of, usual
from reelstep.engine.served import ServedModel, read_loras
from reelstep.errors import Cancelled, ConfigError, DeadlineExceeded, InternalError, Overloaded, ReelstepError, Unavailable, UnsupportedRequest, unknown
from reelstep.parallel.mesh import Mesh

if TYPE_CHECKING:
    from reelstep.compiler.signing import PublicKey

log = logging.getLogger(__name__)

MAX_WORKERS = 1024  # a thread waits for each replica; they are made as batches need them

Listener = Callable[[Event], None]


@dataclass
class Running:
    """One request inside the loop. served: the model as it was when the request came. answers: outputs of the calls it waits for, by slot.

    usual: calls that it is expected to ask for most of the time. quality: that `auto` came to.
    """

    request: Request
    served: ServedModel
    listener: Listener
    arrival: float
    adapters: tuple[str, ...] = ()  # fingerprints
    state: PipelineState = field(default_factory=PipelineState)
    pipeline: Pipeline | None = None
    calls: tuple[Call, ...] = ()
    answers: dict[int, Outputs] = field(default_factory=dict)
    started: float | None = None
    compute_s: dict[str, float] = field(default_factory=dict)
    reported: tuple[str, int] = ("", -1)
    previewed: int = 0
    kept: int = 0  # the step of its last checkpoint
    usual: Round = ()
    quality: str = ""


@dataclass(frozen=True)
class BatchRecord:
    """What one batch ran. For benchmarks and metrics."""

    key: tuple[str, str, str]
    calls: int
    rows: int
    seconds: float


class Engine:
    """Runs requests on an executor. Thread-safe: `submit`, `cancel`, `close`.

    At most `max_running` requests hold memory; `max_queued` more may wait for a place, then Overloaded. `on_batch` hears of every batch.
    checkpoints: where states of running requests are kept, and looked for when one starts; those of an engine that closes stay there.
    rows_at_once: of a call that a replica runs at the same time, on parts of its mesh. `release`, which may be called twice, frees what the executor
    holds: it waits for what runs there, and ends what waits for a place. opens: called with a program and rows beside a request's first calls, for those to
    come, and before each batch. `load` is that of the last moment.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        executor: Executor,
        *,
        max_running: int = 32,
        max_queued: int = 256,
        on_batch: Callable[[BatchRecord], None] | None = None,
        release: Callable[[], None] | None = None,
        checkpoints: Checkpoints | None = None,
        rows_at_once: int = 1,
        opens: Callable[[Key, int], None] | None = None,
    ) -> None:
        self.models = models
        self._opens = opens
        self._checkpoints = checkpoints
        self.max_running, self.max_queued = max_running, max_queued
        self._executor = executor
        self._on_batch = on_batch
        self.release = release
        self.load = Load(0, 0)
        self._scheduler = Scheduler(executor.max_rows, rows_at_once)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._running: dict[str, Running] = {}
        self._queued: dict[str, Running] = {}
        self._in_flight = 0  # batches that run
        self._workers = ThreadPoolExecutor(MAX_WORKERS, "reelstep-batch")
        self._lock = threading.Lock()
        self._admitted: set[str] = set()
        self._request_s = 1.0  # running mean of a request's own time, for estimates
        self._closing = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="reelstep-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, listener: Listener) -> None:
        """Start a request; returns at once. The listener hears events on the engine's thread, the last one Finished or Failed.

        Raises NotFound, InvalidRequest, UnsupportedRequest, DeadlineExceeded, Overloaded or Unavailable; the listener then hears nothing.
        """
        served = self._check(request)
        with self._lock:
            if self._closing:
                raise Unavailable("the server is shutting down; try another one", retry_after_s=1.0)
            if request.id in self._admitted:
                raise ConfigError(f"request id {request.id!r} is in use; give every request its own")
            if len(self._admitted) >= self.max_running + self.max_queued:
                wait = self._seconds_for(max(1, self.max_queued // 4))
                raise Overloaded(f"{len(self._admitted)} requests are running or queued, the limit; try again in {wait:.0f} s", retry_after_s=wait)
            self._admitted.add(request.id)
            self._commands.put(lambda: self._enqueue(Running(request, served, listener, time.monotonic())))  # here: `close` ends whom it finds admitted

    def cancel(self, request_id: str) -> None:
        """Stop a request before its next call. Its listener hears Failed(Cancelled). An unknown id is no error: it may just have ended."""
        self._commands.put(lambda: self._fail_by_id(request_id, Cancelled(f"request {request_id} was cancelled")))

    def load_lora(self, model: str, name: str, file: Path, config: str, most: int, replacing: bool) -> Adapter:
        """Let requests that arrive from now on name this adapter; those that are here keep what was loaded when they came.

        config: the text of PEFT's for it, or empty. most: adapters that the model may have. Raises NotFound (model), and as `read_loras` and `with_lora`.
        """
        served = self._model(model)
        adapter = read_loras(served.name, served.settings, {name: file}, config)[name]
        with self._lock:
            served = self._model(model).with_lora(name, adapter, most, replacing)
            self.models = {**self.models, model: served}
        return served.loras[name]

    def unload_lora(self, model: str, name: str) -> None:
        """Requests that arrive from now on cannot name it; those that are here keep it. Raises NotFound."""
        with self._lock:
            self.models = {**self.models, model: self._model(model).without_lora(name)}

    def forget_times(self) -> None:
        """What calls took until now says nothing of those to come."""
        self._commands.put(self._scheduler.estimates.clear)

    def close(self, grace_s: float) -> None:
        """Take nothing new, finish what is there within `grace_s`; the rest fails as Unavailable. Idempotent."""
        with self._lock:
            self._closing = True
        end = time.monotonic() + grace_s
        while self._admitted and time.monotonic() < end:
            time.sleep(0.01)
        gone = Unavailable("the server stopped before this request was done; ask again, here once it is back, or another one", retry_after_s=RETRY_S)
        for request_id in tuple(self._admitted):
            self._commands.put(partial(self._fail_by_id, request_id, gone))
        self._commands.put(self._stopped.set)
        self._thread.join()
        if self.release is not None:
            self.release()  # before its batches are waited for: some may wait for a replica that never comes
        self._workers.shutdown()  # a batch cannot be stopped: what still runs is waited for
        if self._checkpoints is not None:
            self._checkpoints.close()

    def _seconds_for(self, requests: int) -> float:
        """Until so many have ended, of which `max_running` share the time."""
        return self._request_s * requests / self.max_running

    def _model(self, name: str) -> ServedModel:
        models = self.models
        if name not in models:
            raise unknown("model", name, models)
        return models[name]

    def _check(self, request: Request) -> ServedModel:
        served = self._model(request.model)
        if request.task not in served.settings.tasks:
            raise UnsupportedRequest(f"model {served.name!r} does not do {request.task}; it does: {', '.join(served.settings.tasks) or 'nothing'}")
        for each in map(request.settled, request.auto or ("",)):
            for kind, name, known in (("solver", each.solver, served.solvers), ("schedule", each.schedule, served.schedules)):
                if name not in known:
                    raise unknown(kind, name, known)
            validate(each, served.settings.limits)
        if request.deadline <= time.monotonic():
            raise DeadlineExceeded("queued")
        return served

    # Everything below runs on the engine's thread.

    def _loop(self) -> None:
        while not self._stopped.is_set():
            self._take_commands()
            self._expire()
            free = self._free()
            if free and (batch := self._scheduler.next_batch(time.monotonic(), free)):
                self._dispatch(batch)
            self.load = Load(sum(t.rows for tickets in self._scheduler.waiting.values() for t in tickets), self._in_flight)

    def _free(self) -> int:
        """Replicas that may take a batch."""
        return max(0, self._executor.capacity - self._in_flight)

    def _take_commands(self) -> None:
        """Run waiting commands; with nothing to do, wait for one, but look at deadlines, and for more replicas, in between."""
        idle = not (self._free() and any(self._scheduler.waiting.values()))
        try:
            command = self._commands.get(timeout=LOOK_S) if idle else self._commands.get_nowait()
            while True:
                try:
                    command()
                except Exception:  # of a listener, say: all other requests go on
                    log.exception("the engine could not do one thing that it was asked for")
                command = self._commands.get_nowait()
        except queue.Empty:
            return

    def _enqueue(self, running: Running) -> None:
        self._queued[running.request.id] = running
        ahead = len(self._running) + len(self._queued) - 1
        self._tell(running, Queued(ahead, self._seconds_for(max(0, ahead + 1 - self.max_running))))
        self._fill()

    def _fill(self) -> None:
        """Give free places to the queued, by priority, deadline, arrival."""
        while self._queued and len(self._running) < self.max_running:
            first = min(self._queued.values(), key=lambda r: (r.request.priority, r.request.deadline, r.arrival))
            self._start(self._queued.pop(first.request.id))

    def _start(self, running: Running) -> None:
        self._running[running.request.id] = running
        running.started = time.monotonic()
        try:
            rounds = self._choose(running) if running.request.auto else ()
            request, served = running.request, running.served
            table = served.table(request.solver, request.schedule, request.steps)
            rule = served.rule(request.guidance, request.scale, request.guidance_options)
            rounds = rounds or expected_rounds(served, request, table.n)
            running.usual = usual(rounds)
            self._open_ahead(request, rounds)
            if self._checkpoints is not None:
                running.adapters = served.adapters(request)
                if (found := self._checkpoints.find(request, running.adapters)) is not None:
                    running.state, running.kept = found, found.step
            job = Job(request, served.settings, table, rule, served.step_cache(request), served.lora(request))
            running.pipeline = PIPELINES[request.task](job, running.state)
            self._advance(running, None)
        except ReelstepError as error:
            self._fail(running, error)
        except Exception as error:  # too little memory, say
            log.exception("request %s could not begin", running.request.id)
            self._fail(running, InternalError(f"{running.request.task} could not begin: {error}"))

    def _open_ahead(self, request: Request, rounds: Sequence[Round]) -> None:
        """What is called after the first round, beside it, as far as that is known. What cannot be opened says so when it is called."""
        if (opens := self._opens) is not None and not request.step_cache:
            to_come = {key: rows for calls in rounds[1:] for key, rows in rows_of(calls).items()}
            self._workers.submit(lambda: [opens(key, rows) for key, rows in to_come.items()])  # one after the other: two at once would delay the first

    def _choose(self, running: Running) -> tuple[Round, ...]:
        """Settle the quality of a request of `auto`: the best that is expected to be done in time beside all that runs now; the cheapest where none is, or
        where nobody knows, since a program that it needs has never run. Returns what it will ask for."""
        open_request, served = running.request, running.served
        menu = served.settings.defaults[open_request.task].menu
        requests = {quality: open_request.settled(quality) for quality in reversed([*open_request.auto])}
        rounds = [
            expected_rounds(served, each, served.table(each.solver, each.schedule, each.steps).n, menu[quality].forwards) for quality, each in requests.items()
        ]
        others = [each.usual for each in self._running.values() if each is not running]
        seconds = partial(self._scheduler.batch_s, replicas=self._executor.capacity)
        place = first_in_time(rounds, others, seconds, open_request.deadline - time.monotonic())
        running.quality, running.request = [*requests.items()][place]
        return rounds[place]

    def _dispatch(self, batch: list[Ticket]) -> None:
        owners = [self._running[t.request_id] for t in batch]
        self._in_flight += 1
        calls = [owner.calls[t.slot] for owner, t in zip(owners, batch, strict=True)]
        if self._executor.inline:
            self._run(batch, owners, calls)()
        else:
            self._workers.submit(lambda: self._commands.put(self._run(batch, owners, calls)))

    def _run(self, batch: list[Ticket], owners: list[Running], calls: list[Call]) -> Callable[[], None]:
        """Perhaps on a worker: the calls, and what the loop has to do about how they ended."""
        key, rows = batch[0].key, sum(t.rows for t in batch)
        model, program, _ = key
        try:
            if self._opens is not None:  # before the clock starts: it waits for what is being opened beside it too, and none of that is this program's compute
                self._opens(key, min(rows, self._executor.max_rows[key]))
            began = time.monotonic()
            outputs = self._executor.run(model, calls)
        except ReelstepError as error:  # says all there is to say, and reaches whoever waits
            log.info("program %s of %s failed: %s", program, model, error)
            return partial(self._batch_failed, owners, error)
        except Exception as error:
            # A device or a program failed: those who wait for it must hear so, and the loop must live.
            log.exception("program %s of %s failed", program, model)
            return partial(self._batch_failed, owners, InternalError(f"program {program!r} failed: {error}"))
        return partial(self._batch_done, batch, owners, outputs, time.monotonic() - began)

    def _batch_failed(self, owners: list[Running], reason: ReelstepError) -> None:
        self._in_flight -= 1
        for owner in self._still_here(owners):
            self._fail(owner, reason)

    def _batch_done(self, batch: list[Ticket], owners: list[Running], outputs: list[Outputs], seconds: float) -> None:
        self._in_flight -= 1
        rows = sum(t.rows for t in batch)
        self._scheduler.note(batch[0].key, seconds, rows)
        if self._on_batch:
            self._on_batch(BatchRecord(batch[0].key, len(batch), rows, seconds))
        for ticket, owner, output in zip(batch, owners, outputs, strict=True):
            owner.answers[ticket.slot] = output
        program = batch[0].key[1]
        for owner in self._still_here(owners):
            owner.compute_s[program] = owner.compute_s.get(program, 0.0) + seconds
            if len(owner.answers) == len(owner.calls):
                self._advance(owner, tuple(owner.answers[i] for i in range(len(owner.calls))))

    def _still_here(self, owners: list[Running]) -> list[Running]:
        """Each owner once, without those that ended while their calls ran, whose ids others may have by now."""
        unique = {owner.request.id: owner for owner in owners}
        return [owner for owner in unique.values() if self._running.get(owner.request.id) is owner]

    def _advance(self, running: Running, answers: tuple[Outputs, ...] | None) -> None:
        """Send the answers to a pipeline and queue the calls it asks for next."""
        assert running.pipeline is not None
        try:
            calls = next(running.pipeline) if answers is None else running.pipeline.send(answers)
        except StopIteration as done:
            self._finish(running, done.value)
            return
        except ReelstepError as error:
            log.info("request %s failed: %s", running.request.id, error)
            self._fail(running, error)
            return
        except Exception as error:
            log.exception("request %s failed", running.request.id)
            self._fail(running, InternalError(f"{running.request.task} failed: {error}"))
            return
        self._report(running)
        self._keep(running)
        running.calls, running.answers = calls, {}
        request, now = running.request, time.monotonic()
        for slot, call in enumerate(calls):
            self._scheduler.push(request.id, slot, (request.model, *call.key), call.rows, request.priority, request.deadline, now)

    def _report(self, running: Running) -> None:
        """Tell of new previews and of progress."""
        state = running.state
        if state.preview is not None:
            self._tell(running, Preview(state.step, state.preview))
            state.preview = None
        if running.reported == (state.stage, state.step):
            return
        running.reported = (state.stage, state.step)
        assert running.started is not None
        spent = time.monotonic() - running.started
        remaining = spent / state.step * (state.steps - state.step) if state.step else self._request_s
        self._tell(running, Progress(state.stage, state.step, state.steps, remaining))

    def _keep(self, running: Running) -> None:
        """A checkpoint, where steps enough were made since the last one. A pipeline's state may be saved whenever it waits for calls."""
        if self._checkpoints is not None and running.state.step >= running.kept + self._checkpoints.every:
            running.kept = running.state.step
            self._checkpoints.keep(running.request, running.state, running.adapters)

    def _finish(self, running: Running, media: Media) -> None:
        assert running.started is not None
        most = max(running.state.runs, key=lambda run: run.forwards)
        usage = Usage(most.guidance.nfe, most.forwards, most.cached, running.started - running.arrival, dict(running.compute_s), running.quality)
        self._request_s = 0.8 * self._request_s + 0.2 * (time.monotonic() - running.started)
        self._forget(running)
        self._tell(running, Finished(media, usage))
        self._fill()

    def _fail_by_id(self, request_id: str, error: ReelstepError) -> None:
        running = self._running.get(request_id) or self._queued.get(request_id)
        if running is not None:
            self._fail(running, error)

    def _fail(self, running: Running, error: ReelstepError) -> None:
        self._forget(running)
        self._tell(running, Failed(error))
        self._fill()

    def _forget(self, running: Running) -> None:
        request_id = running.request.id
        self._scheduler.remove(request_id)
        self._running.pop(request_id, None)
        self._queued.pop(request_id, None)
        if running.pipeline is not None:
            running.pipeline.close()
        if self._checkpoints is not None and running.kept and not self._closing:
            self._checkpoints.forget(running.request, running.adapters)
        with self._lock:
            self._admitted.discard(request_id)

    def _expire(self) -> None:
        """Fail what is past its deadline, before more is spent on it."""
        now = time.monotonic()
        for running in [r for r in (*self._running.values(), *self._queued.values()) if r.request.deadline <= now]:
            stage = "queued" if running.started is None else running.state.stage
            self._fail(running, DeadlineExceeded(stage))

    def _tell(self, running: Running, event: Event) -> None:
        try:
            running.listener(event)
        except Exception:  # a listener's bug must not stop the other requests
            log.exception("the listener of request %s failed", running.request.id)


def expected_rounds(served: ServedModel, request: Request, evaluations: int, forwards: float | None = None) -> tuple[Round, ...]:
    """What the request will ask for. evaluations: of its table. forwards: of one output, where they were measured; else two for each velocity that is guided,
    which few rules exceed."""
    guided = request.guidance != "none" and request.scale not in (0, 1)
    _, length, _, _ = served.settings.latent_shape(request.frames, request.width, request.height)
    _, begins = tiles_of(served.settings, length)
    return rounds_of(
        request.model, profile_of(request), evaluations, forwards or evaluations * (2 if guided else 1), count=request.count,
        picture=request.image is not None, tiles=len(begins), preview_every=request.preview_every,
        denoiser="denoise" + SUFFIX if any(request.lora.values()) else "denoise",
    )  # fmt: skip


def open_engine(
    bundles: Sequence[Path],
    *,
    cache: Path,
    backend: str | None = None,
    precision: Precision | None = None,
    max_running: int = 32,
    max_queued: int = 256,
    on_batch: Callable[[BatchRecord], None] | None = None,
    progress: LoadProgress = silent,
    trusted: Sequence[PublicKey] = (),
    mesh: Mesh | None = None,
    loras: Mapping[str, Path] | None = None,
    elsewhere: Elsewhere | None = None,
    checkpoints: tuple[Path, int] | None = None,
    allowance: Allowance | None = None,
) -> Engine:
    """Load bundles and run each once, so that the first request meets warm engines. trusted: if any, one of these must have signed each bundle.

    mesh: of ranks that share one bundle's model, in float32 or as it was planned for a mesh: on this machine, or as `elsewhere` says, whose replicas then
    run all that there is.
    loras: files by the names that requests use, of the only bundle. checkpoints: a directory for states of running requests, and every how many steps
    one is kept. allowance: how long a call on a mesh may take; `elsewhere` brings its own. Raises BundleError, CompileError, NotFound (backend), or
    ConfigError when two bundles hold one model, and as `open_on_mesh` or `elsewhere`.
    """
    if loras and len(bundles) != 1:
        raise ConfigError(f"LoRAs ({', '.join(loras)}) belong to one bundle; serve it from a server of its own")
    if mesh is not None and mesh.world > 1:
        if len(bundles) != 1:
            raise ConfigError(f"{len(bundles)} bundles on mesh {mesh}: a process is a rank of one replica; serve each bundle from a server of its own")
        if precision not in (None, "float32"):
            text = "ranks run float32, or what the bundle was planned for; leave --precision out, or serve without a mesh"
            raise ConfigError(f"precision {precision} on mesh {mesh}: {text}")
    opened = [Bundle.open(path, trusted) for path in bundles]
    names = [bundle.plan.model for bundle in opened]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two bundles both hold model {', '.join(map(repr, twice))}; serve one of them")
    models = {bundle.plan.model: ServedModel.of(bundle, loras) for bundle in opened}
    kept = None
    if checkpoints is not None:
        how = [__version__, backend, precision, str(mesh)]
        kept = Checkpoints(*checkpoints, {bundle.plan.model: json.dumps([bundle.manifest["sha256"], *how]) for bundle in opened})
    at_once = 1 if mesh is None else mesh.cfg
    make = partial(Engine, models, max_running=max_running, max_queued=max_queued, on_batch=on_batch, checkpoints=kept, rows_at_once=at_once)
    if elsewhere is not None:
        progress(f"replicas: {elsewhere.scaling.least}", 0, 1)
        replicas = elsewhere.open(opened)
        progress("replicas: ready", 1, 1)
        engine = make(replicas)
        engine.release = Scaler(elsewhere, replicas, lambda: engine.load).close
        return warmed_up(engine)
    if mesh is not None and mesh.world > 1:
        from reelstep.engine.executors.on_mesh import open_on_mesh  # here: it brings all that compiles, which one device is spared

        progress(f"ranks of mesh {mesh}", 0, 1)
        ranks = open_on_mesh(opened[0], mesh, cache, backend, allowance or Allowance())
        progress(f"ranks of mesh {mesh}: ready", 1, 1)
        return warmed_up(make(ranks, release=ranks.close))
    return warmed_up(make(Inline({bundle.plan.model: runner_of(bundle, load(bundle, cache, backend, precision, progress)) for bundle in opened})))


def open_once(ahead: Ahead, loras: Mapping[str, Path]) -> Engine:
    """For a single request, which is done sooner if only what it calls is opened, and nothing is run before. loras: as of `open_engine`, which raises too."""
    model = ServedModel.of(ahead.bundle, loras)
    opens = lru_cache(None)(lambda key, rows: ahead.engines[key[1:]].open(rows))
    return Engine({model.name: model}, Inline({model.name: runner_of(ahead.bundle, ahead.engines)}), max_running=1, max_queued=0, opens=opens)


def warmed_up(engine: Engine) -> Engine:
    """The engine, after requests to every task of its models: a backend may run one row by another engine than several.

    Twice, as the first calls open what later ones find open, and deadlines are held against what those take. A model that takes LoRAs and has none is given
    one meanwhile, for the first that a client loads shall not wait for what is cold either.
    """
    loaded = engine.models
    engine.models = {name: model.with_some_lora() for name, model in loaded.items()}
    for _ in range(2):
        engine.forget_times()
        for model in engine.models.values():
            for task, several in product(model.settings.tasks, (False, True)):
                for step_cache in ("", *model.step_caches):
                    warm_up(engine, model, task, step_cache, several)
                for lora in [*model.loras][:1]:
                    warm_up(engine, model, task, "", several, {lora: 1.0})
    engine.models = loaded
    return engine


def warm_up(engine: Engine, model: ServedModel, task: str, step_cache: str, several: bool, lora: Mapping[str, float] | None = None) -> None:
    """One request of one step, or with a step cache of three, of which it skips the second. several: for two results at scale 2, so that no call has one row.

    A student of few steps runs as it always does.
    """
    defaults, limits, student = model.settings.defaults[task], model.settings.limits, model.settings.distilled is not None
    wanted = 2.0 if several else 1.0
    steps, scale, guidance = (defaults.steps, defaults.scale, defaults.guidance) if student else (3 if step_cache else 1, wanted, "cfg")
    width, height = limits.sizes[0]
    image = np.full((height, width, 3), 255, np.uint8) if task == "animate_sticker" else None
    request = Request(
        id=f"warm-up {model.name} {task}", model=model.name, task=task, prompt="warm up", negative_prompt="", seed=0,
        count=min(2 if several else 1, limits.max_count), width=width, height=height,
        frames=defaults.frames, frames_per_second=defaults.frames_per_second, steps=steps, scale=scale,
        solver=defaults.solver, schedule=defaults.schedule, guidance=guidance, guidance_options={}, step_cache=step_cache,
        step_cache_options={"threshold": 10.0} if step_cache else {}, image=image, preview_every=0, priority=0, deadline=math.inf,
        lora=lora or {},
    )  # fmt: skip
    done = threading.Event()
    failures: list[ReelstepError] = []

    def listen(event: Event) -> None:
        if isinstance(event, Failed):
            failures.append(event.error)
        if isinstance(event, Finished | Failed):
            done.set()

    engine.submit(request, listen)
    done.wait()
    if failures:
        engine.close(0)
        raise failures[0]
