"""Options that several commands share: what their text means, and what is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from reelstep import __main__ as cli
from reelstep.engine.commands.options import cache_dir, parse_strength
from reelstep.errors import ConfigError


@pytest.mark.parametrize("arguments", [["compile", "reel-tiny", "--cache", ""], ["compile", "reel-tiny", "-o", ""], ["inspect", ""]])
def test_an_empty_name_of_a_file_is_no_name(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "an empty name; give a file or a folder" in capsys.readouterr().err


def test_who_has_no_home_is_asked_for_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("REELSTEP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(ConfigError, match="--cache DIR"):
        cache_dir(cli.build_parser().parse_args(["serve", "x.bundle"]))


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        (["--cache", "/a"], {"REELSTEP_CACHE": "/b"}, "/a"),
        ([], {"REELSTEP_CACHE": "/b", "XDG_CACHE_HOME": "/c"}, "/b"),
        ([], {"XDG_CACHE_HOME": "/c"}, "/c/reelstep"),
        ([], {"HOME": "/d"}, "/d/.cache/reelstep"),
    ],
)
def test_the_cache_is_the_flag_else_the_environment_else_the_users(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], environment: dict[str, str], expected: str
) -> None:
    for name in ("REELSTEP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args = cli.build_parser().parse_args(["serve", "x.bundle", *arguments])
    assert cache_dir(args) == Path(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a", ("a", 1.0)), ("a=0.5", ("a", 0.5)), ("a=-1", ("a", -1.0)), ("x=1/a", ("x=1/a", 1.0)), ("x=1/a=2", ("x=1/a", 2.0))],
)
def test_a_strength_stands_behind_the_last_sign(text: str, expected: tuple[str, float]) -> None:
    assert parse_strength(text) == expected


@pytest.mark.parametrize("text", ["neon", "=file", "neon="])
def test_a_server_needs_a_name_and_a_file(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "a.reel", "--lora", text])
    assert "is not NAME=FILE, such as neon=neon.safetensors" in capsys.readouterr().err
