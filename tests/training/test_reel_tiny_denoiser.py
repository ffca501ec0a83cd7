"""The denoiser's recipe: what is drawn, what is minimised, what each optimiser moves."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from reelstep.engine.models.byte_text import ByteTextEncoder
from reelstep.engine.models.movie_gen import MovieGenTransformer
from reelstep.engine.models.reel_tiny import DENOISER_CONFIG, TEXT_CONFIG
from reelstep.errors import ConfigError
from reelstep.training.plain_attention import PlainAttention
from reelstep.training.zoo import reel_tiny_denoiser
from reelstep.training.zoo.reel_tiny_denoiser import (
    KINDS,
    Latents,
    draw,
    draw_clips,
    encode_text,
    flow_loss,
    join,
    kept,
    losses_of,
    optimizers,
    tokens_of,
    warm_up_text,
)  # fmt: skip


@pytest.fixture
def data():
    torch.manual_seed(0)
    n = 6
    names = ["cat"] + ["abacus"] * (n - 1)
    return Latents(torch.randn(n, 16, 4, 8, 8).half(), torch.randn(n, 16, 1, 8, 8).half(), names, ["grow"] * n, [0] * n, ["red"] * n, 1.0, 0.0)


def test_only_animated_samples_see_the_picture_and_pictures_have_one_frame(data):
    shapes = {}
    for kind in ("animated", "video", "picture"):
        batch = draw(data, np.random.default_rng(0), kind, 5)
        shapes[kind] = tuple(batch.x1.shape)
        assert bool(batch.condition.any()) == (kind == "animated")
        assert bool(((batch.t > 0) & (batch.t < 1)).all())
    assert shapes == {"animated": (5, 16, 4, 8, 8), "video": (5, 16, 4, 8, 8), "picture": (5, 16, 1, 8, 8)}


def test_everyday_stickers_are_drawn_more_often_for_words_alone(data):
    assert data.everyday.tolist() == [0]
    for kind in ("animated", "video"):
        drawn = draw(data, np.random.default_rng(0), kind, 300).x1
        found = float((drawn == data.video[0].float()).flatten(1).all(1).float().mean())
        expected = KINDS[kind].everyday + (1 - KINDS[kind].everyday) / 6
        assert abs(found - expected) < 0.1, "four deviations of 300 draws"


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # autocast meets a float32 norm
def test_a_denoiser_that_gives_zero_has_the_loss_of_the_target(data):
    denoiser = MovieGenTransformer(DENOISER_CONFIG)
    torch.nn.init.zeros_(denoiser.patch_out.weight)
    both = join([draw(data, np.random.default_rng(0), kind, 2) for kind in ("animated", "video")])
    loss = flow_loss(ByteTextEncoder(TEXT_CONFIG)(both.tokens), denoiser, both)
    assert torch.allclose(loss, (both.x1 - both.noise).square().flatten(1).mean(1), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_a_step_reaches_text_encoder_and_denoiser_from_every_kind(data):
    text, denoiser = ByteTextEncoder(TEXT_CONFIG), MovieGenTransformer(DENOISER_CONFIG)
    losses = losses_of(text, denoiser, dict.fromkeys(KINDS, data), np.random.default_rng(0))
    assert set(losses) == set(KINDS)
    for loss in losses.values():
        (gradient,) = torch.autograd.grad(loss, text.embedding.weight, retain_graph=True)
        assert bool(gradient.any())


def test_text_is_encoded_without_its_common_padding_to_the_same_numbers():
    torch.manual_seed(0)
    text, tokens = ByteTextEncoder(TEXT_CONFIG), tokens_of(["a cat", "", "a rather long caption of a cat"])
    assert torch.allclose(encode_text(text, tokens), text(tokens), atol=1e-5)


def test_plain_attention_is_the_fused_one_with_and_without_a_mask():
    q, k, v = torch.randn(3, 2, 4, 6, 8, dtype=torch.float64).unbind(0)
    mask = torch.randn(2, 1, 1, 6, dtype=torch.float64)
    for extra in ({}, {"attn_mask": mask}):
        expected = F.scaled_dot_product_attention(q, k, v, **extra)
        with PlainAttention():
            found = F.scaled_dot_product_attention(q, k, v, **extra)
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_muon_moves_the_blocks_matrices_only_and_every_parameter_is_moved_once():
    text, denoiser = ByteTextEncoder(TEXT_CONFIG), MovieGenTransformer(DENOISER_CONFIG)
    muon, adam = optimizers(text, denoiser)
    moved = [p for optimizer in (muon, adam) for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in moved} == {id(p) for p in [*text.parameters(), *denoiser.parameters()]}
    assert len(moved) == len({id(p) for p in moved})
    of_text = {id(p) for p in text.parameters()}
    assert not of_text & {id(p) for group in muon.param_groups for p in group["params"]}
    assert {id(p) for p in adam.param_groups[1]["params"]} == of_text


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_the_warm_up_teaches_the_names_of_things(data, tmp_path, monkeypatch, capsys):
    small = replace(TEXT_CONFIG, width=64, layers=2)  # Muon's products are in bfloat16, slow on a CPU without it
    for name, value in (("WARM_UP_STEPS", 100), ("WARM_UP_BATCH", 12), ("TEXT_CONFIG", small)):
        monkeypatch.setattr(reel_tiny_denoiser, name, value)
    text = ByteTextEncoder(small)
    warm_up_text(text, data, 0, tmp_path / "text.pt")
    name, *others = map(float, capsys.readouterr().out.split("right: ")[1].split(",")[0].split())
    assert name > 0.8, "two names are soon told apart; always the commoner one would be right for about half"
    assert others == [1.0] * 3, "there is but one of each"
    contexts = text(tokens_of(["a cat grows on red", "an abacus grows on red"])).mean(1).detach()
    assert float((contexts[0] - contexts[1]).norm() / contexts.norm()) > 0.1


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_a_warm_up_that_was_cut_off_goes_on_to_the_same_and_one_that_is_done_is_kept(data, tmp_path, monkeypatch):
    for name, value in (("WARM_UP_STEPS", 4), ("WARM_UP_BATCH", 4), ("WARM_UP_SAVES", 2)):
        monkeypatch.setattr(reel_tiny_denoiser, name, value)

    def warmed(file):
        torch.manual_seed(1)
        text = ByteTextEncoder(TEXT_CONFIG)
        warm_up_text(text, data, 0, tmp_path / file)
        return text

    whole = warmed("whole.pt")
    calls = iter(range(3))

    def cut_off(*args):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return draw_clips(*args)

    monkeypatch.setattr(reel_tiny_denoiser, "draw_clips", cut_off)
    with pytest.raises(KeyboardInterrupt):
        warmed("cut.pt")
    monkeypatch.setattr(reel_tiny_denoiser, "draw_clips", draw_clips)
    again = warmed("cut.pt")
    monkeypatch.setattr(reel_tiny_denoiser, "draw_clips", lambda *_: pytest.fail("it was done again"))
    for found in (again, warmed("cut.pt")):
        assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), found.parameters(), strict=True))


def test_clips_that_were_encoded_are_kept_and_not_taken_for_others(data, tmp_path):
    asked = {"seed": 0, "clips": 100}
    assert torch.equal(kept(tmp_path / "latents.pt", asked, lambda: data).video, data.video)
    assert torch.equal(kept(tmp_path / "latents.pt", asked, lambda: pytest.fail("they were encoded again")).video, data.video)
    with pytest.raises(ConfigError, match=r"latents\.pt was saved with clips 100, asked for 200\. Go on with what it was saved with"):
        kept(tmp_path / "latents.pt", {"seed": 0, "clips": 200}, lambda: data)
