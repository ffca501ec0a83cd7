"""The denoiser's recipe: what is drawn, what is minimised, what each optimiser moves."""

import numpy as np
import pytest
import torch

from reelstep.engine.models.byte_text import ByteTextEncoder
from reelstep.engine.models.movie_gen import MovieGenTransformer
from reelstep.engine.models.reel_tiny import DENOISER_CONFIG, TEXT_CONFIG
from reelstep.training.zoo.reel_tiny_denoiser import Latents, draw, flow_loss, optimizers, warm_up_text


@pytest.fixture
def data():
    torch.manual_seed(0)
    n = 6
    return Latents(torch.randn(n, 16, 4, 8, 8).half(), torch.randn(n, 16, 1, 8, 8).half(), ["cat"] * n, ["grow"] * n, [0] * n, ["red"] * n, 1.0, 0.0)


def test_only_animated_samples_see_the_picture_and_pictures_have_one_frame(data):
    shapes = {}
    for kind in ("animated", "video", "picture"):
        batch = draw(data, np.random.default_rng(0), kind, 5)
        shapes[kind] = tuple(batch.x1.shape)
        assert bool(batch.condition.any()) == (kind == "animated")
        assert bool(((batch.t > 0) & (batch.t < 1)).all())
    assert shapes == {"animated": (5, 16, 4, 8, 8), "video": (5, 16, 4, 8, 8), "picture": (5, 16, 1, 8, 8)}


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # autocast meets a float32 norm
def test_a_denoiser_that_gives_zero_has_the_loss_of_the_target(data):
    denoiser = MovieGenTransformer(DENOISER_CONFIG)
    torch.nn.init.zeros_(denoiser.patch_out.weight)
    batch = draw(data, np.random.default_rng(0), "animated", 4)
    loss = flow_loss(ByteTextEncoder(TEXT_CONFIG), denoiser, batch)
    assert torch.allclose(loss, (batch.x1 - batch.noise).square().flatten(1).mean(1), rtol=1e-5)


def test_muon_moves_the_blocks_matrices_only_and_every_parameter_is_moved_once():
    text, denoiser = ByteTextEncoder(TEXT_CONFIG), MovieGenTransformer(DENOISER_CONFIG)
    muon, adam = optimizers(text, denoiser)
    moved = [p for optimizer in (muon, adam) for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in moved} == {id(p) for p in [*text.parameters(), *denoiser.parameters()]}
    assert len(moved) == len({id(p) for p in moved})
    of_text = {id(p) for p in text.parameters()}
    assert not of_text & {id(p) for group in muon.param_groups for p in group["params"]}
    assert {id(p) for p in adam.param_groups[1]["params"]} == of_text


def test_a_warm_up_that_is_kept_is_not_done_again(data, tmp_path):
    one, two = ByteTextEncoder(TEXT_CONFIG), ByteTextEncoder(TEXT_CONFIG)
    torch.save({"text": one.state_dict()}, tmp_path / "text.pt")
    warm_up_text(two, data, 0, tmp_path / "text.pt")
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
