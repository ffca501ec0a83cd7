"""Linear layers in 8 bits, beside the same arithmetic in integers and float64."""

import math
from copy import deepcopy
from dataclasses import replace

import numpy as np
import openvino as ov
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import nn

from reelstep.compiler.backends import BACKENDS, openvino
from reelstep.compiler.backends.openvino import ALONE, options_of
from reelstep.compiler.backends.openvino.convert import for_batch, lower
from reelstep.compiler.capture import capture
from reelstep.compiler.graphs import dump_graph, load_graph, weights_of
from reelstep.compiler.passes import apply_passes
from reelstep.compiler.passes.mixed_precision import mixed_precision
from reelstep.compiler.passes.quantise import BINS, LINEAR, Counting, Grid, Watching, e4m3_linear, linears, quantise, quantise_weight
from reelstep.compiler.passes.quantise_before_moves import FAKE_QUANTISE
from reelstep.compiler.program import Profile, Program, TensorSpec
from reelstep.compiler.signature import Signature
from reelstep.compiler.skus import SKUS
from reelstep.kernels import OPS
from reelstep.kernels.fp8_norm_quantise import e4m3_rows
from reelstep.kernels.rms_modulate import rms_modulate

SCALED_MM = torch.ops.aten._scaled_mm.default


class Stack(nn.Module):
    """Residual layers with and without biases, one weight used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 64), nn.Linear(64, 16)
        self.up = nn.ModuleList(nn.Linear(64, 128, bias=k > 0) for k in range(3))
        self.down = nn.ModuleList(nn.Linear(128, 64) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(nn.functional.silu(up(x)))
        return self.last(x + nn.functional.linear(nn.functional.silu(nn.functional.linear(x, self.up[0].weight)), self.down[0].weight))


class Single(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(48, 32)

    def forward(self, x):
        return self.layer(x)


def captured(module, width_in, width_out, length=5):
    torch.manual_seed(0)
    made = module().eval()
    program = Program(
        "p", made, (TensorSpec("x", "float32", ("B", length, width_in)),), (TensorSpec("y", "float32", ("B", length, width_out)),), (Profile("q", {}, 6),)
    )
    exported, _ = apply_passes(capture(program, program.profiles[0]))
    return made, exported, Signature.of(program, program.profiles[0])


@torch.no_grad()
def grids_of(exported, *calls):
    watching = Watching(exported.module(), linears(exported))
    for call in calls:
        watching.run(call)
    return {name: Grid.of(*covering) for name, covering in watching.ranges.items()}


def rounded_to_e4m3(x):
    """float64, by the format's definition: 3 bits of mantissa, exponents from -6, ties to even."""
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 1e-300))), -6)
    quantum = 2.0 ** (exponent - 3)
    return np.round(x / quantum) * quantum


def test_a_row_of_an_int8_weight_is_within_half_a_step_and_reaches_127():
    weight = torch.randn(33, 40) * torch.logspace(-3, 3, 33)[:, None]
    q, step = quantise_weight(weight, "int8")
    exact = weight.double().numpy()
    assert q.dtype is torch.int8
    assert step.shape == (33, 1)
    assert q.abs().amax(1).tolist() == [127] * 33
    error = np.abs(q.double().numpy() * step.double().numpy() - exact)
    assert (error <= 0.5 * step.double().numpy() * (1 + 1e-5)).all()


def test_weights_in_e4m3_are_the_nearest_of_the_format():
    weight = torch.randn(33, 40) * torch.logspace(-3, 3, 33)[:, None]
    weight[:, ::3] *= 1e-4  # subnormal ones beside the row's largest
    weight[4] = 0.0
    q, step = quantise_weight(weight, "fp8")
    assert q.dtype is torch.float8_e4m3fn
    assert q.float().abs().amax(1)[[0, 1, 32]].tolist() == [448.0] * 3
    scaled = (weight / step).clamp(-448, 448).double().numpy()
    assert np.array_equal(q.double().numpy(), rounded_to_e4m3(scaled))


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-0.3, 7.0), (2.0, 5.0), (-5.0, -2.0), (0.0, 0.0), (0.0, 1e-30)])
def test_a_grid_covers_its_range_and_holds_zero(low, high):
    grid = Grid.of(low, high)
    assert grid.step > 0
    assert math.isfinite(grid.step)
    assert -128 <= grid.zero <= 127
    assert grid.step * (-128 - grid.zero) <= min(low, 0.0) + 0.51 * grid.step
    assert grid.step * (127 - grid.zero) >= max(high, 0.0) - 0.51 * grid.step


