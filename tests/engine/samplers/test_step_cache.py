"""Step caches against the papers' loops written out, against diffusers, and over all rules: options, ends of the run, fresh pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import CacheMixin, FirstBlockCacheConfig
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from torch import nn

from reelstep.engine.samplers.ns import drive
from reelstep.engine.samplers.step_cache import PIECES, STEP_CACHES, CacheOptions, relative_change, whole
from reelstep.errors import ConfigError, NotFound

N = 14
WIDTH = 6


class Block(nn.Module):
    """Of a toy transformer whose text and time are constants of a run's evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return hidden_states + torch.tanh(self.linear(hidden_states + context))


class Net(nn.Module):
    """x, modulation, context -> velocity, whole and in pieces; it notes the programs that ran."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.into, self.out = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.ran: list[str] = []

    def forward(self, x: torch.Tensor, modulation: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        hidden = self.into(x)
        for block in self.blocks:
            hidden = block(hidden, context + modulation)
        return self.out(hidden)

    def run(self, program, inputs):
        self.ran.append(program)
        if program == "denoise":
            return {"velocity": self(inputs["x"], inputs["modulation"], inputs["context"])}
        if program == "denoise_embed":
            hidden = self.into(inputs["x"])
            return {"hidden": hidden, "signal": hidden * (1 + inputs["modulation"])}
        if program == "denoise_last":
            return {"velocity": self.out(inputs["hidden"] + inputs["residual"])}
        hidden, at = inputs["hidden"], inputs["context"] + inputs["modulation"]
        if program == "denoise_first":
            return {"hidden": self.blocks[0](hidden, at)}
        for block in self.blocks[1:]:
            hidden = block(hidden, at)
        return {"residual": hidden - inputs["hidden"], "velocity": self.out(hidden)}


def points(seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """N evaluations along a path whose speed changes, so that some are near to the one before and some are not."""
    generator = torch.Generator().manual_seed(seed)
    x, away, context = (torch.randn(1, 5, 3 if k < 2 else WIDTH, generator=generator).double() for k in range(3))
    times = np.cumsum(np.where(np.arange(N) % 5 < 3, 0.02, 0.3))
    return [{"x": x + t * away, "modulation": torch.full((1, 1, WIDTH), 0.2 * t).double(), "context": context} for t in times]


def run(net, rule, inputs, branches=1):
    """Velocities, and which evaluations were skipped."""
    memory, velocities, cached = None, [], []
    for index, each in enumerate(inputs):
        velocity, memory, skipped = drive(rule.evaluate(each, index, branches, memory), net.run)
        velocities.append(velocity)
        cached.append(skipped)
    return torch.cat(velocities), cached


def change(before, now):
    return np.abs(now - before).mean() / np.abs(before).mean()


@torch.no_grad()
def teacache_by_hand(net, inputs, threshold, coefficients, first, last):
    """The paper's loop on numpy arrays, with numpy's polynomial."""
    polynomial = np.poly1d(coefficients[::-1])
    velocities, cached, distance = [], [], 0.0
    signal_before = residual = None
    for index, each in enumerate(inputs):
        embedded = net.into(each["x"])
        signal = (embedded * (1 + each["modulation"])).numpy()
        if signal_before is not None:
            distance += max(polynomial(change(signal_before, signal)), 0)
        signal_before = signal
        skip = first <= index < N - last and distance < threshold
        if skip:
            hidden = embedded.numpy() + residual
        else:
            hidden = embedded
            for block in net.blocks:
                hidden = block(hidden, each["context"] + each["modulation"])
            hidden, distance = hidden.numpy(), 0.0
            residual = hidden - embedded.numpy()
        velocities.append(net.out(torch.from_numpy(hidden)).numpy())
        cached.append(skip)
    return np.concatenate(velocities), cached


@pytest.mark.parametrize(
    ("threshold", "coefficients", "first", "last"),
    [(0.1, (0, 1, 0, 0, 0), 1, 1), (0.3, (0.01, 0.5, 2.0, -1.0, 3.0), 1, 0), (0.3, (-0.02, 1, 0, 0, 0), 4, 3), (1e-9, (0, 1, 0, 0, 0), 1, 1)],
)
@torch.no_grad()
def test_teacache_is_the_papers_loop(threshold, coefficients, first, last):
    net, inputs = Net().double(), points()
    options = {"threshold": threshold, "first": first, "last": last, **{f"c{k}": c for k, c in enumerate(coefficients)}}
    got, cached = run(net, STEP_CACHES["teacache"].build(N, False, options), inputs)
    expected, skipped = teacache_by_hand(net, inputs, threshold, coefficients, first, last)
    assert cached == skipped
    assert threshold < 1e-6 or 0 < sum(skipped) < N - first - last, "a threshold that decides"
    assert np.allclose(got.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def _known_to_diffusers():
    TransformerBlockRegistry.register(Block, TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None))


@pytest.mark.parametrize("threshold", [0.02, 0.05, 0.2, 0.5])
@pytest.mark.usefixtures("_known_to_diffusers")
@torch.no_grad()
def test_first_block_is_that_of_diffusers(threshold):
    class Hooked(Net, CacheMixin):
        """Its hooks find `blocks` by that name."""

    inputs, net, hooked = points(), Net().double(), Hooked().double()
    rule = STEP_CACHES["first_block"].build(N, False, {"threshold": threshold, "last": 0})
    got, cached = run(net, rule, inputs)
    hooked.enable_cache(FirstBlockCacheConfig(threshold))
    with hooked.cache_context("one branch"):
        expected = torch.cat([hooked(**each) for each in inputs])
    assert 0 < sum(cached) < N
    assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", list(STEP_CACHES))
@torch.no_grad()
def test_a_cache_that_never_skips_gives_the_bits_of_the_whole_network(name):
    net, inputs = Net(), [{key: value.float() for key, value in each.items()} for each in points()]
    got, cached = run(net, STEP_CACHES[name].build(N, False, {"threshold": 1e-30}), inputs)
    expected = torch.cat([drive(whole(each), net.run).velocity for each in inputs])
    assert sum(cached) == 0
    assert set(net.ran) == {"denoise", "denoise_embed", "denoise_first", "denoise_rest"}
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", list(STEP_CACHES))
@torch.no_grad()
def test_where_nothing_changes_every_evaluation_between_the_ends_is_skipped_and_exact(name):
    net, inputs = Net().double(), points()[:1] * N
    got, cached = run(net, STEP_CACHES[name].build(N, False, {"threshold": 0.01, "first": 2, "last": 3}), inputs)
    assert cached == [False] * 2 + [True] * (N - 5) + [False] * 3
    assert torch.allclose(got, net(**inputs[0]).expand_as(got), rtol=1e-12)
    assert net.ran.count("denoise") == 4, "the first, to which nothing is compared, and the last, which nothing reuses"
    assert net.ran.count("denoise_rest") == 1
    assert (net.ran.count("denoise_first") == 1) == (name == "teacache"), "only the first-block cache pays for the first block where it skips"


@pytest.mark.parametrize("name", list(STEP_CACHES))
@torch.no_grad()
def test_branches_that_are_measured_against_each_other_are_fresh_and_one_alone_is_not(name):
    inputs = points()[:1] * N
    measured, free = (STEP_CACHES[name].build(N, fresh, {"threshold": 0.01}) for fresh in (True, False))
    assert [sum(run(Net().double(), rule, inputs, branches)[1]) for rule, branches in ((measured, 2), (measured, 1), (free, 2))] == [0, N - 2, N - 2]


@pytest.mark.parametrize("name", list(STEP_CACHES))
@torch.no_grad()
def test_signals_that_are_not_finite_never_skip(name):
    net, inputs = Net().double(), points()[:1] * N
    broken = [{**each, "x": each["x"] * (math.nan if k == 5 else 1)} for k, each in enumerate(inputs)]
    _, cached = run(net, STEP_CACHES[name].build(N, False, {"threshold": 10.0}), broken)
    assert not cached[5]
    assert not cached[6], "nothing is near to a memory of NaN"


@pytest.mark.parametrize("name", list(STEP_CACHES))
def test_threshold_0_is_no_cache(name):
    assert STEP_CACHES[name].build(N, False, {"threshold": 0.0}) is None


@pytest.mark.parametrize("name", list(STEP_CACHES))
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"treshold": 0.1}, NotFound, r"unknown option of step cache .* 'treshold'; known: .*threshold"),
        ({"threshold": -0.1}, ConfigError, "is -0.1; 0 to 10"),
        ({"threshold": math.nan}, ConfigError, "is nan"),
        ({"first": 0.0}, ConfigError, "'first' .* 1 to 1000"),
        ({"last": -1.0}, ConfigError, "'last' .* 0 to 1000"),
        ({"first": 7, "last": 7}, ConfigError, "first 7 and the last 7 evaluations in any case, and there are 14; take more steps"),
    ],
)
def test_options_that_a_rule_does_not_take_are_refused(name, options, error, message):
    with pytest.raises(error, match=message):
        STEP_CACHES[name].build(N, False, options)


@pytest.mark.parametrize("name", list(STEP_CACHES))
@pytest.mark.parametrize("evaluations", [1, 2])
def test_too_few_steps_to_skip_any_are_refused(name, evaluations):
    with pytest.raises(ConfigError, match=rf"there are {evaluations}; take more steps"):
        STEP_CACHES[name].build(evaluations, False, {})


def test_a_relative_change_is_that_of_each_row():
    before, now = torch.tensor([[1.0, -3.0], [2.0, 2.0]]), torch.tensor([[2.0, -3.0], [2.0, 0.0]])
    assert relative_change(before, now).tolist() == [0.25, 0.5]


def test_calibrated_options_are_those_of_their_rule():
    assert CacheOptions.from_json(CacheOptions("first_block", {"threshold": 0.2}).to_json()).options == {"threshold": 0.2}
    for rule, options in (("gone", {}), ("first_block", {"c1": 2.0})):
        with pytest.raises(NotFound):
            CacheOptions(rule, options)
    with pytest.raises(ConfigError):
        CacheOptions("teacache", {"threshold": 11.0})


def test_the_pieces_are_what_the_rules_ask_for():
    net = Net()
    for name in STEP_CACHES:
        with torch.no_grad():
            run(net, STEP_CACHES[name].build(N, False, {"threshold": 0.1}), [{key: value.float() for key, value in each.items()} for each in points()])
    assert {*net.ran} == {"denoise", *PIECES}
