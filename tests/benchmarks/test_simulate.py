"""Simulated fleets against queueing theory, a recursion, brute force, the real pipelines and a measured engine."""

import json
import math
import random
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from reelstep.benchmarks import traces
from reelstep.benchmarks.call_costs import REEL_TINY_ROWS, REEL_TINY_TASKS, RESULTS, Costs, Point, Task, along, read_costs, reel_tiny, shape_of
from reelstep.benchmarks.fleet import POLICIES, Failures, Fleet
from reelstep.benchmarks.simulate import Answered, Lab, live, main, served, spent
from reelstep.benchmarks.traces import Arrival, Burst, Kind
from reelstep.engine.models.reel_tiny import SPEC, ReelTiny, programs
from reelstep.engine.pipelines import PIPELINES
from reelstep.engine.pipelines.state import PipelineState
from reelstep.engine.request import Choice, Defaults
from reelstep.engine.scheduler import MARGIN
from reelstep.errors import ConfigError, NotFound, Unavailable
from reelstep.parallel.shard import empty_weights
from reelstep.tests.engine.conftest import make_request
from reelstep.tests.engine.pipelines.test_latent import job_for
from reelstep.tests.engine.service.in_process import served as serving

KEY = ("m", "denoise", "any")
ENDLESS = replace(POLICIES["fifo"], max_queued=10**9)
RATE = 0.5  # arrivals for one mean service time


def calls(task, steps):
    return (((KEY, 1),),) * steps


def fleet(seconds=lambda key, rows: 1.0, replicas=1, policy=ENDLESS, failures=None, rows=1, menu=None):
    return Fleet({KEY: rows}, seconds, calls, replicas, policy, failures, menu)


def poisson(count, seed):
    drawn, now = random.Random(seed), 0.0
    return [Arrival(now := now + drawn.expovariate(RATE), "t", 1) for _ in range(count)]


@pytest.fixture(scope="module")
def lab():
    return Lab(reel_tiny(), 600, (1.5, 6.0), None, 0)


FAILING = Failures(between_s=10.0, repair_s=4.0, notice_s=0.5, checkpoint=2, seed=3)


@pytest.fixture(scope="module")
def runs(lab):
    """One trace, overloaded, under every policy, without and with failures."""
    arrivals = lab.draw(1.2, 4)
    return arrivals, [(name, failures, lab.simulate(arrivals, 4, name, failures)) for name in POLICIES for failures in (None, FAILING)]


