"""The 30B configuration against the published counts, on the meta device; the block against its formula, in float64."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from reelstep.compiler.capture import capture
from reelstep.compiler.compile import compile_model
from reelstep.compiler.graphs import ops_of
from reelstep.compiler.load import load
from reelstep.compiler.program import Profile
from reelstep.engine.models import MODELS
from reelstep.engine.models.movie_gen import (
    CONFIG_30B,
    MovieGenConfig,
    MovieGenTransformer,
    build_30b,
    denoise_program,
    split_programs,
)
from reelstep.engine.models.reel_tiny import DENOISER_CONFIG
from reelstep.engine.samplers.step_cache import PIECES, STEP_CACHES
from reelstep.engine.served import ServedModel
from reelstep.errors import ConfigError


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_the_30b_configuration_has_the_parameters_of_the_specification():
    model = build_30b()
    assert all(p.is_meta for p in model.parameters())
    assert count(model) == 29_303_494_656
    assert count(model.blocks) == 48 * 604_028_928


@pytest.mark.parametrize(
    ("changes", "total"),
    [
        ({"layers": 32, "width": 3072, "ffn": 8192, "heads": 24}, 4_921_617_408),
        ({"layers": 2, "width": 128, "ffn": 352, "heads": 2, "text_widths": (64, 48, 32), "positions": (8, 16, 16)}, 723_072),
        ({"condition_channels": 16}, 29_303_494_656 + 393_216),
    ],
)
def test_other_published_sizes_have_their_parameters(changes, total):
    with torch.device("meta"):
        assert count(MovieGenTransformer(replace(CONFIG_30B, **changes))) == total


@pytest.mark.parametrize(
    ("frames", "side", "tokens", "flops"),
    [(32, 96, 73_728, 1.0249e16), (24, 96, 55_296, 6.487e15), (16, 96, 36_864, 3.525e15), (32, 32, 8_192, 5.121e14), (1, 96, 2_304, 1.334e14)],
)
def test_tokens_and_flops_of_one_forward_are_those_of_the_specification(frames, side, tokens, flops):
    assert CONFIG_30B.tokens(frames, side, side) == tokens
    counter = FlopCounterMode(display=False)
    with counter, torch.device("meta"):
        x = torch.empty(1, 16, frames, side, side)
        out = build_30b()(x, torch.empty(1, 7, 6144), None, torch.empty(1, 1024, 6144))
    assert out.shape == x.shape
    # patch embedding and head, which the specification's formula leaves out, are below 0.05 %
    assert counter.get_total_flops() == pytest.approx(flops, rel=1e-3)


def tiny(**changes):
    config = MovieGenConfig(
        layers=2, width=32, ffn=48, heads=4, latent_channels=3, condition_channels=2, patch=(1, 2, 2), positions=(4, 4, 4), text_widths=(5, 7),
        time_frequencies=16, time_scale=1000.0, qk_norm=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return MovieGenTransformer(replace(config, **changes)).double()


def by_hand(model, x, t, condition, texts):
    """The paper's figure once more, plainly: loops over heads, no SDPA, no einops."""
    config = model.config

    def rms(v, weight):
        return v / torch.sqrt(v.square().mean(-1, keepdim=True) + 1e-6) * weight

    def attend(layer, q_in, kv_in):
        k = config.width // config.heads
        out = []
        for h in range(config.heads):
            cut = slice(h * k, (h + 1) * k)
            q, key, v = (w.weight[cut] @ z.transpose(-1, -2) for w, z in ((layer.q, q_in), (layer.k, kv_in), (layer.v, kv_in)))
            if config.qk_norm:
                q, key = (rms(z.transpose(-1, -2), norm.weight).transpose(-1, -2) for z, norm in ((q, layer.q_norm), (key, layer.k_norm)))
            weights = torch.softmax(q.transpose(-1, -2) @ key / math.sqrt(k), -1)
            out.append(weights @ v.transpose(-1, -2))
        return torch.cat(out, -1) @ layer.out.weight.T

    half = config.time_frequencies // 2
    angle = config.time_scale * t[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half).double()
    embedding = torch.cat([angle.cos(), angle.sin()], 1)
    embedding = torch.nn.functional.silu(embedding @ model.time.mlp[0].weight.T) @ model.time.mlp[2].weight.T
    six = (torch.nn.functional.silu(embedding) @ model.time.shared.weight.T).reshape(len(t), 6, config.width)
    parts = []
    for text, linear, norm in zip(texts, model.text.linears, model.text.norms, strict=True):
        y = text @ linear.weight.T
        y = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, unbiased=False, keepdim=True) + 1e-6)
        parts.append(y * norm.weight + norm.bias)
    context = torch.cat(parts, 1)
    joined = torch.cat([x, condition], 1)
    b, _, f, h, w = joined.shape
    patches, positions = [], []
    frames, rows, columns = model.positions.parameters()
    for i in range(f):
        for j in range(h // 2):
            for k in range(w // 2):
                patches.append(joined[:, :, i, 2 * j : 2 * j + 2, 2 * k : 2 * k + 2].reshape(b, -1))
                positions.append(frames[i] + rows[j] + columns[k])
    tokens, positions = torch.stack(patches, 1) @ model.patch_in.weight.T, torch.stack(positions)
    for block in model.blocks:
        s1, m1, g1, s2, m2, g2 = ((six + block.table)[:, i, None] for i in range(6))
        tokens = tokens + positions
        y = rms(tokens, block.norm1.weight) * (1 + m1) + s1
        tokens = tokens + g1 * attend(block.self_attention, y, y)
        tokens = tokens + attend(block.cross_attention, tokens, context)
        y = rms(tokens, block.norm2.weight) * (1 + m2) + s2
        gate = y @ block.ffn.w1.weight.T
        tokens = tokens + g2 * ((gate * torch.sigmoid(gate) * (y @ block.ffn.w3.weight.T)) @ block.ffn.w2.weight.T)
    shift, scale = (embedding + model.table[0])[:, None], (embedding + model.table[1])[:, None]
    tokens = (rms(tokens, model.norm.weight) * (1 + scale) + shift) @ model.patch_out.weight.T
    out = torch.zeros(b, config.latent_channels, f, h, w, dtype=x.dtype)
    for n in range(tokens.shape[1]):
        i, rest = divmod(n, (h // 2) * (w // 2))
        j, k = divmod(rest, w // 2)
        out[:, :, i, 2 * j : 2 * j + 2, 2 * k : 2 * k + 2] = tokens[:, n].reshape(b, config.latent_channels, 2, 2)
    return out


@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_the_transformer_is_the_papers_figure(qk_norm):
    model = tiny(qk_norm=qk_norm)
    for name, weight in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.normal_(weight)
    x, condition = torch.randn(2, 3, 3, 4, 6).double(), torch.randn(2, 2, 3, 4, 6).double()
    t, texts = torch.tensor([0.1, 0.7]).double(), (torch.randn(2, 4, 5).double(), torch.randn(2, 3, 7).double())
    got = model(x, model.time(t), condition, model.text(*texts))
    assert torch.allclose(got, by_hand(model, x, t, condition, texts), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other():
    model = tiny(qk_norm=True)
    x, condition = torch.randn(3, 3, 2, 4, 4).double(), torch.randn(3, 2, 2, 4, 4).double()
    modulation, context = model.time(torch.rand(3).double()), torch.randn(3, 5, 32).double()
    together = model(x, modulation, condition, context)
    for i in range(3):
        row = slice(i, i + 1)
        assert torch.allclose(model(x[row], modulation[row], condition[row], context[row]), together[row], atol=1e-12)


def in_pieces(run, x, modulation, condition, context):
    """denoise_embed, denoise_first and denoise_rest one after another, and denoise_last for the same point: everything that came out, by name."""
    given = {"x": x, "modulation": modulation, "context": context, **({} if condition is None else {"condition": condition})}
    embedded = run("denoise_embed", {name: given[name] for name in given if name != "context"})
    first = run("denoise_first", {"hidden": embedded["hidden"], "modulation": modulation, "context": context})
    rest = run("denoise_rest", {"hidden": first["hidden"], "modulation": modulation, "context": context})
    residual = first["hidden"] - embedded["hidden"] + rest["residual"]
    last = run("denoise_last", {"hidden": embedded["hidden"], "residual": residual, "modulation": modulation})
    return {**embedded, "tokens": first["hidden"] + rest["residual"], "velocity": rest["velocity"], "again": last["velocity"]}


def test_gradients_are_those_of_finite_differences():
    model = tiny(qk_norm=True)
    x, modulation, condition = torch.randn(1, 3, 1, 2, 4), torch.randn(1, 7, 32), torch.randn(1, 2, 1, 2, 4)
    inputs = [v.double().requires_grad_() for v in (x, modulation, condition, torch.randn(1, 2, 32))]
    assert torch.autograd.gradcheck(model, inputs, fast_mode=True)


def test_a_graph_has_each_op_as_one_node():
    program = denoise_program(tiny(qk_norm=True).float(), 5, sizes(2, 4, 4))
    counts = ops_of(capture(program, program.profiles[0]))
    ours = {op.split(".")[1]: n for op, n in counts.items() if op.startswith("reelstep.")}
    assert ours == {"patchify": 1, "rms_modulate": 2 * 2 + 1, "qk_norm_rope": 2 * 2, "gated_residual": 2 * 2, "swiglu": 2, "unpatchify": 1}


def sizes(f, h, w):
    return (Profile("video", {"F": f, "H": h, "W": w}, 1),)


def runner(model, profiles, text_tokens):
    programs = {program.name: program for program in split_programs(model, text_tokens, profiles)}
    assert {*programs} == {*PIECES}

    def run(name, inputs):
        outputs = programs[name].module(*(inputs[edge.name] for edge in programs[name].inputs))
        return dict(zip((edge.name for edge in programs[name].outputs), outputs if isinstance(outputs, tuple) else (outputs,), strict=True))

    return run


@pytest.mark.parametrize("channels", [0, 2])
@torch.no_grad()
def test_the_pieces_one_after_another_are_the_whole_network(channels):
    model = tiny(condition_channels=channels, qk_norm=True)
    x, modulation, context = torch.randn(2, 3, 3, 4, 6).double(), model.time(torch.tensor([0.1, 0.7]).double()), torch.randn(2, 5, 32).double()
    condition = torch.randn(2, 2, 3, 4, 6).double() if channels else None
    got = in_pieces(runner(model, sizes(3, 4, 6), 5), x, modulation, condition, context)
    assert torch.equal(got["velocity"], model(x, modulation, condition, context)), "to the bit"
    assert torch.allclose(got["again"], got["velocity"], rtol=1e-12, atol=1e-12), "from the residual"
    assert got["hidden"].shape == got["tokens"].shape == got["signal"].shape == (2, 3, 2, 3, 32)


@torch.no_grad()
def test_the_signal_is_what_the_first_blocks_self_attention_takes():
    model = tiny()
    x, condition = torch.randn(2, 3, 2, 4, 4).double(), torch.randn(2, 2, 2, 4, 4).double()
    modulation, context = torch.randn(2, 7, 32).double(), torch.randn(2, 5, 32).double()
    taken = []
    model.blocks[0].self_attention.register_forward_pre_hook(lambda module, arguments: taken.append(arguments[0]))
    model(x, modulation, condition, context)
    got = in_pieces(runner(model, sizes(2, 4, 4), 5), x, modulation, condition, context)
    assert torch.equal(got["signal"].flatten(1, 3), taken[0])


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """A small model and its bundle with the pieces."""
    model, profiles = tiny(condition_channels=0).float(), sizes(2, 4, 4)
    programs, settings = [denoise_program(model, 5, profiles), *split_programs(model, 5, profiles)], MODELS["reel-tiny"].settings.to_json()
    bundle = compile_model(
        model="tiny", version="1", settings=settings, programs=programs, backend="openvino", precision="float32",
        out=tmp_path_factory.mktemp("split") / "tiny.reel", solvers={}, card="",
    )  # fmt: skip
    return model, bundle


def test_the_pieces_bring_no_weights_of_their_own_into_a_bundle(split):
    bundle = split[1]
    stored = {name: {*entry["video"]["weights"].values()} for name, entry in bundle.manifest["programs"].items()}
    assert stored["denoise"] == {*bundle.tensors} == set().union(*(stored[piece] for piece in PIECES))


def test_a_bundle_with_the_pieces_offers_every_step_cache(split):
    assert {*ServedModel.of(split[1]).step_caches} == {*STEP_CACHES}


@torch.no_grad()
def test_a_backend_runs_the_pieces_as_the_whole(split):
    model, bundle = split
    engines = load(bundle, None)
    x, modulation, context = torch.randn(1, 3, 2, 4, 4), torch.randn(1, 7, 32), torch.randn(1, 5, 32)
    got = in_pieces(lambda name, inputs: engines[name, "video"](inputs), x, modulation, None, context)
    expected = model(x, modulation, None, context)
    for name in ("velocity", "again"):
        assert torch.allclose(got[name], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())), name
    whole = engines["denoise", "video"]({"x": x, "modulation": modulation, "context": context})
    assert torch.allclose(got["velocity"], whole["velocity"], rtol=1e-5, atol=1e-5)


def test_a_transformer_of_one_block_has_no_pieces():
    with pytest.raises(ConfigError, match="1 layer has nothing behind its first block"):
        split_programs(tiny(layers=1), 5, sizes(2, 4, 4))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ConfigError, match="width 32 is not divisible by 5 heads"):
        tiny(heads=5)


def test_reel_tiny_is_the_same_class_with_256_tokens():
    assert DENOISER_CONFIG.tokens(4, 8, 8) == 256
    assert isinstance(MODELS["reel-tiny"].build().denoiser, MovieGenTransformer)


def test_dit_mid_has_4096_tokens_and_the_same_weights_every_time():
    spec = MODELS["dit-mid"]
    one, two = spec.build(), spec.build()
    denoise = next(p for p in spec.programs(one) if p.name == "denoise")
    sizes = denoise.profile("video").sizes
    assert one.config.tokens(sizes["F"], sizes["H"], sizes["W"]) == 4096
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
