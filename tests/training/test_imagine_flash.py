"""Imagine Flash: the student's own states, both losses against closed forms, where gradients go, and students of one to three steps on the toy."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from reelstep.engine.samplers.convert import velocity_to_eps
from reelstep.engine.samplers.ns import drive, sample, start
from reelstep.engine.samplers.paths import PATHS
from reelstep.errors import ConfigError, NotFound
from reelstep.training import imagine_flash
from reelstep.training.imagine_flash import (
    Adversary,
    Options,
    StudentGrid,
    Teacher,
    Validation,
    backward_loss,
    backward_target,
    distil,
    energy_distance,
    shifted_loss,
    shifted_target,
    student_data,
    student_ends,
    student_state,
    teacher_ends,
)
from reelstep.training.trainer import weights

FOUR = torch.tensor([[2, 0], [-2, 0], [0, 2], [0, -2]], dtype=torch.float64)
ONE = torch.tensor([[1.5, -0.5]], dtype=torch.float64)
THIRDS = (0.0, 1 / 3, 2 / 3, 1.0)
VARIED = {0.0: 0.1, 1 / 3: 0.5, 2 / 3: 0.8}


def mixture(path, means, std):
    """The velocity of equally likely Gaussians in closed form, at t a number or a tensor."""

    def field(x, t):
        p = PATHS[path].at(t)
        variance = p.alpha**2 * std**2 + p.sigma**2
        off = x[:, None] - p.alpha * means.to(x)
        weight = torch.softmax(-off.square().sum(-1) / (2 * variance), dim=1)[..., None]
        data, noise = means.to(x) + p.alpha * std**2 / variance * off, p.sigma / variance * off
        return (weight * (p.d_alpha * data + p.d_sigma * noise)).sum(1)

    return field


def posterior(x, t, path, mean=ONE[0], std=0.6):
    """E[data | x] of one Gaussian, and its variance's factor alpha^2 std^2 + sigma^2."""
    p = PATHS[path].at(t)
    return mean + p.alpha * std**2 / (p.alpha**2 * std**2 + p.sigma**2) * (x - p.alpha * mean)


def network(field):
    """A teacher that heeds no condition."""
    return lambda x, t, branches: (field(x, t),) * len(branches)


def normal(seed, count=256):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((count, 2)))


def small_net(seed, width=64):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))


class Copy(nn.Module):
    """The four Gaussians' own velocity and an MLP that begins as 0: an untrained one is an exact copy of the teacher."""

    def __init__(self, path="condot", seed=0, width=64):
        super().__init__()
        self.teacher, self.net = mixture(path, FOUR, 0.3), small_net(seed, width)
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, x, t):
        return self.teacher(x, t) + self.net(torch.cat([x, t.expand(len(x), 1)], 1))


class Steps(nn.Module):
    """The velocity of one Gaussian and a number of each step times a curve of x: what a step's evaluation has to do with the loss shows in its number."""

    def __init__(self, grid, values=(0.3, -0.4, 0.5)):
        super().__init__()
        self.grid, self.teacher = grid, mixture(grid.path, ONE, 0.6)
        self.theta = nn.ParameterList(torch.tensor(v, dtype=torch.float64) for v in values)

    def forward(self, x, t):
        return self.teacher(x, t) + self.theta[self.grid.times.index(float(t))] * torch.sin(x)


LOSSES = {
    "backward": backward_loss,
    "shifted": partial(shifted_loss, eps=normal(5)),
}


@pytest.mark.parametrize("path", ["condot", "cosine", "vp"])
def test_the_state_is_that_of_the_run_stopped_there_bit_for_bit(path):
    grid = StudentGrid.midway(path, THIRDS)
    student, noise, seen = Steps(grid), normal(0), []
    end = drive(sample(grid.table, start(grid.table, noise)), lambda x, t: seen.append(x) or student(x, torch.tensor(t, dtype=x.dtype)))
    states = [student_state(student, grid, noise, step) for step in range(3)]
    assert all(torch.equal(p, q) and not p.requires_grad for p, q in zip(states, seen, strict=True))
    assert torch.equal(student_ends(student, grid, noise), end)
    torch.testing.assert_close(student_data(student, grid, states[-1], 2), end, rtol=0, atol=1e-12)  # where it ends


