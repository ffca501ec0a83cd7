"""Bundles for GPUs that are not here, by the backend that keeps ops of ours: what they hold, where they may be opened, and what is refused before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelstep import __main__ as cli
from reelstep.compiler import load as load_module
from reelstep.compiler import skus
from reelstep.compiler.backends.inductor import InductorBackend
from reelstep.compiler.bundle import Bundle
from reelstep.compiler.compile import choose_precision, compile_model
from reelstep.compiler.cubins import compile_kernels, kernels_for
from reelstep.compiler.describe import GPU_NOT_RUN, describe, describe_json
from reelstep.compiler.finalize import finalize
from reelstep.compiler.load import arch_here, choose, load
from reelstep.compiler.program import Profile, Program, TensorSpec
from reelstep.compiler.quantisation import Calls, Engines, Quantisation
from reelstep.compiler.skus import SKUS, is_gpu
from reelstep.errors import CompileError, ConfigError
from reelstep.kernels import OPS
from reelstep.kernels.gelu_tanh import gelu_tanh
from reelstep.kernels.jit import HAS_TRITON
from reelstep.parallel.mesh import Mesh

GPUS = [name for name, sku in SKUS.items() if is_gpu(sku.arch)]
WIDTH = 16


class Act(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gelu_tanh(self.up(x)))  # type: ignore[no-any-return]

    def formula(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def act() -> Act:
    torch.manual_seed(0)
    return Act()


def bundle_of(act: Act, sku: str, out: Path, backend: str = "inductor", quantised: Quantisation | None = None) -> Bundle:
    edges = (TensorSpec("x", "float32", ("B", WIDTH)),), (TensorSpec("y", "float32", ("B", WIDTH)),)
    program = Program("act", act, *edges, (Profile("any", {}, 5),))
    return compile_model(
        model="act", version="1", settings={}, programs=(program,), backend=backend, sku=sku, out=out, solvers={}, card="# Act\n", quantisation=quantised,
    )  # fmt: skip


@pytest.fixture(scope="module")
def for_h100(tmp_path_factory: pytest.TempPathFactory, act: Act) -> Bundle:
    return bundle_of(act, "h100-sxm", tmp_path_factory.mktemp("h100") / "act.reel")


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("sku", GPUS)
def test_a_bundle_for_a_gpu_keeps_our_ops_and_its_plan_has_their_kernels_figures(act: Act, sku: str, tmp_path: Path) -> None:
    bundle = bundle_of(act, sku, tmp_path / "act.reel")
    arch = SKUS[sku].arch
    assert (bundle.plan.backend, bundle.plan.sku, bundle.plan.arch, bundle.plan.precision) == ("inductor", sku, arch, "bfloat16")
    assert bundle.plan.program("act", "any").ops["reelstep.gelu_tanh.default"] == 1
    assert torch.ops.reelstep.gelu_tanh.default in [node.target for node in bundle.program("act", "any").graph.nodes]
    (cubin,) = compile_kernels(arch, [kernel for kernel in kernels_for(arch) if kernel.name == "gelu_tanh"])
    (kernel,) = bundle.plan.kernels
    assert (kernel.kernel, kernel.registers, kernel.spilled_bytes, kernel.shared_bytes) == (
        "gelu_tanh", cubin.registers, cubin.spilled_bytes, cubin.shared_bytes,
    )  # fmt: skip
    assert {path.suffix for path in bundle.path.rglob("*") if path.is_file()} == {".json", ".md", ".safetensors"}, "nothing native"


def test_it_is_shown_here_with_what_nobody_has_seen(for_h100: Bundle) -> None:
    assert "planned for inductor on h100-sxm (sm90), bfloat16 (h100-sxm has native bfloat16), one device" in describe(for_h100)
    assert GPU_NOT_RUN in describe(for_h100)
    assert describe_json(for_h100)["not_run"] == GPU_NOT_RUN
    page = (Path(__file__).parents[2] / "docs" / "compiling.md").read_text("utf-8")
    assert GPU_NOT_RUN in " ".join(page.replace(">", " ").split())


@pytest.mark.parametrize(("here", "names"), [("cpu", r"cpu \("), ("a100-80g", r"a100-80g \(sm80, NVIDIA A100")])
def test_another_machine_refuses_it_with_both_names(
    for_h100: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: str, names: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(load_module, "detect", lambda: SKUS[here])
    monkeypatch.setattr(Bundle, "program", lambda *_: pytest.fail("a graph was read"))
    text = rf"was compiled for h100-sxm \(sm90\), and this machine is {names}.*Use it on h100-sxm, or compile one for here: .*--sku {here}`"
    for use in (lambda: finalize(for_h100, tmp_path / "cache"), lambda: load(for_h100, None)):
        with pytest.raises(CompileError, match=text):
            use()
    assert cli.main(["finalize", str(for_h100.path), "--cache", str(tmp_path / "cache")]) == 1
    assert "was compiled for h100-sxm (sm90)" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_a_machine_whose_gpu_is_in_no_table_compiles_for_others_and_says_what_it_is(
    for_h100: Bundle, act: Act, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (skus, load_module):
        monkeypatch.setattr(module, "device_here", lambda: "NVIDIA L4")
    assert bundle_of(act, "h100-sxm", tmp_path / "act.reel").plan.hash == for_h100.plan.hash
    with pytest.raises(CompileError, match=r"this machine is cpu \(.*\) with NVIDIA L4, which is in no table\. Use it on h100-sxm"):
        load(for_h100, None)
    assert load(for_h100, None, "eager")["act", "any"]({"x": torch.ones(1, WIDTH)})["y"].device.type == "cpu"


def test_engines_that_do_not_fit_a_gpu_together_are_refused_before_any_is_built(tmp_path: Path, act: Act, monkeypatch: pytest.MonkeyPatch) -> None:
    edges = (TensorSpec("x", "float32", ("B", WIDTH)),), (TensorSpec("y", "float32", ("B", WIDTH)),)
    programs = tuple(Program(name, act, *edges, (Profile("any", {}, 5),)) for name in ("first", "second"))
    made = compile_model(
        model="act", version="1", settings={}, programs=programs, backend="inductor", sku="h100-sxm", out=tmp_path / "two.reel", solvers={}, card="# Act\n",
    )  # fmt: skip
    one = 2 * sum(weight.numel() for weight in act.parameters())  # in bfloat16
    monkeypatch.setattr(Bundle, "program", lambda *_: pytest.fail("a graph was read"))
    monkeypatch.setattr(load_module, "detect", lambda: replace(SKUS["h100-sxm"], memory_bytes=2 * one - 1))
    text = r"the engines of .*two\.reel hold 4.29e-06 GB of weights \(first any 2.14e-06 GB, second any 2.14e-06 GB\), and h100-sxm has .*--precision"
    for use in (lambda: finalize(made, tmp_path / "cache"), lambda: load(made, None)):
        with pytest.raises(CompileError, match=text):
            use()
    monkeypatch.setattr(load_module, "detect", lambda: replace(SKUS["h100-sxm"], memory_bytes=2 * one))
    with pytest.raises(CompileError, match="sees no CUDA device"):
        finalize(made, tmp_path / "cache")


def test_another_backend_runs_it_here_by_the_formulas(for_h100: Bundle, act: Act) -> None:
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(load(for_h100, None, "eager")["act", "any"]({"x": x})["y"], act.formula(x), rtol=1e-6, atol=1e-6)


def test_the_device_follows_the_sku_where_it_is(for_h100: Bundle, act: Act, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = bundle_of(act, "h100-sxm", tmp_path / "null.reel", "null")
    cpu = bundle_of(act, "cpu", tmp_path / "cpu.reel", "eager")
    inductor = InductorBackend()
    assert choose(planned, "inductor", None) == (inductor, "float32"), "another backend than the plan's runs on what is here"
    monkeypatch.setattr(load_module, "detect", lambda: SKUS["h100-sxm"])
    on_gpu = InductorBackend(device="cuda")
    assert choose(for_h100, None, None) == (on_gpu, "bfloat16")
    assert choose(planned, "inductor", None) == (on_gpu, "bfloat16")
    assert choose(cpu, "inductor", None) == (inductor, "float32"), "a plan for the CPU stays there"
    assert arch_here(for_h100, choose(for_h100, "eager", None)[0]) == SKUS["cpu"].arch
    assert on_gpu.keeps(arch_here(for_h100, on_gpu)) == {*OPS}


def test_an_engine_is_built_on_the_gpu_of_the_graph_with_our_ops(for_h100: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to what only a GPU can do: packaging for it."""
    monkeypatch.setattr(load_module, "detect", lambda: SKUS["h100-sxm"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    gpu = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    given: list[Any] = []
    monkeypatch.setattr(InductorBackend, "_package", lambda self, graph, *rest: (given.append((self.device, graph())), rest[-1].write_bytes(b"")))
    monkeypatch.setattr(InductorBackend, "_load", lambda self, path, signature: None)
    assert [each.state for each in finalize(for_h100, tmp_path / "cache")] == ["built"]
    ((device, exported),) = given
    assert device == "cuda"
    assert torch.ops.reelstep.gelu_tanh.default in [node.target for node in exported.graph.nodes]
    assert [each.state for each in finalize(for_h100, tmp_path / "cache")] == ["cached"]
    gpu.name = "NVIDIA H100 PCIe"
    assert [each.state for each in finalize(for_h100, tmp_path / "cache")] == ["built"], "an engine is one device's"


class Random:
    """Requests that call the program with random rows."""

    identity = "random"

    def calls(self, engines: Engines) -> Calls:
        return {key: [{"x": torch.randn(2, WIDTH)} for _ in range(2)] for key in engines}

    def compare(self, reference: Engines, quantised: Engines) -> tuple[float, float, int]:
        x = {"x": torch.randn(5, WIDTH)}
        (key,) = reference
        exact, found = reference[key](x)["y"], quantised[key](x)["y"]
        return float(-20 * ((found - exact).norm() / exact.norm()).log10()), 1.0, 1


def fp8_limits() -> Quantisation:
    return Quantisation("fp8", max_error=0.2, min_psnr_db=20.0, requests=Random())


def test_a_bundle_in_fp8_has_its_products_beside_our_ops(act: Act, tmp_path: Path) -> None:
    bundle = bundle_of(act, "h100-sxm", tmp_path / "fp8.reel", quantised=fp8_limits())
    ops = bundle.plan.program("act", "any").ops
    assert (ops["aten._scaled_mm.default"], ops["reelstep.gelu_tanh.default"]) == (2, 1)
    assert "aten.linear.default" not in ops
    assert {node.target for node in bundle.program("act", "any").graph.nodes} >= {torch.ops.aten._scaled_mm.default, torch.ops.reelstep.gelu_tanh.default}
    assert {str(tensor.dtype) for tensor in bundle.tensors.values()} == {"torch.float32", "torch.float8_e4m3fn"}
    with pytest.raises(CompileError, match=r"fp8\.reel is quantised to fp8, of which backend 'openvino' makes nothing; use inductor or null or eager"):
        load(bundle, None, "openvino")
    load(bundle, None, "eager")
    with pytest.raises(ConfigError, match=r"fp8 on a100-80g \(sm80\), which multiplies no E4M3"):
        bundle_of(act, "a100-80g", tmp_path / "no.reel", quantised=fp8_limits())


@pytest.mark.parametrize(
    ("mesh", "backend", "text"),
    [
        ("cp=4,ring=2", "tensorrt", r"'tensorrt' on mesh cp=4,ring=2 of h100-sxm: ring=2 .* no layer for that; use cp=4 with ring=1,.*Ulysses.*tp=4"),
        ("cfg=2,cp=2,ring=2", "tensorrt", r"ring=2 sends .*use cp=2 with ring=1"),
        ("tp=2", "inductor", r"'inductor' on mesh tp=2 of h100-sxm: ranks run its pieces on CPUs alone; use backend 'tensorrt', one device, or plan it"),
    ],
)
def test_a_mesh_whose_ranks_cannot_run_is_refused_before_any_work(
    mesh: str, backend: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match=text):
        choose_precision(backend, SKUS["h100-sxm"], None, Mesh.parse(mesh))
    monkeypatch.setattr("reelstep.engine.build.hash_weights", lambda _: pytest.fail("work began"))
    out = tmp_path / "no.reel"
    assert cli.main(["compile", "reel-tiny", "--sku", "h100-sxm", "--backend", backend, "--mesh", mesh, "-o", str(out)]) == 2
    assert f"backend '{backend}' on mesh {mesh}" in capsys.readouterr().err
    assert not out.exists()


def test_what_a_gpus_machine_does_not_build_is_planned_there_as_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    sku, planned = SKUS["h100-sxm"], ("bfloat16", "h100-sxm has native bfloat16")
    assert choose_precision("tensorrt", sku, None, portable=True) == planned
    monkeypatch.setattr(load_module, "detect", lambda: sku)  # one with the GPU, and without TensorRT
    assert choose_precision("tensorrt", sku, None, portable=True) == planned
    assert choose_precision("tensorrt", sku, None, Mesh.parse("tp=2")) == planned, "ranks build their own"
    with pytest.raises(CompileError, match="backend 'tensorrt' does not run on this machine"):
        choose_precision("tensorrt", sku, None)


@pytest.mark.parametrize("mesh", ["cp=4", "tp=2", "cfg=2,cp=2,tp=2"])
def test_tensorrt_takes_ulysses_and_tensor_parallel_meshes(mesh: str) -> None:
    assert choose_precision("tensorrt", SKUS["h100-sxm"], None, Mesh.parse(mesh))[0] == "bfloat16"
    assert choose_precision("null", SKUS["h100-sxm"], None, Mesh.parse("cp=4,ring=4"))[0] == "bfloat16"
