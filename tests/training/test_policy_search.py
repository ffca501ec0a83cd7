"""The search for a policy of guidance, against all policies there are and against closed forms."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch

from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.schedules import linear
from reelstep.engine.samplers.tables import SOLVERS
from reelstep.errors import ConfigError
from reelstep.training import checkpoint
from reelstep.training.field import Pairs
from reelstep.training.policy_search import Options, likeliest, neighbours, option_scales, probabilities, relaxed_ends, search

SCALE, STD = 3.0, 0.3
MEANS = {"text": np.array([[2.0, 0.0], [-2.0, 0.5]]), "null": np.array([[2.0, 0.0], [-2.0, 0.5], [0.0, 2.0], [0.0, -2.0]])}


def velocity(x, t, means):
    """Gaussians on straight lines, in closed form. x [B, 2]."""
    s = 1 - t
    variance = t**2 * STD**2 + s**2
    off = x[:, None] - t * means
    weight = np.exp(-np.square(off).sum(-1) / (2 * variance))
    weight /= weight.sum(1, keepdims=True)
    return (weight[..., None] * (means + (t * STD**2 - s) / variance * off)).sum(1)


def torch_velocity(x, t, means):
    """The same with a gradient."""
    s = 1 - t
    variance = t**2 * STD**2 + s**2
    off = x[:, None] - t * torch.from_numpy(means)
    weight = torch.softmax(-off.square().sum(-1) / (2 * variance), 1)
    return (weight[..., None] * (torch.from_numpy(means) + (t * STD**2 - s) / variance * off)).sum(1)


def alike_from(time):
    """Networks whose branches are one from `time` on."""

    def network(x, t, branches):
        return tuple(torch_velocity(x, t, MEANS["text" if t >= time else b]) for b in branches)

    return lambda index: network


def euler(noise, scales):
    """Ends of Euler's method for policies `scales` [K, n], all from `noise` [P, 2]: [K, P, 2]."""
    n, x = scales.shape[1], np.tile(noise, (len(scales), 1))
    for j in range(n):
        text, null = (velocity(x, j / n, MEANS[b]) for b in ("text", "null"))
        x = x + (null + np.repeat(scales[:, j], len(noise))[:, None] * (text - null)) / n
    return x.reshape(len(scales), *noise.shape)


def pairs(n, count=48, networks=None):
    """Noises and the ends of full guidance by Euler's method."""
    noise = np.random.default_rng(0).standard_normal((count, 2))
    if networks is None:
        return Pairs(torch.from_numpy(noise), torch.from_numpy(euler(noise, np.full((1, n), SCALE))[0]))
    x = torch.from_numpy(noise)
    for j in range(n):
        text, null = networks(None)(x, j / n, ("text", "null"))
        x = x + (null + SCALE * (text - null)) / n
    return Pairs(torch.from_numpy(noise), x)


def table(n):
    return SOLVERS["euler"].build(linear(n), PATHS["condot"])


def every_policy(n, scales, data):
    """All of them, what each costs, and its mean square error as a share of text alone's, a sample's share at least of a tenth of the mean."""
    policies = np.array(list(product(scales, repeat=n)))
    errors = np.square(euler(data.noise.numpy(), policies) - data.ends.numpy()).mean(2)
    unguided = np.square(euler(data.noise.numpy(), np.ones((1, n))) - data.ends.numpy()).mean(2)[0]
    return policies, np.where(np.isin(policies, (0, 1)), 1, 2).sum(1), (errors / np.maximum(unguided, unguided.mean() / 10)).mean(1)


@pytest.mark.parametrize(("n", "multiples", "budget"), [*((3, (1.0,), b) for b in (4, 5, 6)), *((5, (1.0, 2.0), b) for b in (6, 7, 9))])
def test_no_policy_of_the_budget_misses_much_less(n, multiples, budget):
    """Of 27 and of 1024 policies."""
    data = pairs(n)
    found = search(alike_from(1.0), table(n), SCALE, data, budget, Options(multiples, judges=48))
    policies, costs, missed = every_policy(n, found.scales, data)
    own = int(np.flatnonzero((policies == found.policy.scales).all(1))[0])
    assert found.policy.forwards == costs[own] <= budget
    assert found.missed == pytest.approx(missed[own], rel=1e-6, abs=1e-12)
    assert missed[own] <= 1.02 * missed[costs <= budget].min() + 1e-5
    assert missed[own] < np.quantile(missed[costs <= budget], 0.02) + 1e-5


