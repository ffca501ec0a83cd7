"""From words to a video: the command line, a compiled engine, a server, a client; against the same model in plain PyTorch."""

import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from reelstep.benchmarks.clients import server
from reelstep.compiler.load import here
from reelstep.engine.client import Client
from reelstep.engine.models import MODELS
from reelstep.engine.models.byte_text import tokenize
from reelstep.errors import InvalidRequest

PROMPT = "a red heart spins clockwise on a blue background"


def reelstep(*arguments, cwd, timeout=250):
    return subprocess.run([sys.executable, "-P", "-m", "reelstep", *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=timeout)


@pytest.fixture(scope="module", params=["cpu", pytest.param("gpu", marks=[pytest.mark.gpu, pytest.mark.timeout(3600)])])
def compiled(request, tmp_path_factory):
    """reel-tiny.reel and its cache, made by the command line, by its defaults for this machine's CPU or by inductor for its GPU."""
    folder = tmp_path_factory.mktemp("spine")
    options, timeout = (("--sku", here().name, "--backend", "inductor"), 3000) if request.param == "gpu" else ((), 250)
    done = reelstep("compile", "reel-tiny", "-o", "reel-tiny.reel", *options, "--cache", "cache", cwd=folder, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def address(compiled):
    with server([compiled / "reel-tiny.reel"], compiled / "cache") as where:
        yield where


def frames(data):
    """uint8 [F, H, W, 3] of an APNG or WebP."""
    return np.stack([np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(Image.open(BytesIO(data)))])


def psnr(a, b):
    return 10 * np.log10(255**2 / np.square(a.astype(float) - b).mean())


@torch.no_grad()
def by_hand(prompt, seed, steps, scale, picture=None):
    """Euler with classifier-free guidance in float32, written out."""
    model = MODELS["reel-tiny"].build()
    context = [model.denoiser.text(model.text(torch.tensor([tokenize(t, 128)]))) for t in (prompt, "")]
    x = torch.randn((1, 16, 4, 8, 8), generator=torch.Generator().manual_seed(seed))
    condition = torch.zeros_like(x)
    if picture is not None:
        condition = model.tae.encode(torch.from_numpy(picture.copy()).permute(2, 0, 1)[None, :, None] / 127.5 - 1).expand_as(x)
    for i in range(steps):
        modulation = model.denoiser.time(torch.tensor([i / steps]))
        text, null = (model.denoiser(x, modulation, condition, c) for c in context)
        x = x + (null + scale * (text - null)) / steps
    video = model.tae.decode(x)[0].clamp(-1, 1)
    return ((video + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()


def test_a_prompt_over_grpc_gives_what_plain_pytorch_gives(address):
    with Client(address) as client:
        generation = client.generate(PROMPT, seed=3, solver="euler", steps=6, scale=2.0, frames=8, media_type="image/png")
    assert (generation.usage.nfe, generation.usage.forwards) == (6, 12)
    # the engine runs in bfloat16 where the CPU has it: 30 dB is 3 % of the range, float32 gives over 50
    assert psnr(frames(generation.artifacts[0].data), by_hand(PROMPT, 3, 6, 2.0)) > 30


def test_a_picture_over_grpc_gives_what_plain_pytorch_gives(address):
    picture = np.full((64, 64, 3), 240, np.uint8)
    picture[16:48, 20:44] = (200, 30, 60)
    buffer = BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    with Client(address) as client:
        generation = client.generate("a red square bounces", image=buffer.getvalue(), seed=1, steps=6, scale=1.5, media_type="image/png")
    assert generation.task == "animate_sticker"
    assert psnr(frames(generation.artifacts[0].data), by_hand("a red square bounces", 1, 6, 1.5, picture)) > 30


def test_the_same_request_twice_gives_the_same_bytes(address):
    with Client(address) as client:
        one, two = (client.generate(PROMPT, seed=5, steps=3, media_type="image/png") for _ in range(2))
    assert one.artifacts[0].data == two.artifacts[0].data


def test_generate_and_sample_write_the_same_picture(compiled, address):
    common = (PROMPT, "--seed", 9, "--steps", 4)
    served, local = ("generate", *common, "-o", "served.png", "--server", address), ("sample", "reel-tiny.reel", *common, "-o", "local.png", "--cache", "cache")
    for arguments in (served, local):
        done = reelstep(*arguments, cwd=compiled)
        assert done.returncode == 0, done.stderr
        assert "seed 9" in done.stdout
    assert np.array_equal(frames((compiled / "served.png").read_bytes()), frames((compiled / "local.png").read_bytes()))


def test_a_prompt_that_the_model_cannot_read_is_refused_with_its_limit(address):
    with Client(address) as client, pytest.raises(InvalidRequest, match="128 bytes; at most 127"):
        client.generate("x" * 128)


def test_a_flipped_byte_is_found_before_serving(compiled, tmp_path):
    weights = compiled / "reel-tiny.reel" / "weights.safetensors"
    damaged = tmp_path / "damaged.reel"
    subprocess.run(["cp", "-r", compiled / "reel-tiny.reel", damaged], check=True)
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / "weights.safetensors").write_bytes(data)
    done = reelstep("serve", damaged, "--port", 0, cwd=tmp_path)
    assert done.returncode == 1
    assert "weights.safetensors" in done.stderr
    assert "Traceback" not in done.stderr
