from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import copy as shallow
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from reelstep.compiler import storage
from reelstep.compiler.bundle import Bundle
from reelstep.compiler.describe import describe, describe_json
from reelstep.compiler.finalize import finalize
from reelstep.compiler.load import load
from reelstep.compiler.plan import canonical_json
from reelstep.compiler.program import Profile, Program, TensorSpec
from reelstep.engine.served import ServedModel
from reelstep.errors import BundleError, CompileError, ConfigError, NotFound, StorageError

HERE = Path(__file__)
CompileToy = Callable[..., Bundle]


@pytest.fixture
def copy(bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle.path, tmp_path / "copy.reel"))


def contents(path: Path) -> dict[str, str]:
    return {str(f.relative_to(path)): hashlib.sha256(f.read_bytes()).hexdigest() for f in path.rglob("*") if f.is_file()}


def rewrite_manifest(path: Path, change: Any) -> None:
    """Change the manifest and make its own sha256 right again, as a deliberate forger would."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    change(manifest)
    del manifest["sha256"]
    manifest["sha256"] = hashlib.sha256(canonical_json(manifest)).hexdigest()
    (path / "manifest.json").write_bytes(canonical_json(manifest))


def forge_graph(path: Path, name: str, find: str, put: str) -> None:
    """Change a graph, and make every hash right again."""
    file = path / "programs" / name
    old, forged = file.read_text(), file.read_text().replace(find, put)
    assert forged != old
    file.write_text(forged)
    plan = (path / "plan.json").read_text().replace(hashlib.sha256(old.encode()).hexdigest(), hashlib.sha256(forged.encode()).hexdigest())
    (path / "plan.json").write_text(plan)
    changed = {f"programs/{name}": forged.encode(), "plan.json": plan.encode()}
    entries = {file: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for file, data in changed.items()}
    rewrite_manifest(path, lambda m: (m["files"].update(entries), m.update(plan_hash=entries["plan.json"]["sha256"])))


def test_a_bundle_gives_back_what_was_put_in(bundle: Bundle) -> None:
    assert bundle.model_card == "# Toy\n"
    assert bundle.settings == {"size": [4, 3]}
    assert bundle.solvers == {"euler": {"times": [0.0, 1.0]}}
    assert bundle.fitted == {"bns_8": {"scale": 3.0}}
    assert bundle.total_bytes == sum(f.stat().st_size for f in bundle.path.rglob("*") if f.is_file())


def test_weights_are_stored_once_bit_exact_and_without_unused_ones(bundle: Bundle, programs: tuple[Program, ...]) -> None:
    toy = programs[0].module
    wanted = [tensor for name, tensor in toy.named_parameters() if not name.startswith("unused")] + list(toy.buffers())
    assert sorted(t.numel() for t in bundle.tensors.values()) == sorted(t.numel() for t in wanted)
    assert all(any(t.shape == w.shape and torch.equal(t, w) for t in bundle.tensors.values()) for w in wanted)


def test_profiles_and_programs_share_the_memory_of_their_weights(bundle: Bundle) -> None:
    places = [
        bundle.program("denoise", "l4").state_dict["embed.weight"].data_ptr(),
        bundle.program("denoise", "l3").state_dict["embed.weight"].data_ptr(),
        bundle.program("lookup", "l4").state_dict["table.weight"].data_ptr(),
    ]
    assert len(set(places)) == 1


def test_a_bundle_built_in_two_processes_has_identical_files(tmp_path: Path) -> None:
    code = f"import sys, pathlib; sys.path.insert(0, {str(HERE.parent)!r}); import conftest; conftest.compile_toy(pathlib.Path(sys.argv[1]))"
    for seed in ("1", "2"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / f"{seed}.reel")], check=True, env={**os.environ, "PYTHONHASHSEED": seed})
    assert contents(tmp_path / "1.reel") == contents(tmp_path / "2.reel")


def test_graphs_name_no_source_file_and_no_path(bundle: Bundle) -> None:
    for file in (bundle.path / "programs").iterdir():
        text = file.read_text()
        assert "stack_trace" not in text
        assert ".py" not in text
        assert str(Path.cwd()) not in text


@pytest.mark.parametrize("name", ["manifest.json", "plan.json", "programs/denoise.l4.json", "weights.safetensors", "solvers/euler.json", "MODEL_CARD.md"])
def test_a_flipped_byte_is_found_and_the_file_named(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError, match=name):
        Bundle.open(copy)


@pytest.mark.parametrize("name", ["manifest.json", "plan.json", "programs/lookup.l4.json", "weights.safetensors", "MODEL_CARD.md"])
def test_a_missing_file_is_found_and_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(BundleError, match=name):
        Bundle.open(copy)


def test_another_format_says_who_wrote_it_and_what_to_do(copy: Path) -> None:
    rewrite_manifest(copy, lambda m: m.update(format=7, reelstep="9.9.9"))
    with pytest.raises(BundleError, match=r"format 7, written by reelstep 9\.9\.9; reelstep .* reads format 2; run `reelstep compile` again"):
        Bundle.open(copy)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("manifest.json", b"[" * 100_000),
        ("manifest.json", b'{"format": 2, "x": NaN}'),
        ("manifest.json", b'{"format": 2, "x": "\\ud800"}'),
        ("signature.json", b"[" * 100_000),
    ],
    ids=["nested", "not a number", "half a character", "nested signature"],
)
def test_json_that_is_none_of_ours_is_refused(copy: Path, name: str, data: bytes) -> None:
    (copy / name).write_bytes(data)
    with pytest.raises(BundleError, match=r"reelstep compile|damaged"):
        Bundle.open(copy)


@pytest.mark.parametrize("change", [{"files": []}, {"files": {"plan.json": 5}}, {"programs": 7}], ids=str)
def test_a_manifest_of_another_shape_is_refused(copy: Path, change: dict[str, Any]) -> None:
    rewrite_manifest(copy, lambda m: m.update(change))
    with pytest.raises(BundleError, match=r"(cannot be read as a bundle|gives no sha256).*run `reelstep compile` again"):
        Bundle.open(copy)


def put(copy: Path, name: str, data: bytes) -> None:
    """A file that is whole by what the manifest says, and holds something else."""
    (copy / name).write_bytes(data)
    rewrite_manifest(copy, lambda m: m["files"].update({name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}}))


def test_weights_that_are_none_or_not_there_are_told_when_they_are_read(copy: Path) -> None:
    put(copy, "weights.safetensors", b"junk" * 10)
    with pytest.raises(BundleError, match=r"weights\.safetensors holds no weights .*run `reelstep compile` again"):
        Bundle.open(copy).program("denoise", "l4")
    put(copy, "weights.safetensors", save({"other": torch.zeros(1)}))
    with pytest.raises(BundleError, match=r"program 'denoise' at profile 'l4' reads .*, which weights\.safetensors does not have"):
        Bundle.open(copy).program("denoise", "l4")


@pytest.mark.parametrize("folder", ["solvers", "fitted", "settings"])
def test_settings_solvers_and_fits_of_another_shape_are_refused(copy: Path, folder: str) -> None:
    if folder != "settings":
        (copy / folder).mkdir(exist_ok=True)
        put(copy, f"{folder}/x.json", b"{}")
    with pytest.raises(BundleError, match=r"has settings, solvers or fits that cannot be read .*run `reelstep compile` again"):
        ServedModel.of(Bundle.open(copy))


def test_a_manifest_that_lacks_a_field_says_which(copy: Path) -> None:
    rewrite_manifest(copy, lambda m: m.pop("programs"))
    with pytest.raises(BundleError, match=r"manifest\.json does not say: programs; run `reelstep compile` again"):
        Bundle.open(copy)


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "solvers/../../outside.json"])
def test_a_manifest_that_points_outside_is_refused(copy: Path, name: str) -> None:
    (copy.parent / "outside.json").write_text("{}")
    rewrite_manifest(copy, lambda m: m["files"].update({name: {"sha256": hashlib.sha256(b"{}").hexdigest(), "bytes": 2}}))
    with pytest.raises(BundleError, match="outside"):
        Bundle.open(copy)


@pytest.mark.parametrize(
    ("find", "put"),
    [
        ("torch.ops.aten.linear.default", "torch.hub.load"),
        ("torch.ops.aten.linear.default", "torch.ops.aten.from_file.default"),  # of any file, which with `shared` it writes
        ("torch.ops.aten.linear.default", "torch.ops.aten.save.default"),
        ("torch.ops.aten.linear.default", "torch.ops.aten.linear"),  # which of them would be chosen by what it is given
        ("torch.ops.aten.linear.default", "torch.ops.aten.linear.__init__"),
        ("torch.ops.aten.mul.Tensor", "torch.ops.aten.mul_.Tensor"),
        ("torch.ops.aten.mul.Tensor", "torch.ops.aten.mul.out"),
        ("torch.ops.aten.mul.Tensor", "torch.ops.aten.empty_like.default"),
        ("Symbol('", "__import__('os').system('"),
        ('"guards_code":[]', '"guards_code":["1"]'),
        ('"ids"', "\"ids=__import__('os').abort()\""),  # of an input: torch writes it into the head of a function
        ('"forward_arg_names":["ids"', '"forward_arg_names":["ids=__import__(\'os\').abort()"'),
        ('builtins.dict\\", \\"context\\": \\"[]', 'builtins.dict\\", \\"context\\": \\"[\\\\"x=__import__(\'os\').abort()\\\\"]'),
    ],
)
def test_a_forged_graph_can_neither_run_code_nor_touch_what_is_not_its_own(copy: Path, find: str, put: str) -> None:
    forge_graph(copy, "denoise.l4.json", find, put)
    with pytest.raises(BundleError, match=r"denoise\.l4\.json"):
        Bundle.open(copy).program("denoise", "l4")


def test_a_full_disk_keeps_the_old_bundle_and_leaves_nothing_behind(
    copy: Path, programs: tuple[Program, ...], monkeypatch: pytest.MonkeyPatch, compile_toy: CompileToy
) -> None:
    before, neighbours = contents(copy), set(copy.parent.iterdir())
    written = []

    def full(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        compile_toy(copy, programs[1:])
    assert contents(copy) == before
    assert set(copy.parent.iterdir()) == neighbours
    Bundle.open(copy)


def test_something_else_than_a_bundle_is_not_replaced(tmp_path: Path, programs: tuple[Program, ...], compile_toy: CompileToy) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(StorageError, match="not what would be written"):
        compile_toy(tmp_path, programs[1:])
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("manifest", ["another program's", "ours"])
def test_nor_is_one_with_a_manifest_and_somebodys_files(copy: Path, programs: tuple[Program, ...], compile_toy: CompileToy, manifest: str) -> None:
    if manifest != "ours":
        shutil.rmtree(copy)
        copy.mkdir()
        (copy / "manifest.json").write_text('{"name": "my app"}')
    mine = copy / "notes.txt"
    mine.write_text("years of work")
    with pytest.raises(StorageError, match="not what would be written"):
        compile_toy(copy, programs[1:])
    assert mine.read_text() == "years of work"


def test_a_damaged_bundle_is_replaced(copy: Path, programs: tuple[Program, ...], compile_toy: CompileToy) -> None:
    (copy / "manifest.json").write_bytes(b"\0")
    shutil.rmtree(copy / "programs")
    compile_toy(copy, programs[1:])
    Bundle.open(copy)


@pytest.mark.parametrize("how", ["exchanged", "written over", "gone"])
def test_what_was_put_there_after_it_was_verified_is_not_read(
    copy: Path, tmp_path: Path, programs: tuple[Program, ...], compile_toy: CompileToy, how: str
) -> None:
    opened = [Bundle.open(copy) for _ in range(4)]
    other = compile_toy(tmp_path / "other.reel", programs[1:]).path
    for name in ("weights.safetensors", "programs/lookup.l4.json", "MODEL_CARD.md", "solvers/euler.json"):
        if how == "written over":
            (copy / name).write_bytes((other / name).read_bytes().ljust((copy / name).stat().st_size)[: (copy / name).stat().st_size] + b" ")
        else:
            (copy / name).unlink()
        if how == "exchanged":
            (copy / name).write_bytes((other / name).read_bytes()[:-1] + b"!")
    reads = (lambda b: b.tensors, lambda b: b.program("lookup", "l4"), lambda b: b.model_card, lambda b: b.solvers)
    for bundle, read in zip(opened, reads, strict=True):
        with pytest.raises(BundleError, match=r"is not the file that was verified when the bundle was opened.*open the bundle again"):
            read(bundle)


def test_weights_that_were_read_stay_when_others_are_compiled_to_their_place(copy: Path, programs: tuple[Program, ...], compile_toy: CompileToy) -> None:
    before = Bundle.open(copy)
    held = {name: tensor.clone() for name, tensor in before.tensors.items()}
    compile_toy(copy, programs[1:])
    assert all(torch.equal(tensor, held[name]) for name, tensor in before.tensors.items())
    with pytest.raises(BundleError, match="is not the file that was verified"):
        before.program("denoise", "l4")


def test_weights_of_one_storage_in_two_shapes_are_both_kept(tmp_path: Path, compile_toy: CompileToy) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.conv = nn.Linear(8, 8, bias=False), nn.Conv1d(8, 8, 1, bias=False)
            self.conv.weight = nn.Parameter(self.linear.weight.data[:, :, None])

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(self.linear(x)[:, :, None])[:, :, 0]
            return y

    module = Tied()
    edges = (TensorSpec("x", "float32", ("B", 8)),), (TensorSpec("y", "float32", ("B", 8)),)
    tied = compile_toy(tmp_path / "tied.reel", (Program("p", module, *edges, (Profile("any", {}, 2),)),))
    x = torch.randn(2, 8)
    torch.testing.assert_close(load(tied, None)["p", "any"]({"x": x})["y"], module(x).detach())


def test_what_a_bundle_cannot_hold_is_said_with_its_line_as_it_is_compiled(tmp_path: Path, compile_toy: CompileToy) -> None:
    class Asks(nn.Module):
        def __init__(self, rule: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.rule = rule
            self.register_buffer("turns", torch.polar(torch.ones(8), torch.arange(8.0)))

        def forward(self, x: Tensor) -> Tensor:
            return self.rule(x) if self.rule is not turned else torch.view_as_real(torch.view_as_complex(x.unflatten(1, (4, 2))) * self.turns[:4]).flatten(1)

    def turned(x: Tensor) -> Tensor:
        return x

    edges = (TensorSpec("x", "float32", ("B", 8)),), (TensorSpec("y", "float32", ("B", 8)),)
    for rule, says in (
        (lambda x: torch.fft.fft(x).real, r"calls 'torch\.ops\.aten\.fft_fft\.default', .* at \S+test_bundle\.py:\d+, `"),
        (lambda x: x * x.max().item(), r"is not plain arithmetic at \S+test_bundle\.py:\d+, `"),
        (turned, r"holds 'turns' in torch\.complex64, which no backend takes; keep real and imaginary parts apart"),
    ):
        with pytest.raises(CompileError, match=rf"program 'p' at profile 'any' .*{says}"):
            compile_toy(tmp_path / "asks.reel", (Program("p", Asks(rule), *edges, (Profile("any", {}, 2),)),))
    with pytest.raises(ConfigError, match="profile 'none': max_batch is 0; a call has at least one row"):
        Profile("none", {}, 0)


def test_an_unknown_program_or_profile_is_named_with_the_known_ones(bundle: Bundle) -> None:
    with pytest.raises(NotFound, match="denoise, lookup"):
        bundle.program("encode", "l4")
    with pytest.raises(NotFound, match="l3, l4"):
        bundle.program("denoise", "l9")


def test_a_description_names_programs_edges_and_hashes(bundle: Bundle) -> None:
    text = describe(bundle)
    assert "in  ids: int64 [B, 4]" in text
    assert bundle.plan.hash in text
    data = json.loads(json.dumps(describe_json(bundle)))
    assert data["total_bytes"] == bundle.total_bytes
    # of embedding, projection, convolution and two buffers, 4 bytes each; the second program reads the embedding alone
    toy = 11 * 8 + (24 * 8 + 24) + (8 * 8 * 3 + 8) + 1 + 8
    assert {(each["program"], each["weights_bytes"]) for each in data["programs"]} == {("denoise", 4 * toy), ("lookup", 4 * 11 * 8)}
    assert [each["ops"] for each in data["programs"]] == [dict(p.ops) for p in bundle.plan.programs]


def test_a_meta_model_needs_no_weights_file_and_loads_only_on_null(
    tmp_path: Path, programs: tuple[Program, ...], compile_toy: CompileToy, caplog: pytest.LogCaptureFixture
) -> None:
    meta = replace(programs[1], module=deepcopy(programs[1].module).to("meta"))
    bundle = compile_toy(tmp_path / "meta.reel", (meta,), "null")
    assert not (bundle.path / "weights.safetensors").exists()
    found = load(bundle, None)["lookup", "l4"]({"ids": torch.zeros(3, 4, dtype=torch.int64)})
    assert found["sum"].shape == (3, 8)
    assert bundle.program("lookup", "l4").state_dict["table.weight"].is_meta
    assert f"backend 'null' computes nothing: whatever is asked of {bundle.path} comes out as zeros" in caplog.text
    with pytest.raises(CompileError, match="only backend 'null'"):
        load(bundle, None, "eager")
    shared = shallow(bundle)
    shared.plan = replace(bundle.plan, backend="eager", mesh={"cp": 2})
    with pytest.raises(CompileError, match="only backend 'null'"):
        finalize(shared, tmp_path)