def test_on_flow_the_student_takes_euler_steps():
    grid = StudentGrid.midway("condot", THIRDS)
    student, noise = Steps(grid), normal(0)
    x = noise
    for step in range(3):
        torch.testing.assert_close(student_state(student, grid, noise, step), x, rtol=0, atol=1e-14)
        u = student(x, torch.tensor(THIRDS[step], dtype=x.dtype)).detach()
        torch.testing.assert_close(student_data(student, grid, x, step).detach(), x + (1 - THIRDS[step]) * u, rtol=0, atol=1e-14)
        x = x + u / 3


@pytest.mark.parametrize("path", ["condot", "cosine", "vp"])
def test_noise_correction_does_nothing_to_the_states_of_a_flow_student(path):
    plain, corrected = StudentGrid.midway(path, THIRDS), StudentGrid.midway(path, THIRDS, noise_correction=True)
    student, noise = Steps(plain), normal(0)
    before, after = (torch.stack([student_state(student, grid, noise, step) for step in range(3)]) for grid in (plain, corrected))
    if path == "vp":  # whose alpha is 0.0066 at t = 0
        p = PATHS[path].at(1 / 3)
        want = p.alpha * student_data(student, plain, noise, 0) + p.sigma * noise
        torch.testing.assert_close(after[1], want.detach(), rtol=0, atol=1e-13)
        assert (after[1] - before[1]).abs().max() > 1e-3
    else:
        torch.testing.assert_close(after, before, rtol=0, atol=1e-13)


@pytest.mark.parametrize("path", ["condot", "cosine", "vp"])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc", "deis", "euler", "ab2"])
def test_one_call_of_the_teacher_gives_its_predicted_data(path, solver):
    teacher, grid = Teacher(1, 1.0, solver), StudentGrid(path, THIRDS, VARIED)
    field, data, eps = network(mixture(path, ONE, 0.6)), normal(1), normal(2)
    for step, g in enumerate(VARIED.values()):
        p = PATHS[path].at(g)
        chi = p.alpha * data + p.sigma * eps
        torch.testing.assert_close(shifted_target(field, teacher, grid, data, eps, step), posterior(chi, g, path), rtol=0, atol=1e-12)
        torch.testing.assert_close(backward_target(field, teacher, grid, chi, step), posterior(chi, THIRDS[step], path), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("scale", "branches"), [(1.0, ("text",)), (3.0, ("text", "null"))])
def test_the_scale_is_baked_into_the_target(scale, branches):
    asked, means = [], {"text": FOUR[0], "null": FOUR[1] + 0.5}

    def guided(x, t, wanted):
        asked.append((t, wanted))
        return tuple(mixture("vp", means[name][None], 0.6)(x, t) for name in wanted)

    x = normal(1)
    text, null = (posterior(x, 0.4, "vp", mean) for mean in means.values())
    torch.testing.assert_close(Teacher(1, scale).data(guided, x, 0.4, PATHS["vp"]), null + scale * (text - null), rtol=0, atol=1e-12)
    asked.clear()
    Teacher(4, scale).data(guided, x, 0.2, PATHS["vp"])
    assert [wanted for _, wanted in asked] == [branches] * 4
    assert [t for t, _ in asked] == pytest.approx([0.2, 0.4, 0.6, 0.8])  # k calls at t, ..., the noise levels' last 1/k


@pytest.mark.parametrize("path", ["condot", "cosine", "vp"])
def test_without_a_shift_and_with_the_noise_that_the_student_predicts_the_losses_are_one(path):
    grid = StudentGrid(path, THIRDS, {t: t for t in THIRDS[:-1]})
    student, field, teacher, noise = Steps(grid), network(mixture(path, ONE, 0.6)), Teacher(3, 1.0), normal(0)
    for step, t in enumerate(THIRDS[:-1]):
        state = student_state(student, grid, noise, step)
        eps = velocity_to_eps(student(state, torch.tensor(t, dtype=torch.float64)).detach(), state, t, PATHS[path])
        values = [backward_loss(student, field, teacher, grid, noise, step), shifted_loss(student, field, teacher, grid, noise, step, eps)]
        slopes = [torch.autograd.grad(loss, student.theta[step])[0] for loss in values]
        assert values[0].item() == pytest.approx(values[1].item(), rel=1e-10)
        assert values[0].item() > 1e-4
        assert slopes[0].item() == pytest.approx(slopes[1].item(), rel=1e-8)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("path", ["condot", "vp"])