@pytest.mark.parametrize(("budget", "trials"), [(12, 0), (16, 64)])
def test_where_the_branches_are_alike_from_a_time_on_the_prompts_velocity_is_taken_from_there(budget, trials):
    networks = alike_from(0.5)
    found = search(networks, table(8), SCALE, pairs(8, networks=networks), budget, Options(trials=trials))
    assert found.policy.scales == (SCALE,) * 4 + (1.0,) * 4
    assert (found.policy.forwards, found.missed) == (12, pytest.approx(0, abs=1e-20))


def test_without_a_bound_on_forwards_it_is_full_guidance():
    data = pairs(6)
    found = search(alike_from(1.0), table(6), SCALE, data, 12, Options(trials=0))
    assert found.policy.scales == found.likeliest.scales == (SCALE,) * 6
    assert (found.policy.forwards, found.missed) == (12, pytest.approx(0, abs=1e-20))
    assert found.losses[-1] < found.losses[0] / 10


def test_mixtures_that_look_like_full_guidance_are_no_policy():
    """One evaluation, end linear in the scale: text and twice the scale mix to full guidance in the mean, and each misses as much as nothing does."""
    one = table(1)
    costs, scales = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64), torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)
    noise, line = torch.zeros(2, 3, dtype=torch.float64), {"text": torch.ones(2, 3).double(), "null": torch.zeros(2, 3).double()}
    mixed = torch.tensor([[0.0, 0.5, 0.5]], dtype=torch.float64)
    ends = relaxed_ends(lambda x, t, branches: tuple(line[b] for b in branches), one, mixed, scales, noise, torch.tensor([[1.0], [-1.0]]))
    assert ends[:, 0].tolist() == [5.0, 1.0], "not twice 3, the mean"
    assert torch.equal(probabilities(mixed.log().clamp_min(-800), costs, 2.0), mixed)


def test_over_all_signs_relaxed_runs_miss_what_policies_drawn_from_the_weights_miss():
    """Exactly, where the end is linear in every scale: velocities that do not depend on the state."""
    draw = np.random.default_rng(3)
    n, scales = 3, np.array([0.0, 1.0, 1.5, 6.0])
    weights = draw.dirichlet(np.ones(4), n)
    outputs = {b: torch.from_numpy(draw.standard_normal((n, 2))) for b in ("text", "null")}
    target = draw.standard_normal(2)
    signs = torch.tensor(list(product((-1.0, 1.0), repeat=n)), dtype=torch.float64)

    def network(x, t, branches):
        return tuple(outputs[b][round(t * n)].expand_as(x) for b in branches)

    ends = relaxed_ends(network, table(n), torch.from_numpy(weights), torch.from_numpy(scales), torch.zeros(8, 2, dtype=torch.float64), signs)
    want = 0.0
    for choice in product(range(4), repeat=n):
        text, null = outputs["text"].numpy(), outputs["null"].numpy()
        end = sum((null[j] + scales[o] * (text[j] - null[j])) / n for j, o in enumerate(choice))
        want += math.prod(weights[j, o] for j, o in enumerate(choice)) * np.square(end - target).mean()
    assert np.square(ends.numpy() - target).mean() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("seed", range(2))
def test_probabilities_keep_the_budget_as_cheaply_as_that_goes_and_so_does_their_gradient(seed):
    draw = np.random.default_rng(seed)
    alpha = torch.from_numpy(3 * draw.standard_normal((5, 4))).requires_grad_()
    costs = torch.tensor([1.0, 1.0, 2.0, 2.0], dtype=torch.float64)
    plain = torch.softmax(alpha, 1).detach()
    spent = float((plain @ costs).sum())
    for budget in (5.01, (5 + spent) / 2, spent - 1e-3):
        weights = probabilities(alpha, costs, budget).detach()
        assert float((weights @ costs).sum()) == pytest.approx(budget, abs=1e-9)
        assert np.allclose(weights.sum(1), 1)
        price = (plain / weights).log()  # the same for all options of a cost, up to each evaluation's sum
        assert np.allclose(price[:, 3] - price[:, 0], price[0, 3] - price[0, 0])
        assert torch.autograd.gradcheck(lambda a, b=budget: probabilities(a, costs, b), alpha, atol=1e-6)
    assert torch.equal(probabilities(alpha, costs, spent + 1e-3).detach(), plain)


