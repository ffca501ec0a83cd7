"""Explicit casts: where they are, and what they cost in accuracy."""

import warnings

import pytest
import torch
from torch import nn
from torch.fx import Interpreter

from reelstep.compiler.capture import capture
from reelstep.compiler.passes import apply_passes
from reelstep.compiler.passes.mixed_precision import PRODUCTS, Recast, mixed_precision
from reelstep.compiler.passes.quantise import linears, quantise
from reelstep.compiler.program import Profile, Program, TensorSpec
from reelstep.compiler.signature import Signature
from reelstep.kernels.attention import attention


class Residual(nn.Module):
    """A stack of pre-norm residual layers between two projections."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 64), nn.Linear(64, 8)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(64, eps=1e-6), nn.Linear(64, 128), nn.LayerNorm(128), nn.SiLU(), nn.Linear(128, 64)) for _ in range(12)
        )

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.last(x)


def captured():
    torch.manual_seed(0)
    spec = TensorSpec("x", "float32", ("B", 5, 8))
    program = Program("p", Residual(), (spec,), (TensorSpec("y", "float32", ("B", 5, 8)),), (Profile("q", {}, 6),))
    exported, _ = apply_passes(capture(program, program.profiles[0]))
    return program, exported, Signature.of(program, program.profiles[0])


def test_products_run_in_bfloat16_but_the_first_and_the_last_and_sums_in_float32():
    _, exported, signature = captured()
    nodes = list(mixed_precision(exported, signature).graph.nodes)
    dtypes = [node.meta["val"].dtype for node in nodes if node.target in PRODUCTS]
    assert dtypes == [torch.float32, *[torch.bfloat16] * 24, torch.float32]
    others = {str(node.target): node.meta["val"].dtype for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)}
    assert others["aten.rms_norm.default"] is torch.float32
    assert others["aten.add.Tensor"] is torch.float32
    assert others["aten.silu.default"] is torch.bfloat16, "what only products feed stays in bfloat16"
    assert others["aten.layer_norm.default"] is torch.bfloat16, "a norm between products too: its sums are float32 inside"


@torch.no_grad()
def test_it_is_more_accurate_than_autocast_and_than_casting_everything():
    program, exported, signature = captured()
    x = torch.randn(6, 5, 8)
    truth = program.module(x)

    def error(y):
        return float((y.float() - truth).norm() / truth.norm())

    mixed = error(mixed_precision(exported, signature).module()(x))
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mismatch dtype")  # autocast meets a float32 norm
        autocast = error(program.module(x))
    everything = error(program.module.to(torch.bfloat16)(x.bfloat16()))
    assert 0 < mixed < min(autocast, everything) / 1.5


@torch.no_grad()
def test_the_first_and_the_last_product_in_float32_save_a_third_of_the_error(monkeypatch):
    program, exported, signature = captured()
    x = torch.randn(6, 5, 8)
    truth = program.module(x)
    kept = (mixed_precision(exported, signature).module()(x) - truth).norm()
    monkeypatch.setattr(Recast, "run_node", Interpreter.run_node)
    assert (mixed_precision(exported, signature).module()(x) - truth).norm() > 1.5 * kept


@torch.no_grad()
def test_the_batch_stays_dynamic():
    _, exported, signature = captured()
    module = mixed_precision(exported, signature).module()
    for rows in (1, 2, 6):
        assert module(torch.zeros(rows, 5, 8)).shape == (rows, 5, 8)


def mixed_of(module, **inputs):
    """The mixed graph of a module for inputs of these sizes, as a module."""
    dtypes = {torch.float32: "float32", torch.int64: "int64"}
    specs = tuple(TensorSpec(name, dtypes[x.dtype], ("B", *x.shape[1:])) for name, x in inputs.items())
    y = module(*inputs.values())
    program = Program("p", module.eval(), specs, (TensorSpec("y", "float32", ("B", *y.shape[1:])),), (Profile("q", {}, 6),))
    exported, _ = apply_passes(capture(program, program.profiles[0]))
    return mixed_precision(exported, Signature.of(program, program.profiles[0])).module()


class Between(nn.Module):
    """What `rule` does to [B, L, 16] between layers that run in bfloat16."""

    def __init__(self, rule):
        super().__init__()
        self.layers, self.rule = nn.ModuleList(nn.Linear(16, 16) for _ in range(4)), rule

    def forward(self, x, keep=None):
        x = self.layers[1](self.layers[0](x))
        return self.layers[3](self.layers[2](self.rule(x) if keep is None else self.rule(x, keep)))


def turned(x):
    """Rotary positions, their angles by a product, as language models of that kind find them."""
    frequencies = 1e4 ** -(torch.arange(8) / 8)
    angles = torch.arange(x.shape[1]).float()[:, None] @ frequencies[None]
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


@torch.no_grad()
def test_angles_that_are_products_stay_in_float32():
    torch.manual_seed(0)
    module, x = Between(turned), torch.randn(1, 2048, 16)
    truth = module.double()(x.double())
    mixed = mixed_of(module.float(), x=x)
    assert (mixed(x) - truth).norm() / truth.norm() < 1e-2, "0.28 where they are rounded"


def test_so_do_cumulative_sums():
    mixed = mixed_of(Between(lambda x: (x + 1).cumsum(1) / x.shape[1]), x=torch.randn(1, 4, 16))
    (dtype,) = (node.meta["val"].dtype for node in mixed.graph.nodes if node.target is torch.ops.aten.cumsum.default)
    assert dtype is torch.float32


@torch.no_grad()
@pytest.mark.parametrize("kept", [3, 0])
def test_a_mask_of_the_least_float32_hides_keys_and_makes_no_nan(kept):
    def attended(x, keep):
        mask = (1.0 - (torch.arange(x.shape[1]) < keep).to(x.dtype))[:, None] * torch.finfo(torch.float32).min  # torch misreads one of another dtype
        return nn.functional.scaled_dot_product_attention(*[x[:, None]] * 3, attn_mask=mask[:, None])[:, 0]

    torch.manual_seed(0)
    module, x, keep = Between(attended), torch.randn(1, 8, 16), torch.tensor([[kept]])
    truth = module.double()(x.double(), keep)
    mixed = mixed_of(module.float(), x=x, keep=keep)
    assert (mixed(x, keep) - truth).norm() / truth.norm() < 1e-2


def test_attention_between_layers_in_e4m3_is_in_bfloat16_and_what_is_beside_it_too():
    class Heads(Between):
        def forward(self, x):
            q, k, v = (layer(x)[:, None] for layer in self.layers[:3])
            return self.layers[3](nn.functional.scaled_dot_product_attention(q.sigmoid(), k, v)[:, 0])

    spec = TensorSpec("x", "float32", ("B", 5, 16)), TensorSpec("y", "float32", ("B", 5, 16))
    program = Program("p", Heads(None), spec[:1], spec[1:], (Profile("q", {}, 6),))
    signature = Signature.of(program, program.profiles[0])
    exported, _ = apply_passes(capture(program, program.profiles[0]))
    in_e4m3 = quantise(exported, signature, "fp8", linears(exported).values(), {})
    values = {node.target: node.meta.get("val") for node in mixed_precision(in_e4m3, signature).graph.nodes}
    dtypes = {target: value.dtype for target, value in values.items() if isinstance(value, torch.Tensor)}
    assert dtypes[torch.ops.aten._scaled_mm.default] is torch.bfloat16
    assert dtypes[torch.ops.aten.scaled_dot_product_attention.default] is torch.bfloat16
    assert dtypes[torch.ops.aten.sigmoid.default] is torch.bfloat16


def test_what_an_op_of_several_dtypes_gives_is_read_as_it_is():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.qkv, self.last = nn.Linear(8, 16), nn.Linear(16, 48), nn.Linear(16, 8)

        def forward(self, x):
            q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            return self.last(attention(q, k, v)[0].transpose(1, 2).flatten(2).neg())

    spec = TensorSpec("x", "float32", ("B", 5, 8))
    program = Program("p", Heads(), (spec,), (TensorSpec("y", "float32", ("B", 5, 8)),), (Profile("q", {}, 6),))
    exported, _ = apply_passes(capture(program, program.profiles[0]), keep=("attention",))
    nodes = list(mixed_precision(exported, Signature.of(program, program.profiles[0])).graph.nodes)
    (op,) = (node for node in nodes if str(node.target) == "reelstep.attention.default")
    assert [value.dtype for value in op.meta["val"]] == [torch.bfloat16, torch.float32]
    (neg,) = (node for node in nodes if node.target is torch.ops.aten.neg.default)
    assert neg.meta["val"].dtype is torch.bfloat16, "the output was cast because lse beside it is float32"