def test_exponential_calls_of_poisson_arrivals_wait_as_in_the_closed_form_of_m_m_1():
    service = random.Random(1)
    run = fleet(lambda key, rows: service.expovariate(1.0)).run(poisson(20_000, 0))
    assert np.mean([job.end_s - job.arrival_s for job in run.jobs]) == pytest.approx(1 / (1 - RATE), rel=0.06)  # 4 standard errors of 20,000 correlated times
    waits = sorted(job.end_s - job.arrival_s for job in run.jobs)  # exponential with the rate 1 - RATE
    assert waits[len(waits) * 9 // 10] == pytest.approx(math.log(10) / (1 - RATE), rel=0.08)


def test_equal_calls_of_poisson_arrivals_wait_as_in_the_closed_form_of_m_d_1():
    run = fleet().run(poisson(20_000, 0))
    assert np.mean([job.end_s - job.arrival_s - 1 for job in run.jobs]) == pytest.approx(RATE / (2 * (1 - RATE)), rel=0.06)
    assert run.busy_s / run.up_s == pytest.approx(RATE, rel=0.03)


def test_in_order_of_arrival_every_end_follows_lindleys_recursion():
    drawn = random.Random(2)
    arrivals = [replace(arrival, steps=drawn.randint(1, 3)) for arrival in poisson(500, 3)]
    free, ends = 0.0, []
    for arrival in arrivals:
        free = max(free, arrival.arrival_s) + arrival.steps
        ends.append(free)
    assert [job.end_s for job in fleet().run(arrivals).jobs] == pytest.approx(ends, rel=1e-12)


def test_littles_law_holds_on_every_run(runs):
    for name, failures, run in runs[1]:
        assert run.jobs_s == pytest.approx(sum(job.end_s - job.arrival_s for job in run.jobs), rel=1e-9), (name, failures)


def test_every_request_ends_once_and_its_calls_are_its_own_and_the_wasted(lab, runs):
    arrivals, all_runs = runs
    for name, failures, run in all_runs:
        assert [job.arrival_s for job in run.jobs] == [arrival.arrival_s for arrival in arrivals]
        assert all(job.outcome in ("finished", "expired", "refused") for job in run.jobs), name
        for job in run.jobs:
            if job.outcome == "finished":
                shape = lab.costs.tasks[job.task]
                assert job.executed == 3 + shape.picture + shape.branches * job.steps + job.lost, "text, time, decode, perhaps a picture, and its steps"
        if failures is None:
            assert not any(job.lost or job.resumed for job in run.jobs)
        else:
            assert sum(job.lost for job in run.jobs) > 0
            assert run.lost_s > 0


def test_deadlines_expire_only_where_the_engine_hears_of_them(runs):
    for name, _, run in runs[1]:
        outcomes = Counter(job.outcome for job in run.jobs)
        late = sum(job.outcome == "finished" and not job.in_time for job in run.jobs)
        assert (outcomes["expired"] > 0) == POLICIES[name].deadlines
        assert all(job.end_s >= job.deadline for job in run.jobs if job.outcome == "expired")
        assert late > 0 or POLICIES[name].deadlines


def test_busy_seconds_are_those_of_the_batches_and_no_batch_is_too_wide(lab, runs):
    for name, _, run in runs[1]:
        whole = sum(times * lab.costs.seconds(key, rows) for (key, rows), times in run.batches.items())
        assert run.busy_s - run.lost_s == pytest.approx(whole, rel=1e-9)
        if not POLICIES[name].batching:
            assert {rows for key, rows in run.batches if key[1] in ("denoise", "decode")} == {1}
        assert all(rows <= lab.costs.limits[key] for key, rows in run.batches)


def test_replicas_are_up_but_for_their_repairs(runs):
    for name, failures, run in runs[1]:
        steps = [*run.alive, (run.span_s, 0)]
        assert run.up_s == pytest.approx(sum(n * (later - now) for (now, n), (later, _) in pairwise(steps)), rel=1e-9), name
        assert (min(n for _, n in run.alive) < 4) == (failures is not None)


def test_one_call_at_a_time_utilisation_is_the_load(lab):
    arrivals = [replace(arrival, deadline_s=None) for arrival in lab.draw(0.7, 4)]
    run = lab.simulate(arrivals, 4, "fifo")
    assert run.busy_s == pytest.approx(sum(lab.costs.alone_s(each.task, each.steps) for each in arrivals), rel=1e-9)
    assert run.busy_s / run.up_s == pytest.approx(lab.load_of(arrivals, 4), rel=0.03)  # the end of the last request is after its arrival
    assert lab.load_of(arrivals, 4) == pytest.approx(0.7, rel=0.1)  # 600 requests of one to six tenths of a second


def test_work_is_conserved_without_batches_whatever_the_order(lab):
    arrivals = [replace(arrival, deadline_s=None) for arrival in lab.draw(0.9, 1)[:200]]
    one = lab.simulate(arrivals, 1, "fifo")
    alone = replace(POLICIES["scheduler"], batching=False)
    other = Fleet(lab.costs.limits, lab.costs.seconds, lab.costs.rounds, 1, alone).run(arrivals)
    assert [job.end_s for job in one.jobs] != [job.end_s for job in other.jobs]
    assert (other.span_s, other.busy_s) == pytest.approx((one.span_s, one.busy_s), rel=1e-9), "the busy periods are the same"


def test_two_runs_of_one_seed_are_equal_and_another_seed_is_not(lab):
    arrivals = lab.draw(1.0, 3)
    one, two = (lab.simulate(lab.draw(1.0, 3), 3, "scheduler", FAILING) for _ in range(2))
    assert one == two
    assert lab.simulate(arrivals, 3, "scheduler", replace(FAILING, seed=4)) != one
    assert replace(lab, seed=1).draw(1.0, 3) != arrivals


def dying(first_s):
    """Failures in which replica 0 dies first at `first_s`, and replica 1 long after."""
    seed = next(s for s in range(10_000) if random.Random(f"{s} 1").expovariate(1.0) > 20 * random.Random(f"{s} 0").expovariate(1.0))
    return Failures(first_s / random.Random(f"{seed} 0").expovariate(1.0), repair_s=100.0, notice_s=1.0, checkpoint=2, seed=seed)


@pytest.mark.parametrize(("checkpoint", "lost", "end_s"), [(0, 4, 9.5), (1, 1, 6.5), (2, 2, 7.5)])
def test_a_request_of_a_dead_replica_goes_on_elsewhere_from_what_was_saved(checkpoint, lost, end_s):
    # Five calls of a second; death at 3.5, in the fourth; noticed at 4.5. Saved then: nothing, three, two calls.
    run = fleet(replicas=2, failures=replace(dying(3.5), checkpoint=checkpoint)).run([Arrival(0.0, "t", 5)])
    (job,) = run.jobs
    assert (job.executed, job.lost, job.resumed) == (5 + lost, lost, 1)
    assert (job.end_s, run.lost_s, run.busy_s) == pytest.approx((end_s, 0.5, 3.5 + 5 - (4 - lost)), rel=1e-9)


def possible(jobs):
    """Whether any order of unit calls, begun at whole seconds, meets all deadlines: all orders are tried. jobs: (arrival, calls, deadline)."""
    seen = set()

    def go(now, left):
        if (now, left) in seen:
            return False
        seen.add((now, left))
        if not any(left):
            return True
        if any(n and now + n > deadline for n, (_, _, deadline) in zip(left, jobs, strict=True)):
            return False
        ready = [k for k, (arrival, _, _) in enumerate(jobs) if arrival <= now and left[k]]
        return any(go(now + 1, (*left[:k], left[k] - 1, *left[k + 1 :])) for k in ready) if ready else go(now + 1, left)

    return go(0, tuple(n for _, n, _ in jobs))


def test_all_deadlines_are_met_whenever_any_order_of_calls_could():
    drawn = random.Random(5)
    met = 0
    for _ in range(300):
        jobs = [(arrival := drawn.randint(0, 4), n := drawn.randint(1, 3), arrival + n + drawn.randint(0, 6)) for _ in range(4)]
        jobs.sort()
        # A deadline is a moment at which it is too late, and the last call ends at a whole second: so a half is added.
        arrivals = [Arrival(float(arrival), "t", n, deadline_s=deadline - arrival + 0.5) for arrival, n, deadline in jobs]
        run = fleet(policy=POLICIES["scheduler"]).run(arrivals)
        assert all(job.in_time for job in run.jobs) == possible(jobs), jobs
        met += possible(jobs)
    assert 50 < met < 250, "both kinds are tried"


def test_only_the_degrading_policy_shortens_and_only_as_much_as_the_deadline_asks():
    asked = [Arrival(0.0, "t", 16, deadline_s=steps * MARGIN + more) for steps, more in ((16, 0.01), (16, -0.01), (8, -0.01), (4, -0.01))]
    for arrival, steps in zip(asked, (16, 8, 4, 4), strict=True):
        (job,) = fleet(policy=POLICIES["degrade"], menu={"t": (4, 8, 16)}).run([arrival]).jobs
        assert job.steps == steps
        (job,) = fleet(policy=POLICIES["scheduler"], menu={"t": (4, 8, 16)}).run([arrival]).jobs
        assert job.steps == 16


def test_the_full_fleet_refuses_newcomers():
    run = fleet(policy=replace(POLICIES["fifo"], max_running=1, max_queued=2), replicas=2).run([Arrival(0.0, "t", 1)] * 8)
    assert Counter(job.outcome for job in run.jobs) == {"finished": 6, "refused": 2}
    assert run.span_s == pytest.approx(3)


def test_the_rows_that_the_documentation_quotes_are_of_what_calls_cost_now():
    assert json.loads((RESULTS / "simulate.json").read_text())["costs"] == reel_tiny().origins()


def test_simulated_seconds_are_near_those_of_the_measured_engine(lab):
    measured = json.loads((RESULTS / "concurrency.json").read_text())["rows"]
    requests = measured[0]["requests"]
    steps = int(measured[1]["batches"].split("x")[1]) // 5  # of five rounds, in each of which all requests step together
    for row, policy in zip(measured, (replace(POLICIES["scheduler"], max_running=1), POLICIES["scheduler"]), strict=True):
        run = Fleet(lab.costs.limits, lab.costs.seconds, lab.costs.rounds, 1, policy).run([Arrival(0.0, "text_to_video", steps)] * requests)
        assert run.span_s == pytest.approx(row["median_s"], rel=0.2)  # other commits and hours of a shared machine lie between the measurements
        assert spent(run)["rows"] == pytest.approx(row["mean_rows"])


def zeros(call):
    """Outputs of reel-tiny's programs in shape."""
    shapes = {
        "encode_text": ("context", (2, 1, 1)), "embed_time": ("modulation", (call.rows, 1, 1)), "encode_image": ("latent", (1, 16, 1, 8, 8)),
        "denoise": ("velocity", call.inputs["x"].shape if "x" in call.inputs else ()),
        "decode": ("video", (1, 3, 2 * call.inputs["latent"].shape[2] if "latent" in call.inputs else 0, 64, 64)),
    }  # fmt: skip
    name, shape = shapes[call.program]
    return {name: torch.zeros(shape)}


@pytest.mark.parametrize("task", list(REEL_TINY_TASKS))
def test_the_calls_of_a_request_are_those_of_its_real_pipeline(lab, task):
    defaults = SPEC.settings.defaults[task]
    picture = np.zeros((64, 64, 3), np.uint8) if task == "animate_sticker" else None
    request = make_request(task=task, width=64, height=64, frames=defaults.frames, scale=defaults.scale, steps=3, image=picture)
    pipeline, asked, answers = PIPELINES[task](job_for(request, SPEC.settings), PipelineState()), [], None
    try:
        while True:
            batch = pipeline.send(answers)
            asked.append(tuple((("reel-tiny", *call.key), call.rows) for call in batch))
            answers = tuple(zeros(call) for call in batch)
    except StopIteration:
        assert lab.costs.rounds(task, 3) == tuple(asked)


def test_the_shapes_written_out_for_reel_tiny_are_the_models():
    with empty_weights():
        module = ReelTiny()
    assert {f"{p.name}/{profile.name}": profile.max_batch for p in programs(module) for profile in p.profiles} == REEL_TINY_ROWS
    assert set(REEL_TINY_TASKS) == set(SPEC.settings.tasks)


def test_the_menus_of_reel_tiny_have_the_steps_of_the_solvers_that_its_choices_name(lab):
    fits = [json.loads(file.read_text())["fit"] for file in SPEC.fitted]
    fitted = {fit["solver"]: fit["steps"] for fit in fits}
    for task, shape in lab.costs.tasks.items():
        menu = SPEC.settings.defaults[task].menu
        assert shape.menu == {quality: choice.steps or fitted[choice.solver] for quality, choice in menu.items()}


def test_a_task_takes_branches_and_steps_from_the_models_defaults():
    choice = Choice(solver="ab2", steps=5, forwards=10.0, psnr_db=40.0, ssim=0.9, frechet=None, command="by hand")
    guided = Defaults("ab2", "linear", 9, 3.0, 8, 8.0, menu={"draft": choice})
    assert shape_of(guided, "video", False) == Task("video", 2, False, 9, {"draft": 5})
    assert shape_of(replace(guided, scale=1.0), "video", True) == Task("video", 1, True, 9, {"draft": 10})


def test_costs_are_on_lines_between_points_and_in_pieces_above_a_full_batch():
    points = (Point(2, 1.0, "measured: x"), Point(4, 2.0, "measured: x"))
    assert [along(points, rows) for rows in (1, 2, 3, 4, 6)] == [1.0, 1.0, 1.5, 2.0, 3.0]
    assert along(points[:1], 6) == 3.0
    costs = Costs("m", "s", {"denoise/any": 4}, {"denoise/any": points}, {})
    assert costs.seconds(KEY, 11) == pytest.approx(2.0 + 2.0 + 1.5)
    assert [line for line in costs.origins() if "assumed" in line] == [
        "denoise/any, between 2 and 4 rows: on a line, assumed: not measured",
        "denoise/any, below 2 rows: as much as those, assumed: not measured",
    ]


def test_a_file_of_costs_says_the_same_and_a_bad_one_is_refused(lab, tmp_path):
    costs, file = lab.costs, tmp_path / "costs.json"
    programs = {name: {"max_rows": costs.max_rows[name], "points": [[p.rows, p.seconds, p.source] for p in points]} for name, points in costs.points.items()}
    data = {"model": "reel-tiny", "sku": "cpu", "programs": programs, "tasks": {name: vars(task) for name, task in costs.tasks.items()}}
    file.write_text(json.dumps(data))
    assert read_costs(file) == costs
    programs["denoise/video"]["points"][0][2] = "guessed"
    file.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="begins with 'measured: ' or 'assumed: '"):
        read_costs(file)
    with pytest.raises(ConfigError, match="for which there are no costs"):
        replace(costs, tasks={"t": Task("huge", 1, False, 1, {})})
    with pytest.raises(NotFound, match="unknown task 'sing'; known: animate_sticker"):
        costs.rounds("sing", 1)


