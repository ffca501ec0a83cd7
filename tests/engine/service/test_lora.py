"""LoRA from the command line and the client over the wire to the engine, and back."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from reelstep import __main__ as cli
from reelstep.engine.client import Client
from reelstep.engine.commands import sample
from reelstep.engine.service.generation import SERVICE
from reelstep.errors import InvalidRequest, NotFound, UnsupportedRequest
from reelstep.protos.reelstep.v1 import media_pb2 as pb
from reelstep.tests.engine.service.fake_engine import FakeEngine, FakeModel, FakeSettings
from reelstep.tests.engine.service.in_process import Served, served


def send(fake: Served, lora: list[pb.GenerationSpec.Lora]) -> pb.Job:
    """By a plain gRPC client."""
    message = pb.GenerateRequest(spec=pb.GenerationSpec(prompt="a fox", lora=lora), inline_artifacts=True)
    with grpc.insecure_channel(fake.address) as channel:
        method = channel.unary_stream(f"/{SERVICE}/Generate", pb.GenerateRequest.SerializeToString, pb.GenerateResponse.FromString)
        return list(method(message, timeout=10))[-1].event.finished


def test_strengths_reach_the_engine_and_come_back(fake: Served) -> None:
    with Client(fake.address) as client:
        got = client.generate("a fox", lora={"neon": -0.75})
        assert fake.engine.requests[-1].lora == {"neon": -0.75}
        assert got.lora == {"neon": -0.75}
        assert client.generate("a fox").lora == {}
        assert fake.engine.requests[-1].lora == {}


def test_an_absent_strength_is_one_and_zero_is_zero(fake: Served) -> None:
    for sent, expected in ((pb.GenerationSpec.Lora(name="ink"), 1.0), (pb.GenerationSpec.Lora(name="ink", strength=0.0), 0.0)):
        (back,) = send(fake, [sent]).spec.lora
        assert fake.engine.requests[-1].lora == {"ink": expected}
        assert (back.name, back.strength, back.HasField("strength")) == ("ink", expected, True)


def test_what_cannot_run_is_refused_with_what_can(fake: Served) -> None:
    with Client(fake.address) as client:
        with pytest.raises(NotFound, match="unknown LoRA 'noen'; known: ink, neon"):
            client.generate("a fox", lora={"noen": 1.0})
        with pytest.raises(InvalidRequest, match="lora: too large a rank"):
            client.generate("a fox", lora={"neon": 1.0, "ink": 1.0})
        with pytest.raises(InvalidRequest, match="lora: 'neon': strength 11 is not in"):
            client.generate("a fox", lora={"neon": 11.0})
        with pytest.raises(InvalidRequest, match="lora: 'neon': 'much' cannot be sent"):
            client.generate("a fox", lora={"neon": "much"})  # type: ignore[dict-item]
        with pytest.raises(InvalidRequest, match="quality 'draft' names 'bns_6', fitted to 'fake' without a LoRA"):
            client.generate("a fox", quality="draft", lora={"neon": 1.0})
    with pytest.raises(grpc.RpcError, match="names one twice"):
        send(fake, [pb.GenerationSpec.Lora(name="ink")] * 2)


def test_a_model_lists_what_it_has_and_what_it_takes(fake: Served) -> None:
    with Client(fake.address) as client:
        (model,) = client.models()
        assert [(lora.name, lora.rank, lora.layers) for lora in model.loras] == [("ink", 3, 1), ("neon", 3, 1)]
        assert (model.lora_rank, list(model.lora_layers)) == (4, ["blocks.0.q", "blocks.0.k"])
        assert [(f.name, f.sha256, f.strength, f.rank, f.layers) for f in model.fused] == [("base", "0" * 64, 0.5, 2, 1)]
    with served(FakeEngine(FakeModel(settings=FakeSettings(lora=None, fused=()), loras={}))) as other, Client(other.address) as client:
        (model,) = client.models()
        assert (len(model.loras), model.lora_rank, len(model.lora_layers), len(model.fused)) == (0, 0, 0, 0)
        with pytest.raises(UnsupportedRequest, match="leave lora out, or serve a bundle compiled with --lora-rank"):
            client.generate("a fox", lora={"neon": 1.0})


def test_generate_and_sample_take_loras_and_print_them(
    fake: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded: list[dict[str, Path]] = []

    def open_for(args: object, ask: object, loras: dict[str, Path]) -> FakeEngine:
        loaded.append(loras)
        return FakeEngine()

    monkeypatch.setattr(sample, "open_for", open_for)
    out = str(tmp_path / "fox.webp")
    for command, name in ((["generate", "--server", fake.address], "neon"), (["sample", "fake.reel"], "styles/neon.safetensors")):
        assert cli.main([*command, "a fox", "-o", out, "--lora", f"{name}=0.5"]) == 0
        assert "cfg at scale 3, LoRA neon at 0.5\n" in capsys.readouterr().out
        assert cli.main([*command, "a fox", "-o", out, "--lora", name]) == 0
        assert "LoRA neon at 1\n" in capsys.readouterr().out
        assert cli.main([*command, "a fox", "-o", out, "--lora", name, "--lora", f"{name}=2"]) == 2
        assert "--lora names neon twice" in capsys.readouterr().err
    assert loaded == [{"neon": Path("styles/neon.safetensors")}] * 2
