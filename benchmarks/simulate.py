"""Which policy serves how much in time, on fleets that you do not have?

The engine's own scheduler drives simulated replicas on a simulated clock. Three questions: policies over load, policies over the number of replicas, and what
failures cost by how often requests are saved. Load 1 is what the fleet does one call at a time. Latencies are of finished requests; attainment and goodput
count all. `lost` is the share of calls that failures wasted, `dropped` that of calls for requests that expired. With --live the same trace goes to a server,
and the same is reported of it. Every number that the simulation stands on is printed with its source.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from reelstep.benchmarks import traces
from reelstep.benchmarks.call_costs import Costs, read_costs, reel_tiny
from reelstep.benchmarks.fleet import POLICIES, Failures, Fleet, Outcome, Run
from reelstep.benchmarks.harness import Row, parser, report
from reelstep.benchmarks.traces import Arrival, Burst, Kind
from reelstep.compiler.planner import check_plot
from reelstep.engine.client import AsyncClient, Options
from reelstep.errors import ConfigError, DeadlineExceeded, Overloaded, ReelstepError, Unavailable, unknown

PICTURE = Path(__file__).parent / "heart.png"
PROMPT = "a red heart bounces"
DRAWING = ("requests", "load", "loads", "slack", "burst")
"""Options of drawn traces."""
LEAST_EACH = 20
"""Requests for each replica in a drawn trace, so that a large fleet does more than start and end."""


class Ended(Protocol):
    """A request that ended, simulated or live."""

    @property
    def arrival_s(self) -> float: ...
    @property
    def end_s(self) -> float: ...
    @property
    def outcome(self) -> Outcome | None: ...
    @property
    def in_time(self) -> bool: ...


@dataclass(frozen=True)
class Answered:
    """What a server made of one arrival. Seconds since the trace began; arrival_s is when it was really sent. quality: that it got."""

    arrival_s: float
    end_s: float
    outcome: Outcome
    in_time: bool
    quality: str = ""


def served(ended: Sequence[Ended]) -> Row:
    """How the requests fared, over the time from 0 to the last end."""
    latencies = [each.end_s - each.arrival_s for each in ended if each.outcome == "finished"]
    quantiles = np.quantile(latencies, (0.5, 0.95, 0.99)) if latencies else (None, None, None)
    outcomes = Counter(each.outcome for each in ended)
    in_time = sum(each.in_time for each in ended)
    return {
        "goodput_per_s": in_time / max(each.end_s for each in ended), "attainment": in_time / len(ended),
        **{name: None if value is None else float(value) for name, value in zip(("p50_s", "p95_s", "p99_s"), quantiles, strict=True)},
        "late": outcomes["finished"] - in_time, "expired": outcomes["expired"], "refused": outcomes["refused"],
    }  # fmt: skip


def spent(run: Run) -> Row:
    """What it took. rows: of one batch of the denoiser, each batch counted once."""
    calls = sum(job.executed for job in run.jobs)
    steps: Counter[int] = Counter()
    for ((_, program, _), rows), times in run.batches.items():
        if program == "denoise":
            steps[rows] += times
    sizes = np.repeat(np.fromiter(steps, int), np.fromiter(steps.values(), int))
    return {
        "utilisation": run.busy_s / run.up_s,
        "dropped": sum(job.executed - job.lost for job in run.jobs if job.outcome == "expired") / max(calls, 1),
        "shortened": sum(job.steps < job.asked_steps for job in run.jobs) / len(run.jobs),
        "rows": float(sizes.mean()) if sizes.size else None,
        "rows_p95": float(np.quantile(sizes, 0.95)) if sizes.size else None,
    }


def kinds_of(costs: Costs) -> list[Kind]:
    """Every task at every quality of its menu; without a menu at its own steps."""
    return [Kind(task, steps, quality) for task, shape in costs.tasks.items() for quality, steps in (shape.menu or {"": shape.steps}).items()]


@dataclass(frozen=True)
class Lab:
    """What all simulations of one command share. requests: of a drawn trace, if that gives each replica enough."""

    costs: Costs
    requests: int
    slack: tuple[float, float]
    burst: Burst | None
    seed: int

    def draw(self, load: float, replicas: int) -> list[Arrival]:
        """At a load of the fleet, one call at a time."""
        kinds = kinds_of(self.costs)
        alone = float(np.mean([self.costs.alone_s(kind.task, kind.steps) for kind in kinds]))
        return traces.draw(max(self.requests, LEAST_EACH * replicas), load * replicas / alone, kinds, self.costs.alone_s, self.slack, self.burst, self.seed)

    def load_of(self, arrivals: Sequence[Arrival], replicas: int) -> float:
        """What a trace asks of the fleet until its last arrival; infinite if all come at once."""
        asked = Counter((each.task, each.steps) for each in arrivals)
        work = sum(times * self.costs.alone_s(task, steps) for (task, steps), times in asked.items())
        return work / replicas / arrivals[-1].arrival_s if arrivals[-1].arrival_s else float("inf")

    def simulate(self, arrivals: Sequence[Arrival], replicas: int, policy: str, failures: Failures | None = None) -> Run:
        menu = {task: tuple(shape.menu.values()) for task, shape in self.costs.tasks.items()}
        return Fleet(self.costs.limits, self.costs.seconds, self.costs.rounds, replicas, POLICIES[policy], failures, menu).run(arrivals)

    def policies(self, names: Sequence[str], arrivals: Sequence[Arrival], replicas: int) -> list[Row]:
        """The same trace under each policy."""
        load = self.load_of(arrivals, replicas)
        runs = {name: self.simulate(arrivals, replicas, name) for name in names}
        return [{"policy": name, "load": load, **served(run.jobs), **spent(run)} for name, run in runs.items()]

    def failing(self, policy: str, arrivals: Sequence[Arrival], replicas: int, failures: Failures) -> tuple[Row, Run]:
        """One trace while replicas die."""
        run = self.simulate(arrivals, replicas, policy, failures)
        deaths = sum(later < earlier for (_, earlier), (_, later) in pairwise(run.alive))
        resumed, calls = sum(job.resumed > 0 for job in run.jobs), sum(job.executed for job in run.jobs)
        what = {"saved_every": failures.checkpoint, "deaths": deaths, "resumed": resumed, "lost": sum(job.lost for job in run.jobs) / calls}
        return {**what, **served(run.jobs), **spent(run)}, run


def live(address: str, model: str, arrivals: Sequence[Arrival]) -> list[Answered]:
    """Send a trace to a server at its times, whatever the answers do. Raises ConfigError for what the client cannot send."""
    if prior := [each for each in arrivals if each.priority]:
        raise ConfigError(f"{len(prior)} arrivals have a priority, which the client does not send; leave it 0 in a trace for --live")
    return asyncio.run(send_all(address, model, arrivals))


async def send_all(address: str, model: str, arrivals: Sequence[Arrival]) -> list[Answered]:
    async with AsyncClient(address) as client:
        began = time.perf_counter()
        return await asyncio.gather(*(send(client, model, arrival, k, began) for k, arrival in enumerate(arrivals)))


async def send(client: AsyncClient, model: str, arrival: Arrival, seed: int, began: float) -> Answered:
    """One request, when it is due. A server's error is an outcome."""
    await asyncio.sleep(max(0.0, began + arrival.arrival_s - time.perf_counter()))
    sent = time.perf_counter() - began
    outcome: Outcome = "finished"
    quality = ""
    try:
        quality = (await client.generate(PROMPT, timeout=arrival.deadline_s, **options_of(arrival, model, seed))).quality
    except DeadlineExceeded:
        outcome = "expired"
    except Overloaded:
        outcome = "refused"
    except ReelstepError as error:
        outcome = "failed"
        print(f"request {seed} ({arrival.task}) failed: {error}", flush=True)
    end = time.perf_counter() - began
    return Answered(sent, end, outcome, outcome == "finished" and (arrival.deadline_s is None or end - sent <= arrival.deadline_s), quality)


