"""The house stands as it is drawn: packages, tables, light imports, and what every file keeps out."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

from reelstep.registry import Registry

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES: list[str] = PROJECT["tool"]["setuptools"]["packages"]
PACKAGE_DATA: dict[str, list[str]] = PROJECT["tool"]["setuptools"]["package-data"]

FOLDERS = {"benchmarks", "compiler", "docs", "engine", "kernels", "parallel", "protos", "tests", "training"}

TABLES = {
    "reelstep.benchmarks:BENCHMARKS": None,
    "reelstep.compiler.backends:BACKENDS": "compiler/backends",
    "reelstep.compiler.skus:SKUS": "compiler/skus",
    "reelstep.engine.commands:COMMANDS": None,
    "reelstep.engine.models:MODELS": None,
    "reelstep.engine.pipelines:PIPELINES": None,
    "reelstep.engine.samplers.guidance:GUIDANCE": "engine/samplers/guidance",
    "reelstep.engine.samplers.paths:PATHS": None,
    "reelstep.engine.samplers.schedules:SCHEDULES": None,
    "reelstep.engine.samplers.step_cache:STEP_CACHES": "engine/samplers/step_cache",
    "reelstep.engine.samplers.tables:SOLVERS": "engine/samplers/tables",
    "reelstep.kernels:OPS": None,
}
"""Every table, and the folder in which it must name each file; None where a file may hold what its entries share."""

KEPT_OUT = {
    "a path of one machine": r"/wor[k]/|/roo[t]/|/hom[e]/\w|/opt/pyp[i]|[A-Z]:\\Us[e]rs",
    "a registry's host": r"pyp[i]\.org|pythonhoste[d]\.org|download\.pytorc[h]\.org|conda\.anacond[a]\.org",
    "a tool's session": r"(?i)\bBRIEF\.m[d]\b|\bclaud[e]\b|\banthropi[c]\b|\bsub-?agen[t]\b|shared/spec[s]|shared/dat[a]",
}


def table(address: str) -> Registry[object]:
    module, name = address.split(":")
    found = getattr(importlib.import_module(module), name)
    assert isinstance(found, Registry), f"{address} is a {type(found).__name__}, not a Registry"
    return found


@cache
def files() -> list[Path]:
    """All files of the project, relative to its root: what .gitignore leaves. Read without git, which a source archive has not."""
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    ignored = [".git", *(line.strip("/") for line in lines if line and not line.startswith("#"))]
    found: list[Path] = []
    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = [name for name in subfolders if not any(fnmatch(name, pattern) for pattern in ignored)]
        found += [Path(folder, name).relative_to(ROOT) for name in names]
    return [path for path in sorted(found) if not any(fnmatch(path.name, pattern) for pattern in ignored)]


def package_of(path: Path) -> str:
    return ".".join(["reelstep", *path.parent.parts])


def test_pyproject_lists_exactly_the_packages_of_the_tree() -> None:
    found = {package_of(p) for p in files() if p.suffix == ".py" and p.parts[0] not in {"tests", "docs"}}
    assert sorted(found) == sorted(PACKAGES)


def test_the_import_contract_gives_every_module_a_floor() -> None:
    contract = next(c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    floors = {module for layer in contract["layers"] for module in layer.split(" | ")}
    code = [p for p in files() if p.suffix == ".py" and p.name != "__init__.py" and p.parts[0] not in {"docs", "protos", "tests"}]
    ours = {".".join(["reelstep", *p.with_suffix("").parts[: 2 if p.parts[0] == "engine" else 1]]) for p in code}
    assert sorted(ours - floors) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_has_an_init_file(package: str) -> None:
    assert (ROOT.joinpath(*package.split(".")[1:]) / "__init__.py").is_file()


def test_the_wheel_has_all_that_lies_in_a_package_and_nothing_of_the_checkout_around_it() -> None:
    others = [p for p in files() if package_of(p) in PACKAGES and p.suffix != ".py"]
    shipped = {p for p in others if any(p.match(pattern) for pattern in PACKAGE_DATA["*"] + PACKAGE_DATA.get(package_of(p), []))}
    assert sorted(set(others) - shipped) == sorted(p for p in others if p.parent == Path() and p.name != "py.typed")


def test_the_root_holds_four_modules_and_the_folders_of_the_plan() -> None:
    assert {p.name for p in files() if p.parent == Path() and p.suffix == ".py"} == {"__init__.py", "__main__.py", "errors.py", "registry.py"}
    assert {p.parts[0] for p in files() if p.parent != Path() and not p.parts[0].startswith(".")} == FOLDERS


def test_no_file_is_called_utils() -> None:
    assert [str(p) for p in files() if re.fullmatch(r"(.*_)?(utils?|helpers?|misc|common)\.py", p.name)] == []


@pytest.mark.parametrize("address", TABLES)
def test_every_entry_of_a_table_is_there(address: str) -> None:
    entries = table(address)
    assert len(entries) > 0
    assert [name for name in entries if entries[name] is None] == []


@pytest.mark.parametrize(("address", "folder"), [(a, f) for a, f in TABLES.items() if f])
def test_every_file_beside_a_table_is_named_in_it(address: str, folder: str) -> None:
    modules = {f"reelstep.{folder.replace('/', '.')}.{p.stem}" for p in files() if str(p.parent) == folder and p.suffix == ".py" and p.stem != "__init__"}
    text = (ROOT / folder / "__init__.py").read_text(encoding="utf-8")
    assert sorted(m for m in modules if m not in text) == []


@pytest.mark.parametrize("what", KEPT_OUT)
def test_no_file_names(what: str) -> None:
    pattern = re.compile(KEPT_OUT[what])
    binary = {".safetensors", ".png", ".webp", ".gif", ".mp4"}
    found = [f"{p}: {m.group()}" for p in files() if p.suffix not in binary for m in pattern.finditer((ROOT / p).read_text(encoding="utf-8"))]
    assert found == []


TORCH = {"torch", "openvino", "diffusers"}


@pytest.mark.parametrize(
    ("arguments", "left_out"),
    [
        (["-c", "import reelstep"], TORCH),
        (["-m", "reelstep", "--help"], TORCH),
        (["-c", "import reelstep.engine.scheduler"], TORCH),
        (["-c", "import reelstep.engine.client"], TORCH),
        (["-c", "import reelstep.engine.loop"], {"triton", "grpc", "scipy", "matplotlib", "diffusers"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_start_is_spared_what_it_does_not_need(arguments: list[str], left_out: set[str]) -> None:
    imported = subprocess.run([sys.executable, "-P", "-X", "importtime", *arguments], check=True, capture_output=True, text=True, timeout=60).stderr
    modules = {line.rsplit("|", 1)[1].strip() for line in imported.splitlines() if line.startswith("import time:")}
    assert "reelstep" in modules
    assert {m.partition(".")[0] for m in modules} & left_out == set()
