"""NVFP4 beside the format's definition, in float64 and by a table of its 16 numbers."""

import importlib.util

import numpy as np
import pytest
import torch
from torch import nn

from reelstep.compiler.capture import capture
from reelstep.compiler.graphs import dump_graph, load_graph, weights_of
from reelstep.compiler.passes import apply_passes
from reelstep.compiler.passes.nvfp4 import REACH, block_scales, codes_of, pack, through_nvfp4, unpack, values_of
from reelstep.compiler.passes.quantise import Grid, linears, quantise, quantise_weight
from reelstep.compiler.program import Profile, Program, TensorSpec
from reelstep.compiler.signature import Signature

E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E4M3 = np.array([(m / 8 if e == 0 else 1 + m / 8) * 2.0 ** (max(e, 1) - 7) for e in range(16) for m in range(8)][:-1])  # the last code is no number


def nearest(table, x):
    """Code of the nearest number for each of x >= 0; of two as near the one with the even code."""
    distance = np.abs(x[..., None] - table)
    least = distance.min(-1, keepdims=True)
    tied = distance == least
    even = tied & (np.arange(len(table)) % 2 == 0)
    return np.where(even.any(-1), even.argmax(-1), tied.argmax(-1))


def emulated(x, scale):
    """What x [N, K] in float64 becomes: codes with their sign, block scales, values."""
    blocks = x.reshape(len(x), -1, 16)
    scales = E4M3[nearest(E4M3, np.clip(np.abs(blocks).max(-1) / 6 / scale, E4M3[1], 448.0))]
    own = (scales * scale)[..., None]
    codes = nearest(E2M1, np.abs(blocks) / own)
    values = np.sign(blocks) * E2M1[codes] * own
    return (codes + 8 * (blocks < 0)).reshape(x.shape), scales, values.reshape(x.shape)


def spread(rows, columns):
    return torch.randn(rows, columns) * torch.logspace(-4, 1, rows)[:, None]


def test_codes_are_the_sixteen_numbers_in_their_order():
    scales = torch.ones(1, 1).to(torch.float8_e4m3fn)
    codes = torch.arange(16, dtype=torch.uint8)[None]
    assert values_of(codes, scales, 1.0).tolist() == [[*E2M1, *(-E2M1)]]
    assert codes_of(values_of(codes, scales, 1.0), scales, 1.0).tolist() == codes.tolist(), "the negative zero too"


def test_a_number_between_two_takes_the_even_code_and_a_large_one_the_largest():
    halves = (E2M1[:-1] + E2M1[1:]) / 2
    x = torch.tensor([*halves, 7.0, *(-halves), -1e9], dtype=torch.float32)[None]
    codes = codes_of(x, torch.ones(1, 1).to(torch.float8_e4m3fn), 1.0)[0].tolist()
    expected = [0, 2, 2, 4, 4, 6, 6, 7]
    assert codes == [*expected, *(code + 8 for code in expected)]


def test_a_weight_is_what_float64_makes_of_it():
    """A row of zeros and rows whose blocks need scales below E4M3's normal ones among them."""
    torch.manual_seed(0)
    weight = spread(65, 96)
    weight[7] = 0.0
    packed, scales, scale = quantise_weight(weight, "nvfp4")
    assert (packed.dtype, packed.shape) == (torch.uint8, (65, 48))
    assert (scales.dtype, scales.shape) == (torch.float8_e4m3fn, (65, 6))
    assert (scale.dtype, scale.shape) == (torch.float32, ())
    assert float(scale) == pytest.approx(float(weight.abs().max()) / (6 * 448), rel=1e-6)
    codes, exact_scales, values = emulated(weight.double().numpy(), float(scale))
    assert np.array_equal(scales.double().numpy(), exact_scales)
    assert scales.float().max() == 448
    assert (exact_scales < 2.0**-6).any(), "subnormal"
    assert np.mean(unpack(packed).numpy() != codes) < 1e-3, "float32 division puts a few on the other side of a half"
    mine = values_of(unpack(packed), scales, scale).double().numpy()
    step = np.repeat(exact_scales * float(scale), 16, axis=1)
    assert (np.abs(mine - values) <= step * 2.0001).all()
    assert np.abs(mine - values).mean() < 1e-4 * np.abs(values).mean()