def test_the_gradient_is_that_of_the_last_evaluation_alone(name, path):
    grid = StudentGrid(path, THIRDS, VARIED)
    student, noise, teacher = Steps(grid), normal(0), Teacher(2, 1.0)
    mean = ONE.clone().requires_grad_()  # of the teacher, who learns nothing
    field = network(mixture(path, mean, 0.6))
    loss = LOSSES[name](student, field, teacher, grid, noise, 2)
    loss.backward()
    assert mean.grad is None
    assert [p.grad is not None for p in student.theta] == [False, False, True]

    state = student_state(student, grid, noise, 2)
    data = student_data(student, grid, state, 2).detach()
    targets = {"backward": lambda: backward_target(field, teacher, grid, state, 2), "shifted": lambda: shifted_target(field, teacher, grid, data, normal(5), 2)}
    target = targets[name]()

    def at(value):
        """The loss if only the number of the last step were another, its state and target fixed."""
        return (student_data(Steps(grid, (0.3, -0.4, value)), grid, state, 2) - target).square().mean().item()

    assert loss.item() == pytest.approx(at(0.5), rel=1e-12)
    assert student.theta[2].grad.item() == pytest.approx((at(0.5 + 1e-5) - at(0.5 - 1e-5)) / 2e-5, rel=1e-7)
    (slope,) = torch.autograd.grad(student_data(student, grid, state, 2), student.theta[2], 2 * (data - target) / data.numel())
    torch.testing.assert_close(student.theta[2].grad, slope, rtol=1e-12, atol=0)
    moved = LOSSES[name](Steps(grid, (0.6, -0.4, 0.5)), field, teacher, grid, noise, 2)
    assert abs(moved.item() - loss.item()) > 1e-5  # the value does depend on the first step


def exact_step(mean, std):
    """A flow student that jumps to the end of the Gaussian's own flow: (end - x) / (1 - t)."""

    def field(x, t):
        t = float(t)
        end = mean + std / math.sqrt(t**2 * std**2 + (1 - t) ** 2) * (x - t * mean)
        return (end - x) / (1 - t)

    return field


def test_the_backward_loss_of_an_exact_step_falls_to_zero_as_the_teacher_takes_more():
    grid, student, field = StudentGrid("condot", THIRDS, None), exact_step(ONE[0], 0.6), network(mixture("condot", ONE, 0.6))
    losses = [float(backward_loss(student, field, Teacher(k, 1.0, "ddim"), grid, normal(0), 0)) for k in (4, 16, 64, 256)]
    assert [p / q for p, q in pairwise(losses)][1:] == pytest.approx([16, 16], rel=0.15)  # the square of order 1
    assert losses[-1] < 2e-5


def test_the_shifted_loss_of_exact_ends_is_that_of_the_pull_to_the_middle():
    """2 std^2 (1 - c), c = std alpha / sqrt(alpha^2 std^2 + sigma^2) at gamma, for a teacher of many steps."""
    grid, student, field = StudentGrid("condot", (0.0, 1.0), {0.0: 0.4}), exact_step(ONE[0], 0.6), network(mixture("condot", ONE, 0.6))
    c = 0.6 * 0.4 / math.sqrt(0.4**2 * 0.6**2 + 0.6**2)
    noise, eps = normal(0, 40000), normal(1, 40000)
    loss = shifted_loss(student, field, Teacher(64, 1.0), grid, noise, 0, eps)
    assert loss.item() == pytest.approx(2 * 0.36 * (1 - c), rel=0.01)
    data = student_data(student, grid, noise, 0) - ONE
    pulled = shifted_target(field, Teacher(64, 1.0), grid, data + ONE, eps, 0) - ONE
    assert float((pulled * data).mean() / data.square().mean()) == pytest.approx(c, rel=0.02)


