"""Nothing in a bundle is unpickled, evaluated or imported: the code that could do so is not there, and the interpreter saw none of it happen."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reelstep.compiler import graphs
from reelstep.compiler.bundle import Bundle
from reelstep.compiler.compile import compile_model
from reelstep.compiler.passes.define_empty import EMPTY_OPS
from reelstep.compiler.program import Profile, Program, TensorSpec
from reelstep.errors import CompileError

COMPILER = Path(__file__).resolve().parents[2] / "compiler"

MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
CALLS = {"eval", "exec", "torch.load", "torch.export.load", "torch.jit.load", "np.load", "numpy.load"}


def test_the_compiler_holds_no_code_that_unpickles_or_evaluates() -> None:
    found = []
    for path in sorted(COMPILER.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if MODULES & {name.partition(".")[0] for name in names} or called in CALLS:
                found.append(f"{path.relative_to(COMPILER)}:{node.lineno}")  # type: ignore[attr-defined]
    assert found == []


WATCHED = """
import pickle, sys
from pathlib import Path
from reelstep.compiler.bundle import Bundle
from reelstep.compiler.load import load
for name in ("eager", "openvino"):  # what they import and set up is not of the bundle
    load(Bundle.open(Path(sys.argv[1])), Path(sys.argv[2]), name)
seen = []
sys.addaudithook(lambda event, arguments: seen.append((event, arguments[:2])) if event in ("pickle.find_class", "os.system", "subprocess.Popen") else None)
for name, cache in (("eager", None), ("openvino", None), ("openvino", Path(sys.argv[2]))):
    load(Bundle.open(Path(sys.argv[1])), cache, name)
print(seen)
pickle.loads(pickle.dumps(Path))
print(len(seen))
"""


def test_loading_a_bundle_unpickles_nothing_and_starts_no_process(bundle: Bundle, tmp_path: Path) -> None:
    """By the interpreter's own audit events, which C code raises too; a pickle at the end shows that they are seen."""
    done = subprocess.run([sys.executable, "-P", "-c", WATCHED, str(bundle.path), str(tmp_path / "cache")], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "1"]


def test_every_operator_of_torchs_core_that_is_a_function_may_be_in_a_bundle() -> None:
    names = {schema.name.removeprefix("aten::") for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("aten::")}
    packets = [getattr(torch.ops.aten, name) for name in sorted(names)]
    core = [op for packet in packets for op in (getattr(packet, overload) for overload in packet.overloads()) if torch.Tag.core in op.tags]
    assert len(core) > 150
    left_out = {op for op in core if not graphs._is_safe(f"torch.ops.{op}")}
    assert left_out == {op for op in core if op._schema.is_mutable or op in EMPTY_OPS}


def test_a_graph_that_no_bundle_takes_is_not_written_into_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "SAFE_WORDS", frozenset())
    edges = [(TensorSpec(name, "float32", ("B", 4)),) for name in "xy"]
    program = Program("p", torch.nn.GELU(approximate="tanh"), *edges, (Profile("any", {}, 3),))
    with pytest.raises(CompileError, match=r"program 'p' at profile 'any' calls 'torch\.ops\.aten\.gelu\.default', and a bundle takes only"):
        compile_model(model="m", version="1", settings={}, programs=[program], backend="eager", out=tmp_path / "m.reel", solvers={}, card="")
    assert not list(tmp_path.iterdir())