def options_of(arrival: Arrival, model: str, seed: int) -> Options:
    """What the client is asked for. Raises NotFound for a task that no server is asked for by these."""
    options = Options(model=model, seed=seed)
    if arrival.quality:
        options["quality"] = arrival.quality
    else:
        options["steps"] = arrival.steps
    shapes: Mapping[str, Options] = {"text_to_video": Options(), "text_to_image": Options(frames=1), "animate_sticker": Options(image=PICTURE)}
    if arrival.task not in shapes:
        raise unknown("task", arrival.task, shapes)
    options.update(shapes[arrival.task])
    return options


def plot(path: Path, over_load: Sequence[Row], over_replicas: Sequence[Row], dying: Run) -> None:
    """Latency and attainment over load, goodput over replicas, and what happens while replicas die."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    (latency, attainment), (goodput, failing) = figure.subplots(2, 2)
    lines: Mapping[Any, tuple[Sequence[Row], str, str, str]] = {
        latency: (over_load, "load", "p95_s", "95 % of the finished take at most, s"),
        attainment: (over_load, "load", "attainment", "share that is done in time"),
        goodput: (
            [{**row, "each": row["goodput_per_s"] / row["replicas"]} for row in over_replicas],
            "replicas",
            "each",
            "done in time per second and replica",
        ),
    }
    for axes, (rows, x, y, words) in lines.items():
        mine = [row for row in rows if row[y] is not None]
        for policy in dict.fromkeys(row["policy"] for row in mine):
            axes.plot(*zip(*((row[x], row[y]) for row in mine if row["policy"] == policy), strict=True), marker=".", label=policy)
        axes.set_xlabel(x)
        axes.set_ylabel(words)
        if mine:
            axes.legend(fontsize=8)
    latency.set_yscale("log")
    goodput.set_xscale("log")
    goodput.set_ylim(0, None)
    plot_failures(failing, dying)
    figure.savefig(path, dpi=80)


def plot_failures(axes: Any, run: Run) -> None:
    """Replicas alive, and requests done in time in each fortieth of the run."""
    ends = [job.end_s for job in run.jobs if job.in_time]
    counts, edges = np.histogram(ends, bins=40, range=(0, run.span_s))
    axes.stairs(counts / np.diff(edges), edges, label="done in time per second")
    axes.set_xlabel("second")
    axes.set_ylabel("done in time per second")
    alive = axes.twinx()
    times, numbers = zip(*run.alive, (run.span_s, run.alive[-1][1]), strict=True)
    alive.step(times, numbers, where="post", color="tab:red", label="replicas alive")
    alive.set_ylabel("replicas alive", color="tab:red")
    alive.set_ylim(0, None)


def main(argv: Sequence[str]) -> None:
    options = parser("simulate", __doc__ or "")
    options.add_argument("--costs", type=Path, metavar="FILE", help="seconds of calls, as docs/simulation.md says (reel-tiny on the CPU of our results)")
    options.add_argument("--policies", nargs="+", default=list(POLICIES), metavar="NAME", help="(%(default)s)")
    options.add_argument("--loads", type=float, nargs="+", default=[0.4, 0.6, 0.8, 1.0, 1.2, 1.4], metavar="X", help="(%(default)s)")
    options.add_argument("--load", type=float, default=0.9, help="where replicas or failures vary (%(default)s)")
    options.add_argument("--replicas", type=int, default=8, metavar="N", help="where loads or failures vary (%(default)s)")
    options.add_argument("--fleets", type=int, nargs="+", default=[1, 10, 100, 1000], metavar="N", help="numbers of replicas to compare (%(default)s)")
    options.add_argument("--requests", type=int, default=2000, metavar="N", help=f"of each trace, and {LEAST_EACH} for each replica at least (%(default)s)")
    options.add_argument("--slack", type=float, nargs=2, default=[3.0, 12.0], metavar="X", help="least and most deadline over time alone (%(default)s)")
    options.add_argument("--burst", type=float, nargs=3, metavar=("FACTOR", "EVERY_S", "LENGTH_S"), help="denser arrivals now and then (none)")
    options.add_argument("--mtbf", type=float, default=60.0, metavar="S", help="mean seconds between deaths of a replica, where failures vary (%(default)s)")
    options.add_argument("--repair", type=float, default=20.0, metavar="S", help="seconds until a dead replica is back (%(default)s)")
    options.add_argument("--notice", type=float, default=1.0, metavar="S", help="seconds until its requests go on elsewhere (%(default)s)")
    options.add_argument("--checkpoints", type=int, nargs="+", default=[0, 1, 4], metavar="K", help="rounds of calls between saves; 0: none (%(default)s)")
    options.add_argument("--trace", type=Path, metavar="FILE", help="recorded arrivals, in place of drawn ones")
    options.add_argument("--record", type=Path, metavar="FILE", help="write the arrivals at --load on --replicas")
    options.add_argument("--plot", type=Path, metavar="FILE", help="draw it (.png, .svg, .pdf)")
    options.add_argument("--live", metavar="HOST:PORT", help="send the trace to this server in place of simulating")
    options.add_argument("--model", default="reel-tiny", help="of the server (%(default)s)")
    args = options.parse_args(argv)
    given = [name for name in DRAWING if getattr(args, name) != options.get_default(name)]
    if args.trace is not None and given:
        raise ConfigError(f"{args.trace} holds the arrivals, so --{', --'.join(given)} would change nothing; leave out one or the other")
    if args.live is not None and args.plot is not None:
        raise ConfigError("--plot draws simulations, and with --live there is none; leave out one or the other")
    for policy in args.policies:
        if policy not in POLICIES:
            raise unknown("policy", policy, POLICIES)
    if args.plot is not None:
        check_plot(args.plot)
    failures = [Failures(args.mtbf, args.repair, args.notice, checkpoint, args.seed) for checkpoint in args.checkpoints]
    costs = reel_tiny() if args.costs is None else read_costs(args.costs)
    lab = Lab(costs, args.requests, tuple(args.slack), None if args.burst is None else Burst(*args.burst), args.seed)
    recorded = None if args.trace is None else traces.read(args.trace)
    arrivals = lab.draw(args.load, args.replicas) if recorded is None else recorded
    if args.record is not None:
        traces.write(args.record, arrivals)
    if args.live is not None:
        answered = live(args.live, args.model, arrivals)
        failed = sum(each.outcome == "failed" for each in answered)
        report("a live server", [{"server": args.live, **served(answered), "failed": failed}], args.seed, args.json)
        if failed == len(answered):
            raise Unavailable(f"all {failed} requests to {args.live} failed, as said above", retry_after_s=1.0)
        return
    began = time.process_time()
    loads = [] if recorded is not None else args.loads
    over_load = [row for load in loads for row in lab.policies(args.policies, lab.draw(load, args.replicas), args.replicas)]
    own = {replicas: lab.draw(args.load, replicas) if recorded is None else recorded for replicas in args.fleets}
    over_replicas = [{"replicas": replicas, **row} for replicas, trace in own.items() for row in lab.policies(args.policies, trace, replicas)]
    failing, dying = zip(*(lab.failing(args.policies[0], arrivals, args.replicas, each) for each in failures), strict=True)
    cpu_s = time.process_time() - began
    assumed = [
        "the router gives a request to the replica with the fewest, and knows of deaths at once; "
        "the engine gives each batch to the replica that has waited longest",
        "saving a state, moving it and sending calls are free",
        *(f"{policy}: {POLICIES[policy].words}" for policy in args.policies),
    ]
    print("\n".join([f"costs of {costs.model} on {costs.sku}", *costs.origins(), *assumed]))
    tables: Mapping[str, Sequence[Row]] = {
        "policies over load": over_load,
        "policies over replicas": over_replicas,
        f"{args.policies[0]} while replicas die": failing,
    }
    extra = {"costs": costs.origins(), "assumed": assumed, "replicas": args.replicas, "requests": len(arrivals), "cpu_s": cpu_s}
    first = next(name for name, rows in tables.items() if rows)
    for name, rows in tables.items():
        others = {other: each for other, each in tables.items() if other != name}
        if rows:
            report(name, rows, args.seed, args.json if name == first else None, {**extra, **others})
    print(f"{cpu_s:.3g} s of CPU for {len(over_load) + len(over_replicas) + len(failing)} simulations")
    if args.plot is not None:
        plot(args.plot, over_load, over_replicas, dying[-1])
        print(f"wrote {args.plot}")
