"""Our tables and schedules beside the schedulers of diffusers, step for step, with the same network, noise levels and fresh noise.

Noise level tau = 1 - t, and their flow models give -u. Not compared, for want of a scheduler of theirs for the same method: midpoint, RK4 and
AB2. Their Heun takes its last step, to tau = 0, by Euler; so that last state alone is not compared.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import AysSchedules

from reelstep.engine.samplers.convert import TO_VELOCITY
from reelstep.engine.samplers.ns import sample, start
from reelstep.engine.samplers.paths import PATHS
from reelstep.engine.samplers.schedules import ALIGN_YOUR_STEPS, dynamic_shift, exponential, exponential_sigmas, from_sigmas, karras, karras_sigmas
from reelstep.engine.samplers.tables import SOLVERS

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT_IN, WEIGHT_OUT = torch.randn(8, 32, generator=GENERATOR) / 8**0.5, torch.randn(32, 8, generator=GENERATOR) / 32**0.5
NOISE = torch.randn(16, 8, generator=GENERATOR)

their_numpy = pytest.mark.filterwarnings(  # raised inside their code, which hands tensors to numpy
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",
    "ignore:__array_wrap__ must accept context and return_scalar arguments:DeprecationWarning",
)


def network(x, t):
    return torch.tanh(x @ WEIGHT_IN.to(x.dtype) + t) @ WEIGHT_OUT.to(x.dtype)


def of_step(step):
    return torch.Generator().manual_seed(step)


def fresh(step):
    return torch.randn(NOISE.shape, generator=of_step(step))


def ours(solver, times, path, prediction="velocity", noise=NOISE):
    """The state after every evaluation."""
    table = SOLVERS[solver].build(times, PATHS[path])
    state = start(table, noise)
    run, states = sample(table, state, fresh), []
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


def theirs(scheduler, timesteps, times, sign, noise=NOISE, **options):
    """As `ours`. options: of their step; a function is one of our step."""
    x, states = noise, []
    for i, (step, t) in enumerate(zip(timesteps, times, strict=True)):
        x = scheduler.step(sign * network(x, t), step, x, **{k: v(i) if callable(v) else v for k, v in options.items()}).prev_sample
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


@their_numpy
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 20])
def test_unipc_steps_as_unipc_multistep_on_flow_sigmas(steps, shift):
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=shift)
    scheduler.set_timesteps(steps)
    times = (1 - scheduler.sigmas.double()).tolist()  # from 1e-6: theirs cannot begin at 0
    assert_same(ours("unipc", times, "condot"), theirs(scheduler, scheduler.timesteps, times[:-1], -1))


@their_numpy
@pytest.mark.parametrize(("theirs_", "prediction"), [("epsilon", "eps"), ("v_prediction", "v"), ("sample", "x1")])
def test_unipc_steps_as_unipc_multistep_on_vp(theirs_, prediction):
    scheduler = UniPCMultistepScheduler(prediction_type=theirs_)
    on_our_path(scheduler, "vp")
    scheduler.set_timesteps(10)
    times = continuous(scheduler.timesteps)
    assert_same(ours("unipc", [*times, 1.0], "vp", prediction), theirs(scheduler, scheduler.timesteps, times, 1))


@their_numpy
def test_the_last_step_of_unipc_short_of_the_data_is_of_full_order_as_theirs_with_lower_order_final_off():
    scheduler = UniPCMultistepScheduler(lower_order_final=False, final_sigmas_type="sigma_min")
    on_our_path(scheduler, "vp")
    scheduler.set_timesteps(10)
    times = continuous(scheduler.timesteps)
    assert_same(ours("unipc", [*times, 0.999], "vp", "eps"), theirs(scheduler, scheduler.timesteps, times, 1))


@their_numpy
@pytest.mark.parametrize("steps", [2, 8, 20])
def test_deis_steps_as_deis_multistep_on_flow_sigmas(steps):
    scheduler = DEISMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    times, noise = (1 - scheduler.sigmas).tolist(), NOISE.double()  # theirs divides by alpha, 3e-4 at first: up to 7e-5 off in float32
    assert times[-2] == times[-1] < 1  # their last step goes nowhere
    assert_same(ours("deis", times[:-1], "condot", noise=noise), theirs(scheduler, scheduler.timesteps[:-1], times[:-2], -1, noise))


@their_numpy
@pytest.mark.parametrize(("theirs_", "prediction"), [("epsilon", "eps"), ("v_prediction", "v")])
def test_deis_steps_as_deis_multistep_on_vp(theirs_, prediction):
    scheduler = DEISMultistepScheduler(prediction_type=theirs_, lower_order_final=False)
    on_our_path(scheduler, "vp")
    scheduler.set_timesteps(10)
    times = continuous(scheduler.timesteps)
    assert_same(ours("deis", [*times, 0.999], "vp", prediction), theirs(scheduler, scheduler.timesteps, times, 1))


@their_numpy
@pytest.mark.parametrize("steps", [1, 2, 8, 20])
def test_dpm_solver_2m_sde_steps_as_sde_dpm_solver_multistep_on_flow_sigmas(steps):
    scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    scheduler.set_timesteps(steps)
    times = (1 - scheduler.sigmas.double()).tolist()
    assert_same(ours("dpmpp_2m_sde", times, "condot"), theirs(scheduler, scheduler.timesteps, times[:-1], -1, generator=of_step))


@their_numpy
def test_dpm_solver_2m_sde_steps_as_sde_dpm_solver_multistep_on_vp():
    scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    on_our_path(scheduler, "vp")
    scheduler.set_timesteps(10)
    times = continuous(scheduler.timesteps)
    assert_same(ours("dpmpp_2m_sde", [*times, 1.0], "vp", "eps"), theirs(scheduler, scheduler.timesteps, times, 1, generator=of_step))


@pytest.mark.parametrize(("path", "theirs_", "prediction"), [("vp", "epsilon", "eps"), ("vp", "sample", "x1"), ("cosine", "v_prediction", "v")])
def test_euler_ancestral_steps_as_ddim_with_eta_1(path, theirs_, prediction):
    scheduler = DDIMScheduler(prediction_type=theirs_, clip_sample=False, timestep_spacing="trailing")
    on_our_path(scheduler, path)
    scheduler.set_timesteps(8)
    times = continuous(scheduler.timesteps)
    got = ours("euler_ancestral", [*times, 1.0], path, prediction)
    assert_same(got, theirs(scheduler, scheduler.timesteps, times, 1, eta=1.0, generator=of_step))


@their_numpy
def test_euler_ancestral_steps_as_euler_ancestral_discrete_in_its_scale():
    scheduler = EulerAncestralDiscreteScheduler(timestep_spacing="trailing")
    on_our_path(scheduler, "vp")
    scheduler.set_timesteps(8)
    times, scale, states = continuous(scheduler.timesteps), (1 + scheduler.sigmas.square()).sqrt(), []  # their state is x / alpha
    x = NOISE * scale[0]
    for i, (step, t) in enumerate(zip(scheduler.timesteps, times, strict=True)):
        x = scheduler.step(network(scheduler.scale_model_input(x, step), t), step, x, generator=of_step(i)).prev_sample
        states.append(x / scale[i + 1])
    assert_same(ours("euler_ancestral", [*times, 1.0], "vp", "eps"), states)


@pytest.mark.parametrize("theirs_", [FlowMatchLCMScheduler(shift=3.0), FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)])
def test_lcm_steps_as_flow_match_lcm_and_stochastic_flow_match_euler(theirs_):
    theirs_.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    times = (1 - theirs_.sigmas.double()).tolist()
    assert_same(ours("lcm", times, "condot"), theirs(theirs_, theirs_.timesteps, times[:-1], -1, generator=of_step))


@pytest.mark.parametrize(("theirs_", "prediction"), [("epsilon", "eps"), ("v_prediction", "v")])
def test_lcm_steps_as_lcm_but_for_the_boundary_condition_that_is_the_networks(theirs_, prediction):
    scheduler = LCMScheduler(prediction_type=theirs_, clip_sample=False, timestep_scaling=1e6)  # which leaves x1 as the network gave it
    on_our_path(scheduler, "vp")
    scheduler.set_timesteps(4)
    times = continuous(scheduler.timesteps)
    assert_same(ours("lcm", [*times, 1.0], "vp", prediction), theirs(scheduler, scheduler.timesteps, times, 1, generator=of_step))


@pytest.mark.parametrize(("path", "theirs_", "prediction"), [("vp", "epsilon", "eps"), ("cosine", "v_prediction", "v")])
def test_tcd_steps_as_tcd(path, theirs_, prediction):
    # index k is t = 1 - k / 1000 here, and the indices are such that theirs, which rounds (1 - gamma) k down, has nothing to round
    scheduler = TCDScheduler(prediction_type=theirs_)
    scheduler.alphas_cumprod = PATHS[path].at(1 - torch.arange(1000, dtype=torch.float64) / 1000).alpha.square()
    scheduler.set_timesteps(timesteps=[990, 700, 400, 200])
    assert [int((1 - 0.3) * k) for k in scheduler.timesteps] == [693, 490, 280, 140]
    times = [1 - int(k) / 1000 for k in scheduler.timesteps]
    assert_same(ours("tcd", [*times, 1.0], path, prediction), theirs(scheduler, scheduler.timesteps, times, 1, generator=of_step))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("option", "schedule"), [("use_karras_sigmas", karras), ("use_exponential_sigmas", exponential)])
def test_karras_and_exponential_schedules_are_those_of_flow_match_euler(option, schedule, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, **{option: True})
    scheduler.set_timesteps(12)
    tau = scheduler.sigmas.tolist()
    assert [1 - t for t in schedule(12, tau_min=tau[-2])] == pytest.approx(tau, abs=1e-6)
    if shift == 1:
        assert [1 - t for t in schedule(12)] == pytest.approx(tau, abs=1e-6)


@pytest.mark.parametrize("tokens", [256, 1024, 4096, 8100])
def test_dynamic_shift_is_that_of_flow_match_euler(tokens):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    config = scheduler.config
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = slope * tokens + config.base_shift - slope * config.base_image_seq_len  # as their pipelines compute it
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 20, 20).tolist(), mu=mu)
    assert [1 - t for t in dynamic_shift(20, tokens)] == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


@their_numpy
@pytest.mark.parametrize(("option", "spacing"), [("use_karras_sigmas", karras_sigmas), ("use_exponential_sigmas", exponential_sigmas)])
def test_spaced_noise_to_signal_ratios_on_vp_step_as_dpm_solver_multistep(option, spacing):
    scheduler = DPMSolverMultistepScheduler(**{option: True})
    on_our_path(scheduler, "vp")
    scheduler.set_timesteps(10)
    ends = [math.exp(-PATHS["vp"].at(t).half_log_snr) for t in (0.999, 0.0)]
    sigmas = (*spacing(10, *ends), 0.0)
    assert sigmas == pytest.approx(scheduler.sigmas.tolist(), rel=1e-6)
    times = list(from_sigmas(sigmas, PATHS["vp"]))
    assert_same(ours("dpmpp_2m", times, "vp", "eps"), theirs(scheduler, scheduler.timesteps, times[:-1], 1))


def test_the_aligned_steps_are_theirs():
    assert list(ALIGN_YOUR_STEPS["sd15"]) == AysSchedules["StableDiffusionSigmas"]
    assert list(ALIGN_YOUR_STEPS["sdxl"]) == AysSchedules["StableDiffusionXLSigmas"]
