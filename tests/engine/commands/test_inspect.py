"""What `reelstep inspect` says of a bundle beside its plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from reelstep import __main__ as cli
from reelstep.engine.commands.inspect import describe_loras, describe_menus
from reelstep.engine.models.spec import ModelSettings
from reelstep.tests.compiler.conftest import compile_toy
from reelstep.tests.engine.conftest import SETTINGS
from reelstep.tests.engine.service.fake_engine import LAYOUT, FakeModel, FakeSettings


def test_a_menu_is_printed_a_line_for_each_quality_with_what_was_measured() -> None:
    assert describe_menus(FakeModel()).splitlines()[:3] == [
        "text_to_video draft: bns_6 on linear, 6 steps, cfg at scale 2.5; 12 forwards, 30.50 dB, SSIM 0.8750 (reelstep bench steps)",
        "text_to_video standard: heun on linear, 5 steps, gate at scale 3; 14.5 forwards, 31.00 dB, SSIM 0.9000, Frechet distance 0.25 (the same)",
        "text_to_video best: euler on quadratic, 50 steps, cfg at scale 4; 100 forwards, 40.00 dB, SSIM 0.9900, Frechet distance 0 (the same)",
    ]


def test_inspect_prints_what_is_in_the_weights_and_what_requests_may_bring() -> None:
    fake = FakeSettings()
    settings = ModelSettings.from_json({**SETTINGS.to_json(), "lora": {"rank": 4, "layers": LAYOUT.layers}, "fused": [vars(fake.fused[0])]})
    assert describe_loras(settings).splitlines() == [
        f"LoRA in the weights: base at strength 0.5, rank 2 in 1 layers, sha256 {'0' * 64}",
        "LoRA of requests: rank up to 4, 128 numbers a row, in 2 layers: blocks.*.q, blocks.*.k",
    ]
    assert describe_loras(SETTINGS) == ""


def test_the_plan_of_a_bundle_can_be_read_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = compile_toy(tmp_path / "toy.reel")
    assert cli.main(["inspect", str(bundle.path), "--explain"]) == 0
    assert capsys.readouterr().out == bundle.plan.explain() + "\n"