def test_energy_distance_is_that_of_two_normals():
    x, y = (torch.from_numpy(np.random.default_rng(seed).standard_normal((3000, 1))) for seed in (0, 1))
    for mean in (0.0, 0.5, 2.0):
        far = 2 / math.sqrt(math.pi) * math.exp(-(mean**2) / 4) + mean * math.erf(mean / 2)  # E|N(mean, 2)|
        assert energy_distance(x, y + mean) == pytest.approx(2 * far - 4 / math.sqrt(math.pi), abs=0.02 + 0.05 * mean)
    assert energy_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [3.0]])) == pytest.approx(3 - 2 - 2)


def test_a_student_that_swaps_conditions_scores_badly_though_all_its_ends_together_are_right():
    index = torch.arange(400) % 2
    means = torch.tensor([[2.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
    ends, grid = means[index] + 0.3 * normal(1, 400), StudentGrid("condot", (0.0, 1.0), None)

    def fields(swap):
        return lambda rows: lambda x, t: means[rows ^ swap] + 0.3 * x - x

    validation = Validation(index, normal(0, 400), ends)
    assert validation.score(fields(0), grid, 150) == pytest.approx(0, abs=0.02)
    assert validation.score(fields(1), grid, 150) > 5


def no_conditions(rng, count):
    return torch.zeros(count, dtype=torch.long)


def toy_options(grid, **changes):
    return Options(grid, Teacher(4, 1.0), **{"iterations": 6, "batch": 16, "rate": 3e-3, "validate_every": 2, "rows": 2000, **changes})


def toy_validation(count=64, path="condot"):
    networks, index = lambda index: network(mixture(path, FOUR, 0.3)), torch.zeros(count, dtype=torch.long)
    return Validation(index, normal(8, count).float(), teacher_ends(networks, Teacher(25, 1.0), PATHS[path], index, normal(7, count).float(), 512))


def toy_distil(student, options, validation, path="condot", **more):
    return distil(student, lambda index: student, lambda index: network(mixture(path, FOUR, 0.3)), no_conditions, validation, options, **more)


@pytest.mark.parametrize("adversarial", [0.0, 0.3])
def test_an_iteration_is_the_one_written_out_by_hand_and_no_data_enters(adversarial):
    """Noise, its step and the second noise from the seed, Euler steps, noise again, the teacher, AdamW: nothing else is read."""
    options = toy_options(StudentGrid("condot", THIRDS, VARIED), iterations=1, seed=3, adversarial=adversarial)
    trained, by_hand, got = Copy(width=8), Copy(width=8), {}
    toy_distil(trained, options, toy_validation(), progress=lambda iteration, loss, best: got.update(loss=loss, **weights(trained)))

    rng = np.random.default_rng((3, 0))
    step = int(rng.integers(3))
    z, eps = (torch.from_numpy(rng.standard_normal((16, 2))).float() for _ in range(2))
    t, g = THIRDS[step], VARIED[THIRDS[step]]
    assert step > 0  # else there is no own step to take
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=3e-3, weight_decay=0.01)
    x = z
    with torch.no_grad():
        for s in THIRDS[:step]:
            x = x + by_hand(x, torch.tensor(s)) / 3
    data = x + (1 - t) * by_hand(x, torch.tensor(t))
    chi = g * data.detach() + (1 - g) * eps
    loss = (data - Teacher(4, 1.0).data(network(mixture("condot", FOUR, 0.3)), chi, g, PATHS["condot"])).square().mean()
    if adversarial:
        loss = loss - adversarial * Adversary(lambda latents: latents, z[:1], options).head(data).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
    optimizer.step()
    assert got["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-5)


def data_of_four(count, seed):
    rng = np.random.default_rng(seed)
    return (FOUR[rng.integers(4, size=count)] + 0.3 * torch.from_numpy(rng.standard_normal((count, 2)))).float()


@pytest.mark.parametrize(
    ("grid", "adversarial", "better"),
    [
        (StudentGrid("condot", (0.0, 1.0), None), 0.0, 20),
        (StudentGrid("condot", (0.0, 0.5, 1.0), None), 0.0, 3),
        (StudentGrid("vp", THIRDS, None), 0.0, 4),
        (StudentGrid.midway("condot", (0.0, 0.5, 1.0)), 0.3, 3),
        (StudentGrid("condot", THIRDS, {0.0: 0.05, 1 / 3: 2 / 3, 2 / 3: 5 / 6}), 0.1, 2),
    ],
    ids=["1 backward", "2 backward", "3 backward vp", "2 shifted adversarial", "3 shifted adversarial"],
)
def test_a_student_comes_nearer_to_the_data_than_the_teacher_does_in_as_few_steps(grid, adversarial, better):
    student, validation = Copy(grid.path), toy_validation(1500, grid.path)  # of 512 the mixture's shares alone miss by more than what is to be won
    truth, noise = data_of_four(2000, 3), normal(9, 2000).float()
    before = energy_distance(student_ends(student, grid, noise), truth)
    found = toy_distil(
        student,
        toy_options(grid, iterations=400, batch=128, validate_every=50, adversarial=adversarial, head_width=64, head_rate=3e-3),
        validation,
        grid.path,
    )
    after = energy_distance(student_ends(student, grid, noise), truth)
    assert not found.note
    assert found.best < found.start
    assert after < before / better


def conditions_of_two(rng, count):
    return torch.from_numpy(rng.integers(2, size=count))


def guided_run(student, options, saved=None, progress=lambda iteration, loss, best: None):
    """Two conditions, each one of the four Gaussians; null is all four."""

    def networks(index):
        def answer(x, t, branches):
            text = torch.stack([mixture("condot", FOUR[i : i + 1], 0.3)(row[None], t)[0] for i, row in zip(index.tolist(), x, strict=True)])
            return tuple({"text": text, "null": mixture("condot", FOUR, 0.3)(x, t)}[name] for name in branches)

        return answer

    index = torch.arange(16) % 2
    validation = Validation(index, normal(8, 16).float(), teacher_ends(networks, options.teacher, PATHS["condot"], index, normal(7, 16).float()))
    return distil(student, lambda index: student, networks, conditions_of_two, validation, options, progress=progress, saved=saved)


def test_an_interrupted_run_that_goes_on_gives_the_same_numbers(tmp_path):
    options = replace(toy_options(StudentGrid.midway("condot", THIRDS), adversarial=0.1, head_width=8), teacher=Teacher(2, 2.0))
    whole, broken, resumed, heard = Copy(width=8), Copy(width=8), Copy(width=8), ([], [])
    want = guided_run(whole, options, progress=lambda *numbers: heard[0].append(numbers))

    def stop(iteration, loss, best):
        heard[1].append((iteration, loss, best))
        if iteration == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        guided_run(broken, options, tmp_path / "run.pt", stop)
    got = guided_run(resumed, options, tmp_path / "run.pt", lambda *numbers: heard[1].append(numbers))
    assert got == want
    assert heard[1] == heard[0]
    assert [iteration for iteration, *_ in heard[0]] == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(p, q) for p, q in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))
    with pytest.raises(ConfigError, match="Go on with what it was saved with"):
        guided_run(Copy(width=8), replace(options, rate=1e-3), tmp_path / "run.pt")


def test_the_student_is_left_with_the_weights_that_scored_best():
    options = toy_options(StudentGrid("condot", (0.0, 1.0), None), iterations=20, rate=0.3)
    student, seen, validation = Copy(width=8), {0: None}, toy_validation()
    seen[0] = weights(student)
    found = toy_distil(student, options, validation, progress=lambda iteration, loss, best: seen.update({iteration: weights(student)}))
    assert found.best == min(score for _, score in found.history)
    assert dict(found.history)[found.iteration] == found.best
    assert all(torch.equal(value, seen[found.iteration][name]) for name, value in student.state_dict().items())
    assert validation.score(lambda index: student, options.grid, 512) == found.best


def test_a_loss_that_is_not_finite_ends_it_with_a_note_and_moves_nothing():
    options, student, calls = toy_options(StudentGrid.midway("condot", THIRDS)), Copy(width=8), []

    def networks(index):
        calls.append(len(calls))
        return network(lambda x, t: mixture("condot", FOUR, 0.3)(x, t) * (math.nan if len(calls) > 3 else 1))

    found = distil(student, lambda index: student, networks, no_conditions, toy_validation(), options)
    assert "iteration 3" in found.note
    assert [iteration for iteration, _ in found.history] == [0, 2]
    assert all(p.isfinite().all() for p in student.parameters())


def test_without_the_adversarial_term_no_head_is_made(monkeypatch):
    def refuse(*args):
        raise AssertionError("a head")

    monkeypatch.setattr(imagine_flash, "Head", refuse)
    options = toy_options(StudentGrid.midway("condot", THIRDS))
    toy_distil(Copy(width=8), options, toy_validation())
    with pytest.raises(AssertionError, match="a head"):
        toy_distil(Copy(width=8), replace(options, adversarial=0.1), toy_validation())


def test_the_head_learns_to_tell_the_two_apart_and_only_the_head():
    real, data = (normal(1) + 2).float(), normal(2).float().requires_grad_()
    adversary = Adversary(lambda latents: latents[:, :1], data.detach()[:1], toy_options(StudentGrid.midway("condot", THIRDS), head_rate=1e-2, head_width=16))
    for _ in range(60):
        adversary.step(real, data)
    assert data.grad is None
    assert float((adversary.head(real[:, :1]) > 0).float().mean()) > 0.8
    assert float((adversary.head(data[:, :1]) < 0).float().mean()) > 0.8
    adversary.term(data).backward(inputs=[data])
    assert adversary.term(data).item() == pytest.approx(-adversary.head(data[:, :1]).mean().item())
    assert float(data.grad[:, 1].abs().max()) == 0  # the feature is the first coordinate
    assert float(data.grad[:, 0].mean()) < 0  # downhill is to the teacher's side


def test_the_head_is_of_the_seed_and_leaves_the_global_random_state_alone():
    options = toy_options(StudentGrid.midway("condot", THIRDS))
    torch.manual_seed(0)
    want = torch.rand(1)
    torch.manual_seed(0)
    made = [Adversary(lambda x: x, normal(0).float()[:1], replace(options, seed=seed)).head for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(1), want)
    first, same, other = (head.layers[0].weight for head in made)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_midway_is_half_way_to_the_next_time():
    assert StudentGrid.midway("condot", (0.0, 0.5, 0.75, 1.0)).gamma == {0.0: 0.25, 0.5: 0.625, 0.75: 0.875}


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: StudentGrid("condot", (0.0, 0.6, 0.5, 1.0), None), "increase"),
        (lambda: StudentGrid("condot", (0.0, 0.5, 0.5, 1.0), None), "increase"),
        (lambda: StudentGrid("condot", (0.1, 1.0), None), "increase"),
        (lambda: StudentGrid("condot", (0.0, 0.9), None), "increase"),
        (lambda: StudentGrid("condot", (0.0,), None), "increase"),
        (lambda: StudentGrid("condot", (0.0, 0.5, 1.0), {0.0: 0.3}), "gamma has the times"),
        (lambda: StudentGrid("condot", (0.0, 1.0), {0.0: 0.3, 0.5: 0.6}), "gamma has the times"),
        (lambda: StudentGrid("condot", (0.0, 1.0), {0.0: 1.0}), "below 1"),
        (lambda: StudentGrid("condot", (0.0, 1.0), {0.0: math.nan}), "below 1"),
        (lambda: Teacher(0, 1.0), "nfe=0"),
        (lambda: Teacher(1, 0.5), "scale 0.5"),
        (lambda: Teacher(1, math.nan), "scale nan"),
        (lambda: Teacher(1, 1.0, "heun"), "one velocity a step"),
        (lambda: Teacher(1, 1.0, "lcm"), "no fresh noise"),
        (lambda: toy_options(StudentGrid.midway("condot", THIRDS), adversarial=-1.0), "adversarial"),
        (lambda: Validation(torch.tensor([0, 1]), torch.zeros(2, 2), torch.zeros(2, 2)), "at least two"),
        (lambda: Validation(torch.tensor([0, 0]), torch.zeros(2, 2), torch.zeros(3, 2)), "one of each"),
        (lambda: shifted_target(None, None, StudentGrid("condot", (0.0, 1.0), None), None, None, 0), "no gamma"),
    ],
)
def test_what_cannot_be_is_refused(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


def test_a_solver_of_the_teacher_that_nobody_knows_is_not_found():
    with pytest.raises(NotFound, match="dpmpp_2m"):
        Teacher(1, 1.0, "dpm")