def test_bursts_keep_the_mean_and_have_their_factor():
    burst = Burst(4.0, every_s=10.0, length_s=2.0)
    times = np.array([burst.when(k / 100, 3.0) for k in range(30 * 100 * 5)])
    assert np.all(np.diff(times) > 0)
    assert times[-1] == pytest.approx(50, rel=1e-3)
    inside = np.mean(times % 10 < 2)
    assert (inside / 2) / ((1 - inside) / 8) == pytest.approx(4, rel=1e-2)
    with pytest.raises(ConfigError, match="lies between 0 and every_s"):
        Burst(2.0, 1.0, 1.0)


def test_a_trace_is_poisson_the_same_at_every_rate_and_survives_its_file(tmp_path):
    kinds = [Kind("a", 2, ""), Kind("b", 4, "draft")]
    slow, fast = (traces.draw(4000, rate, kinds, lambda task, steps: float(steps), (2.0, 3.0), None, 7) for rate in (1.0, 10.0))
    assert [each.arrival_s / 10 for each in slow] == pytest.approx([each.arrival_s for each in fast])
    assert [replace(each, arrival_s=0) for each in slow] == [replace(each, arrival_s=0) for each in fast]
    gaps = np.diff([each.arrival_s for each in slow])
    assert (gaps.mean(), gaps.std(), np.mean(gaps > 1)) == pytest.approx((1, 1, math.exp(-1)), rel=0.06)  # of an exponential; 4 standard errors
    assert all(2 * each.steps <= each.deadline_s <= 3 * each.steps for each in slow)
    file = tmp_path / "deep" / "trace.jsonl"
    traces.write(file, slow)
    assert traces.read(file) == slow
    for line, words in (('{"arrival_s": 0}', ":1: .*a line is a JSON object with"), ('{"arrival_s": 0, "task": "t", "steps": 0}', "steps of 1 or more")):
        file.write_text(line)
        with pytest.raises(ConfigError, match=words):
            traces.read(file)


