"""Backend `tensorrt` where TensorRT is absent: it says so; and, over its real Python bindings, what can be shown without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from reelstep.compiler.backends import BACKENDS, tensorrt
from reelstep.compiler.bundle import Bundle
from reelstep.compiler.load import load
from reelstep.compiler.program import Program
from reelstep.compiler.signature import Signature
from reelstep.engine.models import MODELS
from reelstep.errors import CompileError

HERE = Path(__file__).parent
ROOT = HERE.parents[3]
WHEELS = {"tensorrt_bindings": "tensorrt-cu13-bindings", "torch_tensorrt": "torch-tensorrt", "dllist": "dllist", "psutil": "psutil"}

Check = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def check(tmp_path_factory: pytest.TempPathFactory) -> Check:
    """Runs checks of conformance.py in a process of their own, over libraries that do nothing."""
    compiler = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    absent = [package for module, package in WHEELS.items() if find_spec(module) is None]
    if compiler is None or absent:
        pytest.skip(f"needs {' and '.join([*absent, *([] if compiler else ['a C compiler'])])}; docs/tensorrt.md says how to install them")
    libraries = tmp_path_factory.mktemp("libnvinfer")
    for name in ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11"):
        build = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(libraries / name), str(HERE / "libnvinfer.c")]
        subprocess.run(build, check=True, timeout=60)

    def run(*checks: str, script: str = "conformance.py") -> dict[str, Any]:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}  # the scripts import what lies beside them
        command = [sys.executable, str(HERE / script), str(libraries), *checks]
        done = subprocess.run(command, capture_output=True, text=True, timeout=3500, env={**environment, "OMP_NUM_THREADS": "1"}, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    return run


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "installed", lambda _: "")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.mark.usefixtures("bare")
def test_without_the_libraries_nothing_runs_and_the_error_says_what_to_install(programs: tuple[Program, ...]) -> None:
    backend = BACKENDS["tensorrt"]
    assert backend.precisions == ()
    signature = Signature.of(programs[0], programs[0].profiles[0])
    with pytest.raises(CompileError, match=r"tensorrt 11.0 is needed, and none is installed \(pip install 'tensorrt==11.0.\*'\).*no CUDA device.*work without"):
        backend.build(lambda: pytest.fail("the graph was read"), signature, "float32", None, "key")


def test_libraries_of_another_series_are_as_good_as_none_and_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before one of them is imported: what does not fit together breaks in the middle of a build, or as a symbol that is not found."""
    found = {"tensorrt": "10.13.3.9", "torch-tensorrt": "2.13.0", "torch": "2.13.0+cu130"}
    monkeypatch.setattr(tensorrt, "installed", found.get)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert tensorrt.missing() == ["tensorrt 11.0 is needed, and 10.13.3.9 is installed (pip install 'tensorrt==11.0.*')"]
    assert BACKENDS["tensorrt"].precisions == ()
    found["tensorrt"] = "11.0.0.114"
    assert BACKENDS["tensorrt"].precisions == ("float32", "bfloat16")


def test_versions_are_those_of_the_installed_packages() -> None:
    assert tensorrt.installed("pytest") == pytest.__version__
    assert tensorrt.installed("no-such-package") == ""


@pytest.mark.usefixtures("bare")
def test_a_bundle_is_refused_before_any_engine_is_built(bundle: Bundle) -> None:
    with pytest.raises(CompileError, match=r"'tensorrt' does not run on this machine \(cpu\); use one of: openvino, inductor, eager"):
        load(bundle, None, "tensorrt")


def test_a_plan_can_be_made_for_it_anywhere() -> None:
    assert BACKENDS["tensorrt"].default_precision()[0] == "bfloat16"
    assert BACKENDS["tensorrt"].keeps("sm90") == frozenset()


def test_the_documentation_says_what_the_code_says_of_hardware() -> None:
    assert " ".join(tensorrt.NOT_RUN.split()) in " ".join((ROOT / "docs" / "tensorrt.md").read_text("utf-8").replace(">", " ").split())