@pytest.mark.parametrize("tail", [0.0, 0.3, 3.0])
def test_the_grid_of_least_error_rounds_and_cuts_no_worse_than_a_search_over_all_grids(tail):
    """scipy's own minimum over the step, on the numbers themselves."""
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).double()
    x = x.sign() * x.abs() ** (1 + tail)  # heavier tails
    low, high = -float(x.abs().max()), float(x.abs().max())
    grid = Grid.of_least_error(torch.histc(x.float(), BINS, low, high), low, high)
    numbers = x.numpy()

    def error(step):
        return float(((np.clip(np.round(numbers / step), -128, 127) * step - numbers) ** 2).sum())

    steps = np.linspace(0.02, 1.0, 400) * high / 127
    found = minimize_scalar(error, bounds=(0.8 * (best := min(steps, key=error)), 1.2 * best), method="bounded")
    assert grid.zero == 0
    assert error(grid.step) <= 1.02 * float(found.fun)
    assert error(grid.step) <= error(Grid.of(low, high).step)


def test_numbers_that_are_all_one_have_a_grid_that_holds_them():
    grid = Grid.of_least_error(torch.zeros(BINS), 2.5, 2.5)
    assert grid.step * (127 - grid.zero) == pytest.approx(2.5, rel=1e-2)


def test_counting_puts_every_number_into_its_bin():
    _, exported, _ = captured(Single, 48, 32)
    calls = [torch.randn(3, 5, 48), 2 * torch.randn(1, 5, 48)]
    (name,) = linears(exported).values()
    low, high = min(float(x.min()) for x in calls), max(float(x.max()) for x in calls)
    counting = Counting(exported.module(), linears(exported), {name: (low, high)})
    with torch.no_grad():
        for x in calls:
            counting.run(x)
    exact, _ = np.histogram(torch.cat([x.flatten() for x in calls]).numpy(), BINS, (low, high))
    assert counting.counts[name].sum() == 4 * 5 * 48
    assert np.abs(np.cumsum(counting.counts[name].numpy()) - np.cumsum(exact)).max() <= 2, "a number on the edge of two bins may go either way"


def test_an_int8_layer_computes_what_integers_do():
    module, exported, signature = captured(Single, 48, 32)
    x = torch.randn(3, 5, 48) * 2 + 1
    (grid,) = grids_of(exported, x).values()
    made = quantise(exported, signature, "int8", ["layer.weight"], {"layer.weight": grid})
    y = made.module()(x)

    q, step = quantise_weight(module.layer.weight, "int8")
    ratio = x.double().numpy() * (1 / np.float32(grid.step)).astype(np.float64)  # torch multiplies by the reciprocal, in float32
    integers = np.clip(np.round(ratio) + grid.zero, -128, 127).astype(np.int64)
    sums = (integers - grid.zero) @ q.long().numpy().T
    exact = sums * grid.step * step.double().numpy()[:, 0] + module.layer.bias.double().detach().numpy()
    assert np.abs(y.detach().double().numpy() - exact).max() < 1e-5 * np.abs(exact).max(), "48 products in float32"


def test_an_fp8_layer_computes_what_float64_does_with_the_same_rounding():
    torch.manual_seed(1)
    x, weight, bias = torch.randn(2, 5, 48) * torch.logspace(-2, 2, 5)[:, None], torch.randn(32, 48), torch.randn(32)
    x[1, 3] = 0.0
    q, step = quantise_weight(weight, "fp8")
    y = e4m3_linear(e4m3_rows(x), q, step, torch.float32, bias)
    own = (x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 448).numpy()
    rows = rounded_to_e4m3((x / torch.from_numpy(own)).clamp(-448, 448).double().numpy())
    product = (rows @ q.double().numpy().T) * own.astype(np.float64) * step.double().numpy()[:, 0]
    error = np.abs(y.double().numpy() - product - bias.double().numpy())
    rounded = np.abs(product) + np.abs(bias.double().numpy()) + np.abs(product + bias.double().numpy())
    room = 2.0**-8 * rounded + 1e-5 * (np.abs(rows) @ np.abs(q.double().numpy().T)) * own * step.double().numpy()[:, 0] + 1e-6
    assert (error <= room).all(), "half an ulp of bfloat16 of the product, the bias and their sum, and the order of float32 sums"


