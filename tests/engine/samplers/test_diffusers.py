"""Our tables step for step beside the schedulers of diffusers, with the same network and the same noise levels.

Noise level tau = 1 - t, and their flow models give -u. Not compared, for want of a scheduler of theirs for the same method: midpoint and AB2.
Their Heun takes its last step, to tau = 0, by Euler; so that last state alone is not compared.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from reelstep.engine.samplers.convert import TO_VELOCITY
from reelstep.engine.samplers.ns import sample, start
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.tables import SOLVERS

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT_IN, WEIGHT_OUT = torch.randn(8, 32, generator=GENERATOR) / 8**0.5, torch.randn(32, 8, generator=GENERATOR) / 32**0.5
NOISE = torch.randn(16, 8, generator=GENERATOR)


their_numpy = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")  # raised inside set_timesteps


def network(x, t):
    return torch.tanh(x @ WEIGHT_IN + t) @ WEIGHT_OUT


def ours(solver, times, path, prediction="velocity"):
    """The state after every evaluation."""
    table = SOLVERS[solver].build(times, PATHS[path])
    state = start(table, NOISE)
    run, states = sample(table, state), []
    x, t = next(run)
    for i in range(table.n):
        u = TO_VELOCITY[prediction](network(x, t), x, t, PATHS[path])
        if i == table.n - 1:
            with pytest.raises(StopIteration):
                run.send(u)
        else:
            x, t = run.send(u)
        states.append(state.x)
    return states


def theirs(scheduler, timesteps, times, sign):
    x, states = NOISE, []
    for step, t in zip(timesteps, times, strict=True):
        x = scheduler.step(sign * network(x, t), step, x).prev_sample
        states.append(x)
    return states


def assert_same(left, right):
    assert len(left) == len(right)
    for p, q in zip(left, right, strict=True):
        assert ((p - q).norm() / q.norm()).item() < 1e-5


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_steps_as_flow_match_euler(shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(12)
    times = (1 - scheduler.sigmas.double()).tolist()
    assert_same(ours("euler", times, "condot"), theirs(scheduler, scheduler.timesteps, times[:-1], -1))


def test_heun_steps_as_flow_match_heun_up_to_its_last_step():
    scheduler = FlowMatchHeunDiscreteScheduler()
    scheduler.set_timesteps(8)
    nodes = (1 - scheduler.sigmas.double()).tolist()  # t0, t1, t1, t2, t2, ..., 1
    times = [*nodes[:-1:2], nodes[-1]]
    assert_same(ours("heun", times, "condot")[:14], theirs(scheduler, scheduler.timesteps, nodes[:-1], -1)[:14])


@their_numpy
@pytest.mark.parametrize("steps", [1, 2, 8, 20])
def test_dpm_solver_2m_steps_as_dpm_solver_multistep_on_flow_sigmas(steps):
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    scheduler.set_timesteps(steps)
    times = (1 - scheduler.sigmas.double()).tolist()
    assert_same(ours("dpmpp_2m", times, "condot"), theirs(scheduler, scheduler.timesteps, times[:-1], -1))


def on_our_path(scheduler, path):
    """Give a scheduler our path at its 1,000 discrete times: index k is t = 1 - (k + 1) / 1000."""
    t = 1 - torch.arange(1, 1001, dtype=torch.float64) / 1000
    scheduler.alphas_cumprod = PATHS[path].at(t).alpha.square()


def continuous(timesteps):
    return [1 - (int(k) + 1) / 1000 for k in timesteps]


@pytest.mark.parametrize(
    ("path", "theirs_", "prediction"), [("vp", "epsilon", "eps"), ("vp", "v_prediction", "v"), ("vp", "sample", "x1"), ("cosine", "v_prediction", "v")]
)
def test_ddim_steps_as_ddim(path, theirs_, prediction):
    scheduler = DDIMScheduler(prediction_type=theirs_, clip_sample=False, timestep_spacing="trailing")
    on_our_path(scheduler, path)
    scheduler.set_timesteps(8)
    assert scheduler.timesteps.tolist() == [999, 874, 749, 624, 499, 374, 249, 124]  # on cosine 999 has no signal: zero terminal SNR
    times = continuous(scheduler.timesteps)
    assert times[0] == 0
    assert_same(ours("ddim", [*times, 1.0], path, prediction), theirs(scheduler, scheduler.timesteps, times, 1))


@their_numpy
@pytest.mark.parametrize(("theirs_", "prediction"), [("epsilon", "eps"), ("v_prediction", "v")])
def test_dpm_solver_2m_steps_as_dpm_solver_multistep_on_vp(theirs_, prediction):
    scheduler = DPMSolverMultistepScheduler(prediction_type=theirs_)
    on_our_path(scheduler, "vp")
    scheduler.set_timesteps(10)
    times = continuous(scheduler.timesteps)
    assert_same(ours("dpmpp_2m", [*times, 1.0], "vp", prediction), theirs(scheduler, scheduler.timesteps, times, 1))
