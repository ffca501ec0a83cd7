"""LinearAG: exact where the theory says so, its estimates fed back, its fit least squares; what it costs and what it keeps."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from reelstep.engine.samplers.guidance import GUIDANCE, GuidanceState, guided
from reelstep.engine.samplers.linear_ag import LinearAG, alternate
from reelstep.engine.samplers.ns import drive, sample, start
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.schedules import linear
from reelstep.engine.samplers.tables import SOLVERS
from reelstep.errors import ConfigError
from reelstep.training.adaptive_guidance import full_guidance
from reelstep.training.linear_ag import fit_linear_ag

SCALE, STD, DIM = 7.5, 0.6, 32  # of the Gaussians of four classes, and of the one of no class
RANDOM = np.random.default_rng(0)
MEANS, MEAN = torch.from_numpy(RANDOM.standard_normal((4, DIM))), torch.from_numpy(RANDOM.standard_normal(DIM))


def predictions(mean, x, t, path):
    """Velocity and noise expected at x if data are N(mean, STD^2)."""
    p = path.at(t)
    off = (x - p.alpha * mean) / (p.alpha**2 * STD**2 + p.sigma**2)
    data, noise = mean + p.alpha * STD**2 * off, p.sigma * off
    return p.d_alpha * data + p.d_sigma * noise, noise


def gaussians(path="condot"):
    """Path k asks for class k mod 4."""

    def networks(index):
        means = {"text": MEANS[index % 4], "null": MEAN}
        return lambda x, t, branches: tuple(predictions(means[b], x, t, PATHS[path])[0] for b in branches)

    return networks


def twenty(solver, path="condot"):
    """A table of 20 evaluations."""
    return SOLVERS[solver].build(linear(20 // SOLVERS[solver].evaluations), PATHS[path])


def noises(count, seed):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, DIM)))


def run(rule, table, noise, network):
    state = GuidanceState()
    return drive(guided(sample(table, start(table, noise)), rule, state), network), state


def made(policy, text, null, table="hash"):
    return LinearAG(policy, text, null, SCALE, table, 0.0, 1, (1.0,) * len(policy))


def hand_made(policy, seed=3):
    """Random coefficients."""
    draw, n = np.random.default_rng(seed), len(policy)
    return made(policy, ((), *(tuple(draw.standard_normal(j + 1)) for j in range(1, n))), tuple(tuple(draw.standard_normal(j)) for j in range(n)))


def from_the_first(policy, ratios, table="hash"):
    """null[j] = text[j] + ratios[j] (null[0] - text[0])."""
    n = len(policy)
    text = ((), *((-ratios[j], *(0.0,) * (j - 1), 1.0) for j in range(1, n)))
    return made(policy, text, tuple((ratios[j], *(0.0,) * (j - 1)) if j else () for j in range(n)), table)


def evaluations(rule, outputs, dtype=torch.float64):
    """The velocities of a rule that is handed (text, null) evaluation by evaluation, the branches it asked for, and the names it kept."""
    state, velocities, asked, kept = GuidanceState(), [], [], []
    for text, null in outputs:
        velocity = rule(torch.zeros(text.shape, dtype=dtype), 0.0, state)
        query = next(velocity)
        with pytest.raises(StopIteration) as done:
            velocity.send((text, null)[: len(query.branches)])
        state.nfe += 1
        velocities.append(done.value.value)
        asked.append(query.branches)
        kept.append(set(state.memory))
    return velocities, asked, kept


def random_outputs(n, seed=4):
    return list(torch.from_numpy(np.random.default_rng(seed).standard_normal((n, 2, 3, 5))).unbind(0))


def test_the_papers_policy_computes_every_other_of_the_first_half():
    assert alternate(20) == "CL" * 5 + "L" * 10
    assert [alternate(n) for n in (1, 2, 3, 5)] == ["C", "CL", "CLL", "CLCLL"]
    assert alternate(6) == "CLCLLL"


@pytest.fixture(scope="module")
def fitted():
    """By solver, the fit to 200 paths."""
    return {solver: fit_linear_ag(gaussians(), twenty(solver), SCALE, noises(200, 1), ridge=0.0, rows=64) for solver in ("euler", "heun", "dpmpp_2m")}


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m"])
def test_gaussians_of_one_spread_are_estimated_exactly_and_sampled_as_by_cfg_with_25_forwards(solver, fitted):
    fit, table, noise = fitted[solver], twenty(solver), noises(40, 2)
    network = gaussians()(torch.arange(40))
    want, seen = full_guidance(network, table, PATHS["condot"], SCALE, noise, lambda x, t, text, null: torch.stack([text, null]))
    text, null = torch.stack(seen, 1).unbind(0)  # [n, 40, DIM]
    for j in range(1, 20):
        estimate = torch.tensordot(torch.tensor(fit.beta_text[j], dtype=torch.float64), text[: j + 1], 1)
        estimate += torch.tensordot(torch.tensor(fit.beta_null[j], dtype=torch.float64), null[:j], 1)
        assert float((estimate - null[j]).norm() / null[j].norm()) <= 1e-12
    assert min(fit.r2) > 1 - 1e-12
    got, state = run(fit.rule(), table, noise, network)
    assert float((got - want).abs().max()) <= 1e-9
    assert (state.nfe, state.forwards, fit.forwards, state.memory) == (20, 25, 25, {})


def test_another_policy_needs_no_other_fit(fitted):
    table, noise, network = twenty("euler"), noises(8, 2), gaussians()(torch.arange(8))
    want, _ = run(GUIDANCE["cfg"].build(SCALE, PATHS["condot"], {}), table, noise, network)
    got, state = run(replace(fitted["euler"], policy="C" + 19 * "L").rule(), table, noise, network)
    assert float((got - want).abs().max()) <= 1e-9
    assert state.forwards == 21
    got, state = run(replace(fitted["euler"], policy=20 * "C").rule(), table, noise, network)
    assert torch.equal(got, want), "computed throughout, it is CFG bit for bit"
    assert (state.forwards, state.memory) == (40, {})


def test_the_closed_form_of_velocities_samples_as_cfg():
    """Velocities of straight lines differ by (1 - t) / (t^2 c^2 + (1 - t)^2) of the means' difference."""
    table, noise, network = twenty("euler"), noises(8, 2), gaussians()(torch.arange(8))
    differences = [(1 - t) / (t**2 * STD**2 + (1 - t) ** 2) for t in table.times[:20]]
    want, _ = run(GUIDANCE["cfg"].build(SCALE, PATHS["condot"], {}), table, noise, network)
    got, state = run(from_the_first(alternate(20), [d / differences[0] for d in differences]).rule(), table, noise, network)
    assert float((got - want).abs().max()) <= 1e-9
    assert state.forwards == 25