def test_a_layer_in_fp8_that_reads_bfloat16_finds_its_steps_in_float32():
    _, exported, signature = captured(Single, 48, 32)
    made = quantise(exported, signature, "fp8", ["layer.weight"], {}).module()
    x = torch.randn(2, 5, 48)
    with torch.no_grad():
        exact, y = made(x), made(x.bfloat16())
    assert float((y - exact).norm() / exact.norm()) < 0.03, "one more rounding of x, which may make another of E4M3"


class Modulated(nn.Module):
    """Layers behind a norm of ours, two and then one, and one behind another layer."""

    def __init__(self):
        super().__init__()
        self.norm = nn.Parameter(torch.randn(64))
        self.a, self.b, self.c = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(64, 64)
        self.d = nn.Linear(96, 64)

    def forward(self, x):
        scale, shift = x[:, 0], x[:, 1]
        y = rms_modulate(x, scale, shift, self.norm)
        x = x + self.d(self.a(y) * self.b(y))
        return self.c(rms_modulate(x, shift, scale, self.norm))


def test_in_fp8_a_norm_that_the_backend_keeps_gives_rows_in_e4m3_once_for_all_layers_behind_it():
    torch.manual_seed(0)
    module = Modulated().eval()
    edges = (TensorSpec("x", "float32", ("B", 5, 64)),), (TensorSpec("y", "float32", ("B", 5, 64)),)
    program = Program("p", module, *edges, (Profile("q", {}, 6),))
    signature, x = Signature.of(program, program.profiles[0]), torch.randn(3, 5, 64)

    def made(keep, chosen):
        exported, _ = apply_passes(capture(program, program.profiles[0]), keep=keep)
        graph = quantise(exported, signature, "fp8", chosen, {})
        called = [str(node.target).removeprefix("reelstep.").removesuffix(".default") for node in graph.graph.nodes]
        return {name: called.count(name) for name in ("rms_modulate", "fp8_norm_quantise")}, graph.module()(x), graph

    every = [f"{name}.weight" for name in "abcd"]
    fused, y, graph = made(frozenset(OPS), every)
    plain, expected, _ = made(frozenset(), every)
    assert fused == {"rms_modulate": 0, "fp8_norm_quantise": 2}
    assert plain == {"rms_modulate": 0, "fp8_norm_quantise": 0}
    assert torch.equal(y, expected), "the op's formula is what stood there"
    counts, y, _ = made(frozenset(OPS), ["a.weight", "d.weight"])
    assert counts == {"rms_modulate": 2, "fp8_norm_quantise": 1}, "b and c read the norm as it is"
    assert torch.equal(y, made(frozenset(), ["a.weight", "d.weight"])[1])
    mixed = mixed_precision(graph, signature)
    read = [node.args[0].meta["val"].dtype for node in mixed.graph.nodes if node.target is OPS["fp8_norm_quantise"].overload]
    assert read == [torch.float32] * 2, "the residual stream is read before it is rounded"
    truth = deepcopy(module).double()(x.double())
    assert (mixed.module()(x).double() - truth).norm() / truth.norm() < 0.06


@pytest.mark.parametrize("scheme", ["int8", "int8-weights", "fp8"])
def test_only_the_chosen_layers_change_and_float_weights_go(scheme):
    _, exported, signature = captured(Stack, 16, 16)
    x = torch.randn(4, 5, 16)
    chosen = ["up.0.weight", "down.2.weight"]
    made = quantise(exported, signature, scheme, chosen, grids_of(exported, x))
    counts = [str(node.target) for node in made.graph.nodes]
    calls = 3  # up.0 runs twice
    assert counts.count(str(FAKE_QUANTISE)) == (calls if scheme == "int8" else 0)
    assert counts.count(str(SCALED_MM)) == (calls if scheme == "fp8" else 0)
    assert counts.count(str(LINEAR)) == 10 - (calls if scheme == "fp8" else 0)
    stored = weights_of(made)
    eight = torch.float8_e4m3fn if scheme == "fp8" else torch.int8
    assert sorted(tuple(t.shape) for t in stored.values() if t.dtype is eight) == [(64, 128), (128, 64)]
    assert sum(t.numel() for t in stored.values() if t.dtype is torch.float32) < sum(t.numel() for t in weights_of(exported).values()) - 2 * 64 * 128 + 300
    exact, y = exported.module()(x).detach(), made.module()(x).detach()
    assert 0 < float((y - exact).norm() / exact.norm()) < (0.05 if scheme == "fp8" else 0.02)


