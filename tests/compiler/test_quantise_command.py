"""What `reelstep compile --quantise` refuses before any work."""

from pathlib import Path

import pytest

from reelstep.__main__ import main


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["reel-tiny", "--max-error", "0.1"], "--max-error without --quantise"),
        (["reel-tiny", "--min-psnr", "30"], "--min-psnr without --quantise"),
        (["reel-tiny", "--quantise", "int4"], "quantisation 'int4'; one of: int8, int8-weights, fp8, nvfp4"),
        (["reel-tiny", "--quantise", "int8", "--max-error", "2"], "an error of 2 per program; above 0 and below 1"),
        (["reel-tiny", "--quantise", "int8", "--step-cache"], "--quantise with --step-cache"),
        (["reel-tiny", "--quantise", "int8", "--lora-rank", "4"], "--quantise with --lora-rank"),
        (["dit-mid", "--quantise", "int8"], "does no task, so no request can measure it"),
        (["dit-mid", "--quantise", "int8", "--prompts", "prompts.txt"], "does no task, so no request can measure it"),
        (["reel-tiny", "--quantise", "int8", "--prompts", "twice.txt"], "prompt 'a cat' is both measured on and compared with"),
        (["reel-tiny", "--quantise", "fp8"], "fp8 on cpu"),
        (["reel-tiny", "--quantise", "nvfp4"], "nvfp4 on cpu"),
    ],
)
def test_what_cannot_be_quantised_is_refused(arguments, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cat\na dog\n")
    Path("twice.txt").write_text("a cat\na cat\n")
    assert main(["compile", *arguments]) != 0
    assert text in capsys.readouterr().err
    assert not list(tmp_path.glob("*.reel"))
