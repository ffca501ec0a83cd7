"""Export: what a stage made replaces what was shipped, and nothing else does."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from reelstep.engine.models.reel_tiny import WEIGHTS, ReelTiny
from reelstep.errors import ConfigError
from reelstep.training import checkpoint
from reelstep.training.zoo.reel_tiny_export import export

SHIPPED = WEIGHTS / "reel-tiny.safetensors"


@pytest.fixture
def target(tmp_path):
    return shutil.copy(SHIPPED, tmp_path / "weights.safetensors")


def test_a_denoiser_trained_on_goes_beside_the_shipped_autoencoder(tmp_path, target):
    model = ReelTiny()
    state = {"text": model.text.state_dict(), "denoiser": model.denoiser.state_dict(), "scale": 2.0, "shift": 0.5, "step": 1}
    checkpoint.save(tmp_path / "denoiser.pt", state)
    export(tmp_path, target)
    old, new = load_file(SHIPPED), load_file(target)
    assert old.keys() == new.keys()
    for name, value in new.items():
        if name.startswith("tae.") and name not in ("tae.scale", "tae.shift"):
            assert torch.equal(value, old[name])
        elif not name.startswith("tae."):
            assert torch.equal(value, model.state_dict()[name].bfloat16())
    assert (float(new["tae.scale"]), float(new["tae.shift"])) == (2.0, 0.5)


def test_a_later_decoder_keeps_the_latents_that_the_denoiser_knows(tmp_path, target):
    tae = ReelTiny().tae
    checkpoint.save(tmp_path / "tae_decoder.pt", {"model": tae.state_dict(), "step": 1})
    export(tmp_path, target)
    old, new = load_file(SHIPPED), load_file(target)
    assert torch.equal(new["tae.scale"], old["tae.scale"])
    assert torch.equal(new["tae.decoder.norm.weight"], tae.state_dict()["decoder.norm.weight"].bfloat16())
    assert torch.equal(new["denoiser.table"], old["denoiser.table"])


def test_an_autoencoder_without_its_denoiser_is_refused(tmp_path, target):
    checkpoint.save(tmp_path / "tae.pt", {"model": ReelTiny().tae.state_dict(), "step": 1})
    with pytest.raises(ConfigError, match="run stage 2"):
        export(tmp_path, target)
    with pytest.raises(ConfigError, match="run a stage first"):
        export(tmp_path / "nothing", target)