def test_two_numbers_lie_in_a_byte_the_first_in_its_low_half():
    codes = torch.arange(16, dtype=torch.uint8)[None]
    packed = pack(codes)
    assert packed.tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]
    assert torch.equal(unpack(packed), codes)
    assert packed.view(torch.float4_e2m1fn_x2).shape == (1, 8), "torch's own type of such bytes"


def test_numbers_above_the_tensors_range_are_clipped():
    x = torch.zeros(1, 16)
    x[0, 3] = 40.0
    assert through_nvfp4(x, 10.0 / REACH).max() == pytest.approx(10.0, rel=1e-6)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 48, bias=False)

    def forward(self, x):
        return self.down(self.up(x).relu())


def test_a_program_multiplies_what_both_operands_hold_and_survives_the_bundle():
    torch.manual_seed(0)
    module = Pair().eval()
    program = Program("p", module, (TensorSpec("x", "float32", ("B", 5, 64)),), (TensorSpec("y", "float32", ("B", 5, 48)),), (Profile("q", {}, 4),))
    exported, _ = apply_passes(capture(program, program.profiles[0]))
    signature = Signature.of(program, program.profiles[0])
    x = torch.randn(3, 5, 64)
    with torch.no_grad():
        hidden = module.up(x).relu()
    grids = {"up.weight": Grid.of(float(x.min()), float(x.max())), "down.weight": Grid.of(0.0, float(hidden.max()))}
    assert grids["down.weight"].largest == pytest.approx(float(hidden.max()), rel=1e-6)
    made = quantise(exported, signature, "nvfp4", list(linears(exported).values()), grids)

    def layer(x, weight, scale):
        rows = emulated(x, scale)[2]
        return rows @ emulated(weight.detach().double().numpy(), float(weight.detach().abs().max()) / REACH)[2].T

    inner = layer(x.double().numpy().reshape(15, 64), module.up.weight, grids["up.weight"].largest / REACH) + module.up.bias.detach().double().numpy()
    exact = layer(np.maximum(inner, 0), module.down.weight, grids["down.weight"].largest / REACH)
    y = made.module()(x).detach().double().numpy().reshape(15, 48)
    assert np.linalg.norm(y - exact) < 0.01 * np.linalg.norm(exact), "but for the few that float32 rounds the other way"
    assert np.linalg.norm(y - module(x).detach().double().numpy().reshape(15, 48)) > 0.05 * np.linalg.norm(exact), "4 bits are seen"

    stored = weights_of(made)
    assert sorted(tuple(t.shape) for t in stored.values() if t.dtype is torch.uint8) == [(48, 48), (96, 32)]
    assert sorted(tuple(t.shape) for t in stored.values() if t.dtype is torch.float8_e4m3fn) == [(48, 6), (96, 4)]
    again = load_graph(dump_graph(made), stored, signature, "here").module()
    for rows in (1, 4):
        x = torch.randn(rows, 5, 64)
        assert torch.equal(again(x), made.module()(x))


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
def test_torchao_makes_the_same_bytes():
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

    torch.manual_seed(0)
    x = torch.randn(64, 256) * torch.logspace(-1, 1, 64)[:, None]  # torchao has no subnormal scales
    scale = float(x.abs().max()) / REACH
    scales, packed = nvfp4_quantize(x, 16, torch.tensor(scale))
    assert torch.equal(block_scales(x, scale).float(), scales.float())
    assert torch.equal(pack(codes_of(x, block_scales(x, scale), scale)), packed)