def test_what_the_sources_use_of_tensorrt_is_in_its_bindings_and_what_is_not_there_is_found(check: Check) -> None:
    """Over the bindings alone; the slow check adds Torch-TensorRT."""
    wrong = [
        "config.set_flag()",
        "context.set_device_memory(p)",
        "engine.no_such()",
        "trt.BuilderFlag.NONE_SUCH",
        "torch.cuda.Streams()",
        "trt.Weights(1, 2, 3, 4)",
    ]
    found = check(*wrong, script="bindings.py")
    assert {"IExecutionContext.set_device_memory", "Refitter.set_named_weights", "IBuilderConfig.set_timing_cache"} <= set(found["used"])
    assert len(found["problems"]) == len(wrong)
    assert [problem for problem in found["problems"] if "wrong:1" not in problem] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_call_of_torch_tensorrt_fits_and_the_backends_own_part_of_a_run_is_right(check: Check) -> None:
    found = check("api", "run", "cache", "records")
    assert found["api"]["trt.Refitter"] == 1
    assert found["api"]["IProgressMonitor.step_complete"] >= 1

    run = found["run"]
    assert run["worst"] == 0.0  # the same products in the same order
    assert run["graphs"] == [1, 2, 3, 4]
    assert run["profiles"] == [1, 0, 1, 1], "each number of rows has a context of its own, whose shapes stay as its graph was recorded"
    assert run["plans"] == [], "with which all weights would stay in memory"
    assert "cannot read" in run["unreadable"]
    assert "needs 0.00 GB for its weights, and 0.00 of 85.90 GB are free; load fewer programs on this device" in run["crowded"]
    assert "wants weights 'b'" in run["weightless"]
    assert run["budget"] == (64 << 30) - 64 - (1 << 30)  # free, less 64 bytes of activations and the reserve
    assert run["streamed_graphs"] == 0
    assert run["ones"] == [[[13.0, 16.0]] * 2, [[13.0, 16.0]], [[13.0, 16.0]] * 2], "without a graph, as with one"
    assert run["captures"] == 1, "what failed once is not tried at every call"
    assert len(run["warnings"]) == 1
    assert "program 'affine' at profile 'p' cannot be recorded as a CUDA graph, and runs without" in run["warnings"][0]
    assert "failed to run" in run["warnings"][0], "the reason, and not only that the capture ended badly"

    cached = found["cache"]
    assert cached["outputs"] == [[[6.0, 9.0]], [[106.0, 109.0]], [[6.0, 9.0]]]  # sums of the columns of 0..5, plus the shift
    assert cached["shared"] == {"builds": 1, "reads": 2, "plans": 1, "weights": 4}  # w, step, and b of each variant
    assert cached["other"] == [[6.0, 9.0]]
    assert cached["ported"] == {"builds": 2, "plans": 2, "weights": 4}
    assert cached["again"] == [[106.0, 109.0]]
    assert cached["edited"] == 3  # a plan is of the sources that made it
    assert cached["mended"] == 3  # the plan was whole
    assert cached["stepped"] == 4  # an integer stays in the plan

    records = found["records"]
    assert records["told"] == [["here: Tactics", 0, 3], ["here: Tactics", 1, 3], ["here: Tactics", 2, 3]]
    assert records["goes_on"] == [True, False, False]
    assert records["stopped"] == "enough"
    assert records["explained"] == "TensorRT said: INVALID_ARGUMENT: bad node /attention | slow tactic"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", MODELS)
def test_every_program_of_a_model_is_one_engine(check: Check, name: str) -> None:
    """Coverage by the converters of Torch-TensorRT, not numbers. Movie Gen with two of its 48 like layers."""
    all_of_one_engine(check(f"model:{name}")[f"model:{name}"])


def all_of_one_engine(found: dict[str, Any]) -> None:
    assert found
    assert {key: c for key, c in found.items() if c["unsupported"] or c["engines"] != 1 or c["supported"] != c["operators"] or not c["operators"]} == {}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [name for name, spec in MODELS.items() if spec.sharding])
def test_what_a_rank_runs_of_a_model_is_one_engine_with_collectives_over_its_groups(check: Check, name: str) -> None:
    """Rank 0 of a mesh of Ulysses and tensor-parallel ranks, from the same graphs as its plan."""
    found = check(f"sharded:{name}:cp=2,tp=2")[f"sharded:{name}:cp=2,tp=2"]
    all_of_one_engine(found)
    groups = {"reelstep.cp": [0, 2], "reelstep.ulysses": [0, 2], "reelstep.tp": [0, 1]}
    assert {key: c["groups"] for key, c in found.items() if key.startswith("denoise")} == {f"denoise video {p}": groups for p in ("bfloat16", "float32")}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_ring_is_no_layer_of_tensorrts(check: Check) -> None:
    found = check("sharded:movie-gen-30b:cp=4,ring=4")["sharded:movie-gen-30b:cp=4,ring=4"]
    assert found["denoise video float32"]["unsupported"] == {"reelstep.ring_attention.default": 2}, "one for each of two layers"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_ranks_graph_with_collectives_is_one_engine_over_the_ranks_of_each_axis(check: Check) -> None:
    found = check("rank")["rank"]
    assert (found["whole"]["supported"], found["whole"]["engines"]) == (found["whole"]["operators"], 1)
    assert found["groups"] == [[2, 3], [0, 2]]
    exchange, tensor = ["ALL_TO_ALL", "NONE", -1, [2, 3], 2], [0, 2]
    assert found["layers"] == [exchange] * 4 + [["ALL_REDUCE", "SUM", -1, tensor, 2], ["ALL_GATHER", "NONE", -1, tensor, 2]]
    assert not found["scatters"], "Torch-TensorRT's own would go over all ranks of the world"
    assert "program 'block' at profile 'p'" in found["uneven"]
    assert "no converter for tensorrt.fused_nccl_all_to_all.default (3)" in found["uneven"]