def test_the_closed_form_of_noises_holds_at_any_states():
    """eps_null - eps_text = m (mu_text - mu_null), m = alpha sigma / (alpha^2 c^2 + sigma^2); on VP, where m is not 0 at t = 0."""
    path, times = PATHS["vp"], linear(20)[:20]
    points = [path.at(t) for t in times]
    m = [p.alpha * p.sigma / (p.alpha**2 * STD**2 + p.sigma**2) for p in points]
    outputs = [tuple(predictions(mean, noises(4, 50 + j), t, path)[1] for mean in (MEANS, MEAN)) for j, t in enumerate(times)]
    velocities, asked, _ = evaluations(from_the_first("C" + 19 * "L", [each / m[0] for each in m]).rule(), outputs)
    assert asked == [("text", "null")] + 19 * [("text",)]
    for u, (text, null) in zip(velocities, outputs, strict=True):
        estimate = (SCALE * text - u) / (SCALE - 1)
        assert float((estimate - null).norm() / null.norm()) <= 1e-12


def test_estimates_stand_for_null_velocities_in_later_estimates():
    """Against the recursion written out in numpy, whose past is what was computed or estimated and never another."""
    policy, outputs = "CLCLLL", random_outputs(6)
    fit, texts, nulls = hand_made(policy), [], []
    velocities, asked, _ = evaluations(fit.rule(), outputs)
    assert [len(branches) for branches in asked] == [2, 1, 2, 1, 1, 1]
    for j, (text, null) in enumerate(outputs):
        texts.append(text.numpy())
        estimate = sum(b * v for b, v in zip((*fit.beta_text[j], *fit.beta_null[j]), (*texts, *nulls), strict=True)) if policy[j] == "L" else null.numpy()
        nulls.append(estimate)
        np.testing.assert_allclose(velocities[j].numpy(), estimate + SCALE * (texts[j] - estimate), rtol=1e-12, atol=1e-12)