def test_a_report_counts_what_was_in_time_over_all_that_came():
    ended = [
        Answered(0.0, 1.0, "finished", True),
        Answered(1.0, 4.0, "finished", False),
        Answered(2.0, 3.0, "expired", False),
        Answered(0.0, 2.0, "finished", True),
    ]
    row = served(ended)
    assert (row["goodput_per_s"], row["attainment"], row["late"], row["expired"], row["refused"]) == (0.5, 0.5, 1, 1, 0)
    assert (row["p50_s"], row["p95_s"]) == pytest.approx((2.0, 2.9))  # of 1, 2, 3
    assert served(ended[2:3])["p50_s"] is None


def test_the_command_prints_what_it_assumes_and_writes_rows_plot_and_trace(tmp_path, capsys, monkeypatch):
    file, plot, trace = tmp_path / "rows.json", tmp_path / "plot.png", tmp_path / "trace.jsonl"
    command = ["--requests", "60", "--loads", "0.5", "--fleets", "1", "2", "--replicas", "2", "--mtbf", "2", "--repair", "1", "--notice", "0.1"]
    main([*command, "--json", str(file), "--plot", str(plot), "--record", str(trace)])
    written = json.loads(file.read_text())
    assert [row["policy"] for row in written["rows"]] == list(POLICIES)
    assert [row["replicas"] for row in written["policies over replicas"]] == [1] * 4 + [2] * 4
    assert [row["saved_every"] for row in written["scheduler while replicas die"]] == [0, 1, 4]
    assert any("assumed: not measured" in line for line in written["costs"])
    assert "the engine gives each batch to the replica that has waited longest" in capsys.readouterr().out
    assert plot.read_bytes().startswith(b"\x89PNG")
    main(["--trace", str(trace), "--fleets", "2", "--json", str(file), "--checkpoints", "1"])
    again = json.loads(file.read_text())["rows"]
    assert again == written["policies over replicas"][4:], "a recorded trace gives the run that it was recorded from"
    with pytest.raises(ConfigError, match="so --requests, --burst would change nothing"):
        main(["--trace", str(trace), "--requests", "9", "--burst", "2", "9", "3"])
    with pytest.raises(NotFound, match="unknown policy 'luck'; known: batching"):
        main(["--policies", "luck"])
    monkeypatch.setattr(Lab, "simulate", lambda *_: pytest.fail("it was simulated"))
    with pytest.raises(ConfigError, match=r"a plot 'plot\.zzz'; its name ends in one of"):
        main(["--plot", "plot.zzz"])
    with pytest.raises(ConfigError, match="between_s is above 0"):
        main(["--mtbf", "0"])


def test_the_same_trace_is_sent_to_a_live_server_at_its_times(tmp_path):
    arrivals = [
        Arrival(0.0, "text_to_video", 3), Arrival(0.1, "text_to_image", 2), Arrival(0.2, "text_to_video", 6, "draft", 30.0), Arrival(0.3, "animate_sticker", 2),
    ]  # fmt: skip
    with serving() as running:
        answered = live(running.address, "fake", arrivals)
        assert [(each.task, each.steps) for each in running.engine.requests] == [(each.task, each.steps) for each in arrivals]
    assert [each.outcome for each in answered] == ["finished"] * 4
    assert all(sent.arrival_s >= arrival.arrival_s for sent, arrival in zip(answered, arrivals, strict=True))
    assert served(answered)["attainment"] == 1
    with pytest.raises(ConfigError, match="1 arrivals have a priority"):
        live("localhost:1", "fake", [Arrival(0.0, "text_to_video", 1, priority=2)])
    traces.write(tmp_path / "one.jsonl", [Arrival(0.0, "text_to_video", 1)])
    with pytest.raises(Unavailable, match="all 1 requests to localhost:1 failed"):
        main(["--trace", str(tmp_path / "one.jsonl"), "--live", "localhost:1"])
