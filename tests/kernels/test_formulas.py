"""What an op computes, against other people's code or a closed form in float64."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from einops import rearrange
from torch import Tensor

from reelstep.engine.samplers.guidance.cfg import combine
from reelstep.engine.samplers.ns import Table, sample, start
from reelstep.errors import ConfigError, NotFound
from reelstep.kernels import OPS
from reelstep.kernels.attention import attention
from reelstep.kernels.attention_choice import ATTENTIONS, choose
from reelstep.kernels.fp8_norm_quantise import fp8_norm_quantise
from reelstep.kernels.gated_residual import gated_residual
from reelstep.kernels.gelu_tanh import gelu_tanh
from reelstep.kernels.jit import MAX_WIDTH, per_token, row_tile
from reelstep.kernels.lse_merge import lse_merge
from reelstep.kernels.patchify import patchify
from reelstep.kernels.qk_norm_rope import qk_norm_rope, rotary_3d
from reelstep.kernels.rms_modulate import rms_modulate
from reelstep.kernels.solver_step import solver_step
from reelstep.kernels.swiglu import swiglu
from reelstep.kernels.unpatchify import unpatchify


def randn(*sizes: int) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(sizes)))


def same(found: Tensor, exact: Tensor) -> bool:
    return torch.allclose(found, exact, rtol=1e-9, atol=1e-9)


def test_both_norms_divide_by_what_they_are_named_for() -> None:
    x, scale, shift = randn(2, 3, 7), randn(2, 7), randn(2, 7) + 1
    y = x / (x.square().sum(-1, keepdim=True) / 7 + 1e-3).sqrt()
    assert same(rms_modulate(x, scale, shift, None, 1e-3), y * (1 + scale[:, None]) + shift[:, None])
    y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-3).sqrt()
    assert same(rms_modulate(x, scale, shift, None, 1e-3, centred=True), y * (1 + scale[:, None]) + shift[:, None])


@pytest.mark.parametrize("heads_together", [False, True])
def test_queries_and_keys_are_normed_and_turned_as_in_diffusers(heads_together: bool) -> None:
    grid, n, k = (2, 3, 2), 3, 16
    q, key, weight = randn(2, 12, n, k), randn(2, 12, n, k) + 1, randn(n * k if heads_together else k)
    cos, sin = (table.double() for table in rotary_3d(grid, k))
    for found, x in zip(qk_norm_rope(q, key, weight, weight, cos, sin), (q, key), strict=True):
        rows = x.flatten(2) if heads_together else x
        normed = (rows / (rows.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight).reshape(x.shape)
        twice = (table.repeat_interleave(2, 1).float() for table in (cos, sin))
        assert torch.allclose(found, apply_rotary_emb(normed, tuple(twice), sequence_dim=1).double(), rtol=1e-6, atol=1e-6)


def test_turned_queries_and_keys_meet_by_how_far_apart_they_are() -> None:
    cos, sin = rotary_3d((4, 5, 6), 24)
    q, k = (randn(1, 1, 1, 24).expand(1, 120, 1, 24) for _ in range(2))
    q, k = qk_norm_rope(q, k + 1, None, None, cos.double(), sin.double())
    scores = (q[0, :, 0] @ k[0, :, 0].T).reshape(4, 5, 6, 4, 5, 6)
    assert torch.allclose(scores[:-1, :-2, :-3, :-1, :-2, :-3], scores[1:, 2:, 3:, 1:, 2:, 3:], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(scores[:-1, :, :, 0], scores[1:, :, :, 0])


def test_a_rotation_has_its_angles_in_time_then_height_then_width() -> None:
    cos, sin = rotary_3d((2, 3, 4), 12)
    assert cos.shape == (24, 6)
    place = (1 * 3 + 2) * 4 + 3
    angles = [1.0, 100**-1.0, 2.0, 2 * 100**-1.0, 3.0, 3 * 100**-1.0]
    assert torch.allclose(torch.atan2(sin[place], cos[place]), torch.tensor(angles), rtol=1e-6, atol=1e-6)


def test_small_ops_are_their_formulas() -> None:
    x, y, gate = randn(2, 3, 8), randn(2, 3, 8) + 1, randn(2, 8)
    assert same(gated_residual(x, gate, y), torch.addcmul(x, gate[:, None], y))
    assert same(swiglu(x, y), x / (1 + (-x).exp()) * y)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    assert same(gelu_tanh(x), x / 2 * (1 + inner.tanh()))


@pytest.mark.parametrize("channels_last", [False, True])
def test_patches_are_cut_as_einops_cuts_them_and_put_back(channels_last: bool) -> None:
    x, (p, q, r) = randn(2, 3, 4, 6, 4), (2, 3, 1)
    inner = "(p q r C)" if channels_last else "(C p q r)"
    tokens = patchify(x, (p, q, r), channels_last)
    assert torch.equal(tokens, rearrange(x, f"B C (F p) (H q) (W r) -> B (F H W) {inner}", p=p, q=q, r=r))
    assert torch.equal(unpatchify(tokens, (2, 2, 4), (p, q, r), channels_last), x)


def test_attention_and_lse_are_those_of_a_softmax() -> None:
    q, k, v = randn(2, 3, 5, 8), randn(2, 3, 9, 8) * 3, randn(2, 3, 9, 8)
    lengths = torch.tensor([9, 4], dtype=torch.int32)
    for row, some in enumerate((9, 4)):
        scores = torch.einsum("nlk,nsk->nls", q[row], k[row, :, :some]) / math.sqrt(8)
        weights = scores.softmax(-1)
        for implementation in ("sdpa", "reference", "auto"):
            out, lse = attention(q, k, v, lengths, implementation=implementation)
            assert torch.allclose(out[row], torch.einsum("nls,nsk->nlk", weights, v[row, :, :some]), rtol=1e-6, atol=1e-6)
            assert torch.allclose(lse[row].double(), scores.exp().sum(-1).log(), rtol=1e-6, atol=1e-6)
            assert out.transpose(1, 2).is_contiguous(), "joining the heads must cost nothing"


def test_attentions_to_parts_merge_to_the_attention_to_all() -> None:
    """As a ring does it: pieces of uneven sizes, one of them empty, in any order."""
    q, k, v = randn(2, 2, 4, 8), randn(2, 2, 20, 8) * 4, randn(2, 2, 20, 8)
    scores = q @ k.mT * 8**-0.5
    cuts = [0, 7, 7, 8, 20]
    parts = [attention(q, k[:, :, i:j], v[:, :, i:j]) for i, j in pairwise(cuts)]
    for order in ((0, 1, 2, 3), (3, 1, 0, 2)):
        out, lse = parts[order[0]]
        for i in order[1:]:
            out, lse = lse_merge(out, lse, *parts[i])
        assert same(out, scores.softmax(-1) @ v)
        assert same(lse, scores.logsumexp(-1))


def test_a_merge_with_nothing_changes_nothing_and_of_nothing_is_nothing() -> None:
    out, lse = randn(1, 2, 3, 4), randn(1, 2, 3) * 300
    nothing = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    for pair in ((out, lse, *nothing), (*nothing, out, lse)):
        merged = lse_merge(*pair)
        assert same(merged[0], out)
        assert same(merged[1], lse)
    merged = lse_merge(*nothing, *nothing)
    assert (merged[0] == 0).all()
    assert (merged[1] == -torch.inf).all()


def test_a_row_of_fp8_is_within_half_a_step_of_the_norm() -> None:
    x, scale, shift = (randn(2, 5, 64) * 30).float(), randn(2, 64).float(), randn(2, 64).float()
    values, steps = fp8_norm_quantise(x, scale, shift)
    exact = rms_modulate(x.double(), scale.double(), shift.double())
    assert values.dtype == torch.float8_e4m3fn
    assert torch.allclose(steps.double() * 448, exact.abs().amax(-1), rtol=1e-6)
    assert (values.float().abs().amax(-1) == 448).all(), "the largest of a row takes the largest value there is"
    error = (values.double() * steps.double()[..., None] - exact).abs()
    # Four significant bits, so half a step is 1/16 at most; 2**-10 of the scale where E4M3 is subnormal.
    assert (error <= exact.abs() / 16 * (1 + 1e-5) + steps.double()[..., None] * 2**-10).all()
    zeros, one = fp8_norm_quantise(torch.zeros(1, 2, 8))
    assert (zeros.float() == 0).all()
    assert (one > 0).all()


def test_steps_of_a_table_are_those_of_its_sampler() -> None:
    table = Table("made up", "condot", 1, (0.0, 0.3, 0.5, 1.0), (1.0, 0.9, 0.7), ((0.3,), (0.1, 0.4), (-0.2, 0.3, 0.6)))
    noise, scale = randn(2, 4, 1, 3, 3), 4.0
    text, null = randn(3, 2, 4, 1, 3, 3), randn(3, 2, 4, 1, 3, 3) + 1
    sampler, velocities = sample(table, start(table, noise)), []
    next(sampler)
    for i in range(3):
        x, u = solver_step(noise, text[i], null[i], velocities, scale=scale, a=table.a[i], b=table.b[i])
        velocities.append(u)
        assert same(u, combine(text[i], null[i], scale))
        if i < 2:
            assert same(x, sampler.send(u)[0])
    with pytest.raises(StopIteration) as done:
        sampler.send(u)
    assert same(x, done.value.value)
    x, u = solver_step(noise, text[0], None, (), scale=scale, a=1.0, b=(0.5,))
    assert same(x, noise + 0.5 * text[0])
    assert torch.equal(u, text[0])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rms_modulate(randn(2, 3), randn(2, 3), randn(2, 3)), r"x has shape \[2, 3\]; it must be \[B, L, D\]"),
        (lambda: rms_modulate(randn(2, 3, 4), randn(2, 5), randn(2, 4)), r"scale has shape \[2, 5\]; it must be \[2, 4\] or \[2, 3, 4\]"),
        (lambda: gated_residual(randn(2, 3, 4), randn(2, 4), randn(2, 3, 5)), r"y has shape \[2, 3, 5\]"),
        (lambda: swiglu(randn(2, 4), randn(4)), r"b has shape \[4\]; it must be \[2, 4\]"),
        (lambda: qk_norm_rope(randn(1, 2, 2, 4), randn(1, 2, 2, 4), randn(4), randn(8), randn(2, 2)), "cos and sin are given or left out together"),
        (lambda: qk_norm_rope(randn(1, 2, 2, 4), randn(1, 3, 2, 4), None, None, randn(2, 2), randn(2, 2)), r"cos has shape \[2, 2\]; it must be \[3, 2\]"),
        (lambda: qk_norm_rope(randn(1, 2, 2, 5), randn(1, 2, 2, 4), None, None, randn(2, 2), randn(2, 2)), "q has head dim 5; a rotation turns pairs"),
        (lambda: qk_norm_rope(randn(1, 2, 2, 4), randn(1, 2, 2, 5), None, None, randn(2, 2), randn(2, 2)), "k has head dim 5; a rotation turns pairs"),
        (lambda: rotary_3d((1, 1, 1), 7), "head dim 7"),
        (lambda: patchify(randn(1, 2, 3, 4, 4), (2, 2, 2)), r"patch \(2, 2, 2\) does not divide F, H, W = \(3, 4, 4\)"),
        (lambda: unpatchify(randn(1, 6, 8), (1, 2, 2), (1, 2, 2)), r"are not \[B, 4, a multiple of 4\]"),
        (lambda: unpatchify(randn(1, 4, 8), (1, -2, -2), (1, 2, 2)), "of a grid at least 0"),
        (lambda: attention(randn(1, 1, 2, 0), randn(1, 1, 2, 0), randn(1, 1, 2, 0)), "heads of no values"),
        (lambda: fp8_norm_quantise(randn(1, 2, 4), randn(1, 4)), "scale and shift are given or left out together"),
        (lambda: lse_merge(randn(1, 1, 2, 4), randn(1, 1, 2), randn(1, 1, 2, 4), randn(1, 2)), r"lse_b has shape \[1, 2\]"),
        (lambda: solver_step(randn(4), randn(4), None, [randn(4)], scale=1.0, a=1.0, b=(1.0,)), "1 coefficients for 1 stored velocities and a new one; give 2"),
        (lambda: solver_step(randn(4), randn(4), randn(5), [], scale=1.0, a=1.0, b=(1.0,)), r"null has shape \[5\]"),
        (lambda: attention(randn(1, 2, 3, 4), randn(1, 2, 3, 4), randn(1, 2, 3, 4), torch.tensor([3])), "make them int32"),
        (lambda: attention(randn(1, 2, 3, 4), randn(1, 2, 3, 4), randn(1, 2, 3, 4).float()), "cast them to one dtype"),
        (lambda: attention(randn(1, 2, 3, 4), randn(1, 2, 3, 4), randn(1, 2, 3, 4), scale=-1.0), "scale -1.0; it must be above 0"),
        (lambda: attention(randn(1, 2, 3, 4), randn(1, 2, 3, 4), randn(1, 2, 3, 4), implementation="fa3"), "attention 'fa3' cannot run here: package"),
        (lambda: row_tile(MAX_WIDTH + 1), "at most 32768"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_runs(call, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=words):
        call()


def test_the_first_attention_that_takes_the_tensors_is_chosen() -> None:
    q = torch.randn(1, 1, 4, 8)
    assert choose("auto", q, None).name == "sdpa"
    assert choose("auto", q.to("meta"), None).name == "reference"
    assert {ATTENTIONS[name].name for name in ATTENTIONS} == set(ATTENTIONS)
    with pytest.raises(NotFound, match=r"unknown attention 'flash'; known: fa3, reference, sdpa, triton"):
        choose("flash", q, None)


def test_a_package_is_looked_for_once_and_not_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from reelstep.kernels import attention_fa3

    asked, find_spec = [], attention_fa3.find_spec
    monkeypatch.setattr(attention_fa3, "find_spec", lambda name: (asked.append(name), find_spec(name))[1])
    for _ in range(3):
        assert choose("auto", torch.randn(1, 1, 4, 8), None).name == "sdpa"
    assert len(asked) <= 1


def test_a_package_for_another_torch_is_as_good_as_none_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from reelstep.kernels import attention_fa3

    def breaks(_: str) -> None:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(attention_fa3, "find_spec", lambda _: "here")
    monkeypatch.setattr(attention_fa3, "import_module", breaks)
    attention_fa3.lacks.cache_clear()
    try:
        assert choose("auto", torch.randn(1, 1, 4, 8), None).name == "sdpa"
        with pytest.raises(ConfigError, match="package flash_attn_interface cannot be imported: undefined symbol"):
            choose("fa3", torch.randn(1, 1, 4, 8), None)
    finally:
        attention_fa3.lacks.cache_clear()


def test_vectors_of_a_batch_row_are_not_written_out_for_every_token() -> None:
    """Whatever they are cut from: a gigabyte each at 73,728 tokens of width 6144."""
    rows, chunk, turned = torch.randn(2, 8), torch.randn(2, 48).chunk(6, -1)[1], torch.randn(8, 2).mT
    for pair in ((rows, chunk), (chunk, chunk), (rows, turned), (turned, turned)):
        found = per_token(1000, *pair)
        assert {x.stride()[1:] for x in found} == {(0, 1)}
        assert found[0].stride() == found[1].stride()
        for seen, vector in zip(found, pair, strict=True):
            assert torch.equal(seen, vector[:, None].expand(-1, 1000, -1))
    assert {x.stride()[1:] for x in per_token(1000, rows[:1], chunk[:1])} == {(0, 1)}


def test_flash_attention_3_is_chosen_on_hopper_where_its_package_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package shows the layout and the arguments it is called with; the numbers are its own formula's."""
    from reelstep.kernels import attention_fa3

    class Package:
        @staticmethod
        def flash_attn_with_kvcache(
            q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, softmax_scale: float, causal: bool, return_softmax_lse: bool
        ) -> tuple[Tensor, ...]:
            assert not causal
            assert return_softmax_lse
            assert cache_seqlens.is_contiguous()
            out, lse = attention(*(x.transpose(1, 2) for x in (q, k_cache, v_cache)), cache_seqlens, softmax_scale, "reference")
            return out.transpose(1, 2), lse, torch.empty(0)

    q, k, v = (torch.randn(2, 3, n, 16) for n in (5, 7, 7))
    lengths = torch.tensor([7, 5, 2, 5], dtype=torch.int32)[::2]
    monkeypatch.setattr(attention_fa3, "import_module", lambda _: Package)
    for found, exact in zip(attention_fa3.run(q, k, v, lengths, 0.25), attention(q, k, v, lengths, 0.25, "reference"), strict=True):
        assert torch.equal(found, exact)


def test_without_triton_every_op_still_has_its_formula() -> None:
    code = """
import sys
sys.modules["triton"] = None  # importing it now raises ImportError
import torch
from reelstep.kernels import OPS
from reelstep.kernels.jit import HAS_TRITON
assert not HAS_TRITON
for op in OPS.values():
    def make(*sizes, dtype=None):
        return torch.randn(sizes).to(dtype or torch.float32)
    arguments = next(op.examples(make))
    op.overload(*arguments)
    try:
        op.launch(*arguments)
    except Exception as error:
        assert "install reelstep[triton]" in str(error), error
    else:
        raise AssertionError(op.name)
print(len(OPS))
"""
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == str(len(OPS)), found.stderr[-3000:]