def test_only_outputs_that_a_later_estimate_needs_are_kept():
    fit = from_the_first("CLCL", [1.0, 0.5, 0.25, 0.125])
    assert evaluations(fit.rule(), random_outputs(4))[2] == [{"text0", "null0"}, {"text0", "null0"}, {"text0", "null0"}, set()]
    all_kept = [{f"{b}{i}" for b in ("text", "null") for i in range(j + 1)} for j in range(3)]
    assert evaluations(hand_made("CLCL").rule(), random_outputs(4))[2] == [*all_kept, set()]
    assert evaluations(hand_made("CLCC").rule(), random_outputs(4))[2] == [{"text0", "null0"}, set(), set(), set()]


@pytest.mark.parametrize("stop", range(12))
def test_a_run_saved_at_any_query_continues_bit_for_bit(stop, interrupted):
    table = SOLVERS["heun"].build(linear(6), PATHS["condot"])
    noise, rule = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)), hand_made("CLLCLCCLLLCL").rule()

    def network(x, t, branches):
        return tuple(torch.cos(2 * x) * (1 + t) if name == "text" else torch.sin(x) - t for name in branches)

    whole, counts = run(rule, table, noise, network)
    got, guidance = interrupted(table, noise, rule, network, stop)
    assert torch.equal(got, whole)
    assert guidance == counts


def test_a_held_difference_is_the_case_of_one_coefficient():
    """With ratio 1 to the first difference it is `delta_hold`, and CFG where the difference never changes."""
    table, noise = twenty("euler"), noises(3, 5)

    def network(x, t, branches):
        return tuple(torch.cos(2 * x) * (1 + t) - (0.5 if name == "null" else 0) for name in branches)

    linear_ag, state = run(from_the_first("C" + 19 * "L", [1.0] * 20).rule(), table, noise, network)
    for rule in (GUIDANCE["delta_hold"].build(SCALE, PATHS["condot"], {"stop": 0.01}), GUIDANCE["cfg"].build(SCALE, PATHS["condot"], {})):
        assert float((run(rule, table, noise, network)[0] - linear_ag).abs().max()) <= 1e-12
    assert state.forwards == 21


def test_outputs_in_half_precision_are_combined_in_single():
    outputs = [tuple(v.bfloat16() for v in pair) for pair in random_outputs(2)]
    fit = made("CL", ((), (-1000.0, 1001.0)), ((), (999.5,)))
    (_, u), _, _ = evaluations(fit.rule(), outputs, torch.float32)
    (text0, null0), (text1, _) = [tuple(v.double() for v in pair) for pair in outputs]
    null1 = 1001 * text1 - 1000 * text0 + 999.5 * null0
    assert u.dtype == torch.float32
    assert float((u - (null1 + SCALE * (text1 - null1))).abs().max()) < 0.01, "bfloat16 would miss by tens"


def test_one_more_evaluation_than_the_policy_has_is_refused():
    with pytest.raises(ConfigError, match="a state of its own"):
        next(hand_made("CL").rule()(torch.zeros(1, 1), 0.5, GuidanceState(nfe=2)))


def test_it_is_for_its_own_table_and_scale_only(fitted):
    fit = fitted["euler"]
    fit.check(twenty("euler"), SCALE)
    for table, scale in ((twenty("dpmpp_2m"), SCALE), (SOLVERS["euler"].build(linear(10), PATHS["condot"]), SCALE), (twenty("euler"), 3.0)):
        with pytest.raises(ConfigError, match="fit it again"):
            fit.check(table, scale)