@pytest.mark.parametrize("scheme", ["int8", "int8-weights", "fp8"])
def test_a_quantised_graph_is_saved_and_read_and_keeps_its_batch_dynamic(scheme):
    _, exported, signature = captured(Stack, 16, 16)
    x = torch.randn(4, 5, 16)
    grids = grids_of(exported, x)
    made = quantise(exported, signature, scheme, list(grids), grids)
    data = dump_graph(made)
    assert data == dump_graph(quantise(exported, signature, scheme, list(grids), grids))
    again = load_graph(data, weights_of(made), signature, "here").module()
    for rows in (1, 6):
        x = torch.randn(rows, 5, 16)
        assert torch.equal(again(x), made.module()(x))


def test_products_of_quantised_tensors_read_and_give_float32_in_a_bfloat16_plan():
    _, exported, signature = captured(Stack, 16, 16)
    x = torch.randn(4, 5, 16)
    grids = grids_of(exported, x)
    mixed = mixed_precision(quantise(exported, signature, "int8", [n for n in grids if n != "up.1.weight"], grids), signature)
    products = [node for node in mixed.graph.nodes if node.target is LINEAR]
    dtypes = [node.args[0].meta["val"].dtype for node in products]
    assert dtypes.count(torch.bfloat16) == 1, "the layer that was not chosen"
    assert all(node.args[0].target is FAKE_QUANTISE for node in products if node.args[0].meta["val"].dtype is torch.float32)
    users = {user.target for node in products[1:-1] if node.args[0].target is FAKE_QUANTISE for user in node.users}
    assert torch.ops.aten.silu.default in users, "which the runtime takes into the product"
    assert torch.ops.aten.to.dtype not in users


def test_a_cpu_that_would_cut_sums_off_multiplies_floats_that_hold_the_same(monkeypatch):
    monkeypatch.setattr(openvino, "SKU", replace(SKUS["cpu"], features=frozenset({"avx2"})))
    _, exported, signature = captured(Stack, 16, 16, length=64)
    x = torch.randn(1, 64, 16)
    grids = grids_of(exported, x)
    made = quantise(exported, signature, "int8", list(grids), grids)
    engine = BACKENDS["openvino"].build(lambda: made, signature, "float32", None, "")
    exact, (y,) = made.module()(x).detach(), engine({signature.inputs[0].name: x}).values()
    assert float((y - exact).norm() / exact.norm()) < 1e-3, "0.1 to 0.2 with integers, on a CPU with AVX2 alone"


@pytest.mark.parametrize("precision", BACKENDS["openvino"].precisions)
def test_openvino_multiplies_integers_and_agrees(precision):
    _, exported, signature = captured(Stack, 16, 16, length=64)
    x = torch.randn(1, 64, 16)
    grids = grids_of(exported, x)
    made = quantise(exported, signature, "int8", list(grids), grids)
    model = for_batch(lower(made, signature, precision), signature, 1)
    compiled = ov.Core().compile_model(model, "CPU", options_of(ALONE))
    exact, y = made.module()(x).detach(), torch.from_numpy(compiled(x.numpy())[0])
    infos = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    kinds = [info["primitiveType"].astype(str) for info in infos if info["layerType"].astype(str) == "FullyConnected"]
    assert [kind.lower().endswith("i8") for kind in kinds] == [SKUS["cpu"].int8] * 10, kinds
    float_error = float((exact - exported.module()(x).detach()).norm() / exact.norm())
    assert float((y - exact).norm() / exact.norm()) < (1e-3 if precision == "float32" else float_error), "a value near the middle of a step may go either way"
