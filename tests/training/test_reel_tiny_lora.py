"""The LoRA's recipe: what it learns from, what it moves, and that its file means to the engine what was trained."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from reelstep.compiler.lora import layers_of
from reelstep.engine.lora import fuse, read_adapter
from reelstep.engine.models.reel_tiny import WEIGHTS, adaptable, build
from reelstep.training.zoo.reel_tiny_denoiser import Latents
from reelstep.training.zoo.reel_tiny_lora import COUNTS, Pairs, grey, step_loss

SHIPPED = WEIGHTS / "reel-tiny-grey-lora.safetensors"


def test_grey_is_the_luma_of_bt_601_in_all_three_channels():
    pixels = torch.rand(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = np.einsum("bcfhw,c->bfhw", pixels.double().numpy(), [0.299, 0.587, 0.114])
    for channel in range(3):
        assert np.allclose(grey(pixels)[:, channel], expected, atol=1e-6)
    white = torch.ones(1, 3, 1, 2, 2)
    assert torch.allclose(grey(white), white), "white stays white: the weights add up to one"


@torch.no_grad()
def test_what_is_written_is_what_was_trained(tmp_path):
    torch.manual_seed(0)
    linears = {"blocks.0.q": nn.Linear(6, 8), "blocks.0.k": nn.Linear(8, 5)}
    plain = {name: nn.Linear(linear.in_features, linear.out_features) for name, linear in linears.items()}
    for name, linear in linears.items():
        plain[name].load_state_dict(linear.state_dict())
    pairs, x = Pairs(linears, 2), torch.randn(3, 4, 6)
    before = plain["blocks.0.k"](plain["blocks.0.q"](x))
    assert torch.equal(linears["blocks.0.k"](linears["blocks.0.q"](x)), before), "at first nothing is added"
    for up in pairs.up:
        nn.init.normal_(up)
    for matrix in pairs.parameters():
        matrix.copy_(matrix.to(torch.bfloat16))  # so that the file rounds nothing
    save_file(pairs.file(), tmp_path / "lora.safetensors")
    fuse(plain, [(read_adapter(tmp_path / "lora.safetensors", "any", layers_of(linears)), 1.0)])
    found, trained = plain["blocks.0.k"](plain["blocks.0.q"](x)), linears["blocks.0.k"](linears["blocks.0.q"](x))
    assert torch.allclose(found, trained, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, before, rtol=0.1)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # autocast meets a float32 norm
def test_a_step_moves_the_pairs_and_no_weight_of_the_model(monkeypatch):
    monkeypatch.setitem(COUNTS, "video", 1)
    monkeypatch.setitem(COUNTS, "picture", 1)
    torch.manual_seed(0)
    model = build().requires_grad_(False)
    pairs = Pairs(adaptable(model), 2)
    data = Latents(torch.randn(4, 16, 4, 8, 8).half(), torch.randn(4, 16, 1, 8, 8).half(), ["cat"] * 4, ["grow"] * 4, [0] * 4, ["red"] * 4, 1.0, 0.0)
    step_loss(model, data, np.random.default_rng(0)).backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(up.grad is not None and bool(up.grad.any()) for up in pairs.up)


def test_the_shipped_lora_is_small_and_for_the_shipped_model():
    adapter = read_adapter(SHIPPED, "reel-tiny", layers_of(adaptable(build())))
    assert (adapter.base, adapter.rank, len(adapter.pairs)) == ("reel-tiny", 4, 66)
    assert SHIPPED.stat().st_size < 1_000_000
    assert f"{SHIPPED.stat().st_size:,} bytes" in Path(WEIGHTS / "reel-tiny-grey-lora.md").read_text()