def test_json_keeps_every_bit(fitted):
    for fit in fitted.values():
        assert LinearAG.from_json(json.loads(json.dumps(fit.to_json()))) == fit


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"policy": "LC"}, "C first"),
        ({"policy": "CX"}, "letters C"),
        ({"policy": ""}, "letters C"),
        ({"policy": "CLL"}, "a policy of 3 evaluations"),
        ({"beta_text": [[], [1.0]]}, "0, 2, 3"),
        ({"beta_null": [[], []]}, "0, 2, 3"),
        ({"r2": [1.0]}, "1 r2"),
        ({"r2": [1.0, math.nan]}, "not finite"),
        ({"beta_null": [[], [math.inf]]}, "not finite"),
        ({"beta_null": [[], ["much"]]}, "not a number"),
        ({"beta_null": 1}, "not a number"),
        ({"scale": 1.0}, "a scale above 1"),
        ({"scale": math.inf}, "a scale above 1"),
        ({"ridge": -1.0}, "a ridge from 0"),
        ({"paths": 0}, "at least one path"),
        ({"table": ""}, "a table's hash"),
        ({"gamma": 1.0}, "has the fields"),
    ],
)
def test_a_damaged_artifact_is_refused(change, match):
    with pytest.raises(ConfigError, match=match):
        LinearAG.from_json({**made("CL", ((), (0.5, 0.5)), ((), (1.0,))).to_json(), **change})


def drawn(outputs, table):
    """Path k gives outputs[k] [n, 2, DIM], whatever its state."""

    def networks(index):
        return lambda x, t, branches: tuple(outputs[index, table.times.index(t), ("text", "null").index(b)] for b in branches)

    return networks


@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_the_fit_is_least_squares_over_all_outputs_of_all_paths_of_one_energy_each(ridge):
    table, paths = twenty("euler"), 30
    outputs = np.random.default_rng(7).standard_normal((paths, 20, 2, DIM)) + 0.5
    outputs *= np.geomspace(0.01, 100, paths)[:, None, None, None]
    heard = []
    networks = drawn(torch.from_numpy(outputs), table)
    fit = fit_linear_ag(networks, table, SCALE, torch.zeros(paths, DIM), ridge=ridge, rows=7, progress=lambda done, of: heard.append((done, of)))
    assert heard == [(7, 30), (14, 30), (21, 30), (28, 30), (30, 30)]
    assert sum(map(len, (*fit.beta_text, *fit.beta_null))) == 399
    outputs /= np.sqrt(np.square(outputs).sum((1, 2, 3), keepdims=True))
    columns = outputs.transpose(1, 2, 0, 3).reshape(20, 2, -1)
    for j in range(1, 20):
        known, target = np.concatenate([columns[: j + 1, 0], columns[:j, 1]]).T, columns[j, 1]
        damping = np.sqrt(ridge * np.square(known).sum(0).mean()) * np.eye(known.shape[1])
        beta = np.linalg.lstsq(np.concatenate([known, damping]), np.concatenate([target, np.zeros(len(damping))]), rcond=None)[0]
        np.testing.assert_allclose((*fit.beta_text[j], *fit.beta_null[j]), beta, rtol=0, atol=1e-8)
        assert fit.r2[j] == pytest.approx(1 - np.square(target - known @ beta).sum() / np.square(target).sum(), abs=1e-10)
    assert fit.largest == max(abs(b) for row in (*fit.beta_text, *fit.beta_null) for b in row)


def test_a_ridge_keeps_coefficients_small_where_outputs_are_almost_the_same():
    table = twenty("euler")
    outputs = np.random.default_rng(8).standard_normal((30, 1, 2, DIM)) + 1e-4 * np.random.default_rng(9).standard_normal((30, 20, 2, DIM))
    outputs[:, :, 1] += 100 * np.cumsum(outputs - outputs[:, :1], axis=1)[:, :, 0]
    free, damped = (fit_linear_ag(drawn(torch.from_numpy(outputs), table), table, SCALE, torch.zeros(30, DIM), ridge=r) for r in (0.0, 1e-4))
    assert free.largest > 20 * damped.largest
    assert min(damped.r2) > 0.99