@pytest.mark.parametrize("seed", range(6))
def test_the_likeliest_policy_of_a_budget_is(seed):
    draw = np.random.default_rng(seed)
    weights, costs = draw.dirichlet(np.ones(4), 4), np.array([1, 1, 2, 2])
    for budget in (5, 6, 8):
        fits = [c for c in product(range(4), repeat=4) if costs[list(c)].sum() <= budget]
        want = max(fits, key=lambda c: math.prod(weights[j, o] for j, o in enumerate(c)))
        assert likeliest(torch.from_numpy(weights), torch.from_numpy(costs).double(), budget) == want


@pytest.mark.parametrize("budget", [6, 7])
def test_neighbours_differ_once_or_trade_a_forward_and_the_likeliest_comes_first(budget):
    weights, costs, own = np.random.default_rng(5).dirichlet(np.ones(3), 4), np.array([1, 1, 2]), (2, 0, 1, 2)

    def is_near(choice):
        changes = [costs[o] - costs[p] for o, p in zip(choice, own, strict=True) if o != p]
        return len(changes) == 1 or sorted(changes) == [-1, 1]

    want = {c for c in product(range(3), repeat=4) if is_near(c) and costs[list(c)].sum() <= budget}
    got = list(neighbours(own, torch.from_numpy(weights), torch.from_numpy(costs).double(), budget))
    assert len(got) == len(want)
    assert set(got) == want
    likelihoods = [math.prod(weights[j, o] for j, o in enumerate(c)) for c in got]
    assert likelihoods == pytest.approx(sorted(likelihoods, reverse=True))


def test_a_search_that_was_interrupted_finds_the_numbers_of_one_that_was_not(tmp_path):
    data, few = pairs(4), Options(iterations=8, save_every=2, batch=6, rows=4, trials=3)
    whole = search(alike_from(1.0), table(4), SCALE, data, 6, few)
    heard = []

    def stop(what, done, of, missed):
        heard.append((what, done, of))
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(alike_from(1.0), table(4), SCALE, data, 6, few, stop, tmp_path / "policy.pt")
    assert heard == [("search", done, 8) for done in range(1, 6)]
    assert len(checkpoint.load(tmp_path / "policy.pt")["losses"]) == 4
    assert search(alike_from(1.0), table(4), SCALE, data, 6, few, saved=tmp_path / "policy.pt") == whole
    assert len(whole.losses) == 8


def test_a_batch_in_pieces_is_the_batch():
    data = pairs(4)
    losses = [search(alike_from(1.0), table(4), SCALE, data, 6, Options(iterations=3, batch=10, rows=rows, trials=0)).losses for rows in (3, 10)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_a_search_that_diverges_ends_and_says_so():
    def network(x, t, branches):
        return tuple(torch_velocity(x, t, MEANS[b]) * (math.nan if torch.is_grad_enabled() else 1.0) for b in branches)

    found = search(lambda index: network, table(4), SCALE, pairs(4), 6, Options())
    assert "Try lower multiples" in found.note
    assert found.losses == ()
    assert found.policy.forwards <= 6


def test_what_leaves_nothing_to_choose_is_refused_before_any_run():
    def refuse(budget=6, scale=SCALE, **options):
        search(lambda index: pytest.fail("a network was asked"), table(4), scale, pairs(4), budget, Options(**options))

    for budget in (3, 4, 9):
        with pytest.raises(ConfigError, match="more than 4"):
            refuse(budget)
    with pytest.raises(ConfigError, match="the prompt's velocity alone"):
        refuse(scale=2.0, multiples=(0.5,))
    for multiples in ((), (0.0,), (-1.0, 1.0), (math.inf,), (math.nan,)):
        with pytest.raises(ConfigError, match="multiples"):
            refuse(multiples=multiples)
    for options in ({"iterations": 0}, {"batch": 0}, {"judges": 0}, {"trials": -1}):
        with pytest.raises(ConfigError, match="whole numbers"):
            refuse(**options)
    with pytest.raises(ConfigError, match="rate"):
        refuse(rate=0.0)


def test_half_of_scale_two_is_the_prompts_velocity_at_one_forward():
    assert option_scales(2.0, (0.5, 1.0)) == (0.0, 1.0, 2.0)
    assert option_scales(3.0, (2.0, 0.5, 1.0)) == (0.0, 1.0, 1.5, 3.0, 6.0)
