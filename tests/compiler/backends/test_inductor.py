"""AOTInductor for a GPU, as far as a CPU shows it: what it accepts, and the graph that it is handed."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any, ClassVar
from zipfile import ZipFile

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from reelstep.compiler.backends import BACKENDS, Executable, inductor
from reelstep.compiler.backends.inductor import InductorBackend, Replayed
from reelstep.compiler.capture import capture
from reelstep.compiler.load import Later
from reelstep.compiler.passes import apply_passes
from reelstep.compiler.passes.mixed_precision import mixed_precision
from reelstep.compiler.passes.quantise import Scheme, linears, quantise
from reelstep.compiler.program import Profile, Program, TensorSpec
from reelstep.compiler.signature import Edge, Signature
from reelstep.compiler.skus import SKUS, is_gpu
from reelstep.engine.models import MODELS
from reelstep.engine.models.movie_gen import CONFIG_30B, MovieGenTransformer, denoise_program
from reelstep.errors import CompileError, StorageError
from reelstep.kernels.jit import HAS_TRITON
from reelstep.parallel.mesh import Mesh

CONFIG = replace(CONFIG_30B, layers=1, width=64, ffn=96, heads=4, latent_channels=3, positions=(4, 4, 4), text_widths=(5,), time_frequencies=16, qk_norm=True)


def test_one_name_is_for_both_devices_and_the_arch_says_which() -> None:
    backend, cpu = BACKENDS["inductor"], SKUS["cpu"].arch
    assert backend.runs_on(cpu)
    assert backend.on(cpu).precisions == ("float32",)
    for sku in SKUS.values():
        if is_gpu(sku.arch):
            assert backend.runs_on(sku.arch)
            assert backend.on(sku.arch).precisions == ("float32", "bfloat16")
            assert backend.on(sku.arch).default_precision()[0] == "bfloat16"
            assert backend.on(sku.arch).on(cpu) == backend.on(cpu)
    assert InductorBackend(device="cuda:0").precisions == ("float32", "bfloat16"), "for who names the device"


def test_without_a_gpu_nothing_is_built_for_one(programs: tuple[Program, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    signature = Signature.of(programs[0], programs[0].profiles[0])
    with pytest.raises(CompileError, match=r"'denoise' at profile 'l4' cannot be built for cuda by backend 'inductor' here: torch .* sees no CUDA device"):
        BACKENDS["inductor"].on("sm90").build(lambda: pytest.fail("the graph was read"), signature, "bfloat16", None, "key")


def test_a_compiler_whose_library_would_end_the_process_is_refused_before_the_graph_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that links its own copy of the C++ library into all it makes, as those that come in one folder do: loading such an engine is a fatal signal."""
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -static-libstdc++ -static-libgcc\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(inductor, "get_cpp_compiler", lambda: str(compiler))
    program = denoise_program(MovieGenTransformer(CONFIG), 8, (Profile("video", {"F": 2, "H": 4, "W": 4}, 2),))
    why = rf"{re.escape(str(compiler))} makes does not run beside PyTorch, .* \(the process was ended by SIG\w+\); set CXX to this system's own, such as /usr"
    with pytest.raises(CompileError, match=why):
        InductorBackend().build(lambda: pytest.fail("it was built"), Signature.of(program, program.profiles[0]), "float32", tmp_path, "key")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize(("sku", "model"), [*(("h100-sxm", model) for model in MODELS), ("a100-80g", "dit-mid"), ("l40s", "dit-mid"), ("b200", "dit-mid")])
def test_the_programs_that_it_generates_for_a_gpu_have_the_graphs_products_and_our_ops_and_kernels_that_compile(sku: str, model: str) -> None:
    """Of every program of a model, up to where kernels would run; see inductor_codegen.py."""
    command = [sys.executable, "-P", str(Path(__file__).with_name("inductor_codegen.py")), sku, model]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3500, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert "denoise video" in found
    for what, made in found.items():
        graph = made["graph"]
        assert made["others"] == sum(count for name, count in graph.items() if name.startswith("reelstep.")), what
        assert made["casts"] == 0, f"{what}: weights are stored as products read them"
        assert made["kernels"], what
        spilled = {name: uses for name, uses in made["kernels"].items() if not 0 < uses[0] < 255 or (uses[1] and not ANGLES.search(name))}
        assert spilled == {}, f"{what}: registers, and bytes that are spilled"
        if what.startswith("denoise"):
            product, operator = ("_scaled_mm", "aten._scaled_mm.default") if what.endswith("fp8") else ("mm", "aten.linear.default")
            assert made["products"] == {product: graph[operator]}, what
            assert made["others"] > 0, what


ANGLES = re.compile("_(sin|cos)_")
"""Where an angle may be large, its reduction keeps the bits of pi in memory."""


class Attention(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)


def test_a_graph_may_run_where_attention_lays_its_result_out_otherwise() -> None:
    """Some kernels give heads before tokens, where those of a CPU give tokens first and flattening heads copies nothing."""
    edge, x = TensorSpec("x", "float32", ("B", "n", 16)), torch.randn(2, 5, 16)
    program = Program("p", Attention(), (edge,), (replace(edge, name="y"),), (Profile("q", {"n": 5}, 3),))
    exported, _ = apply_passes(capture(program, program.profiles[0]))
    truth = Attention()(x)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        with pytest.raises(RuntimeError, match="view"):
            exported.module()(x)
        found = inductor.moved(exported, "cpu").module()(x)
    assert torch.allclose(found, truth, atol=1e-6)


def test_ranks_of_a_mesh_are_for_cpus() -> None:
    mesh = Mesh.parse("cp=2")
    assert BACKENDS["inductor"].refuses(mesh, SKUS["cpu"].arch) is None
    assert "use backend 'tensorrt'" in str(BACKENDS["inductor"].refuses(mesh, "sm90"))


def test_a_precision_that_it_does_not_build_is_refused_before_the_graph_is_read() -> None:
    def never() -> torch.export.ExportedProgram:
        pytest.fail("the graph was read")

    program = denoise_program(MovieGenTransformer(CONFIG), 8, (Profile("video", {"F": 2, "H": 4, "W": 4}, 2),))
    with pytest.raises(CompileError, match="builds float32 for cpu, not bfloat16; use precision float32 or backend 'openvino'"):
        InductorBackend().build(never, Signature.of(program, program.profiles[0]), "bfloat16", None, "key")


def test_kept_ops_stay_in_a_graph_of_bfloat16_and_take_what_comes() -> None:
    torch.manual_seed(0)
    model = MovieGenTransformer(CONFIG).eval()
    program = denoise_program(model, 8, (Profile("video", {"F": 2, "H": 4, "W": 4}, 2),))
    exported, _ = apply_passes(capture(program, program.profiles[0]), keep=InductorBackend(device="cuda:0").keeps("sm90"))
    mixed = mixed_precision(exported, Signature.of(program, program.profiles[0]))
    dtypes: dict[str, set[tuple[torch.dtype, ...]]] = {}
    for node in mixed.graph.nodes:
        if str(node.target).startswith("reelstep."):
            given = tuple(arg.meta["val"].dtype for arg in node.args if isinstance(arg, torch.fx.Node))
            dtypes.setdefault(str(node.target).split(".")[1], set()).add(given)
    f32, bf16 = torch.float32, torch.bfloat16
    assert dtypes == {
        "patchify": {(f32,)},
        "rms_modulate": {(f32, f32, f32, f32)},
        "qk_norm_rope": {(bf16, bf16, f32, f32)},
        "attention": {(bf16, bf16, bf16)},
        "gated_residual": {(f32, f32, bf16)},
        "swiglu": {(bf16, bf16)},
        "unpatchify": {(f32,)},
    }, "the residual stream stays float32, and what a product gave is read as it is"
    x, modulation, context = torch.randn(2, 3, 2, 4, 4), torch.randn(2, 7, 64), torch.randn(2, 8, 64)
    truth = exactly(model, x, modulation, context)
    with torch.no_grad():
        found = mixed.module()(x, modulation, context).double()
    assert (found - truth).norm() / truth.norm() < 2**-7, "two roundings of bfloat16"


@pytest.mark.parametrize(("scheme", "weights_bytes"), [(None, 4), ("int8-weights", 1)])
def test_a_package_for_a_cpu_holds_each_weight_once_as_the_graph_has_it(scheme: Scheme | None, weights_bytes: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    width, layers = 1024, 4
    edge, net = TensorSpec("x", "float32", ("B", "n", width)), torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers)))
    program = Program("p", net, (edge,), (replace(edge, name="y"),), (Profile("q", {"n": 4}, 3),))
    signature = Signature.of(program, program.profiles[0])
    graph, _ = apply_passes(capture(program, program.profiles[0]))
    if scheme is not None:
        graph = quantise(graph, signature, scheme, linears(graph).values(), {})
    x = torch.randn(2, 4, width)
    with torch.no_grad():
        truth = graph.module()(x)
    found = InductorBackend().build(lambda: graph, signature, "float32", tmp_path, "key")({"x": x})["y"]
    assert torch.allclose(found, truth, atol=1e-5)
    (package,) = tmp_path.glob("*.pt2")
    with ZipFile(package) as files:
        held = max(file.file_size for file in files.infolist())
    assert held == pytest.approx(layers * width**2 * weights_bytes, abs=2e6), "the library: the weights and 1.5 MB of code"


def test_a_library_that_cannot_be_loaded_is_an_error_with_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InductorBackend, "_package", lambda *given: given[-1].write_bytes(b"no package"))
    edge, profile = TensorSpec("x", "float32", ("B", "n")), Profile("any", {"n": 3}, 4)
    program = Program("p", torch.nn.Identity(), (edge,), (replace(edge, name="y"),), (profile,))
    exported, signature = capture(program, profile), Signature.of(program, profile)
    with pytest.raises(CompileError, match=r"program 'p' at profile 'any': its compiled library cannot be loaded: .*zip"):
        InductorBackend().build(lambda: exported, signature, "float32", tmp_path, "key")


class SumOfSquares(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square().sum((1, 2), keepdim=True)


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of an engine whose sum all threads take part in, and beside it where inductor keeps what it makes, unless it is told otherwise."""
    folder = tmp_path_factory.mktemp("packaged")
    cache, elsewhere = folder / "cache", folder / "elsewhere"
    edges = [(TensorSpec("x", "float32", ("B", 1024, 512)),), (TensorSpec("y", "float32", ("B", 1, 1)),)]
    program = Program("p", SumOfSquares(), *edges, (Profile("any", {}, 1),))
    exported = capture(program, program.profiles[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(elsewhere))
        InductorBackend().build(lambda: exported, Signature.of(program, program.profiles[0]), "float32", cache, "key")
    return cache


OPENED = """
import gc, os, sys
from pathlib import Path
import torch
from reelstep.compiler.backends.inductor import InductorBackend
from reelstep.compiler.signature import Edge, Signature

signature = Signature("p", "any", (Edge("x", "float32", (1024, 512)),), (Edge("y", "float32", (1, 1)),), 1)
kept = [InductorBackend().build(None, signature, "float32", Path(sys.argv[1]), "key")]
kept.append(kept)
gc.freeze()
torch.set_num_threads(int(sys.argv[2]))
print(kept[0]({"x": torch.ones(1, 1024, 512)})["y"].item(), len(os.listdir(os.environ["TMPDIR"])))
"""


def opened(cache: Path, threads: int, temporary: Path) -> tuple[float, int]:
    """In a process that finds the engine, has so many threads when it calls it, and ends with it. What it gave, and how much was unpacked then."""
    command = [sys.executable, "-P", "-c", OPENED, str(cache), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "TMPDIR": str(temporary)}, check=True)
    total, unpacked = done.stdout.split()
    return float(total), int(unpacked)


def test_a_build_leaves_the_package_and_nothing_else(packaged: Path) -> None:
    assert {path.suffix for path in packaged.iterdir()} == {".pt2", ".seal", ".secret"}
    assert [path.name for path in packaged.parent.iterdir()] == ["cache"]


def test_a_process_that_ends_with_an_engine_leaves_nothing_that_it_unpacked(packaged: Path, tmp_path: Path) -> None:
    assert opened(packaged, torch.get_num_threads(), tmp_path)[1] > 0
    assert list(tmp_path.iterdir()) == []


def test_an_engine_may_be_called_with_more_threads_than_there_were_when_it_was_compiled(packaged: Path, tmp_path: Path) -> None:
    assert opened(packaged, 4 * torch.get_num_threads(), tmp_path)[0] == 1024 * 512


@pytest.mark.parametrize(
    ("raised", "error", "says"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "ptxas"), CompileError, "cannot be compiled by inductor: .*ptxas"),
        (OSError(errno.ENOSPC, "No space left on device"), StorageError, "No space left on device.*Free some space"),
    ],
    ids=["no assembler", "a full disk"],
)
@pytest.mark.parametrize("kept", [True, False])
def test_only_a_full_disk_is_said_to_be_one(
    raised: OSError, error: type[Exception], says: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(inductor, "aoti_compile_and_package", fails)
    edge, profile = TensorSpec("x", "float32", ("B", 3)), Profile("any", {}, 4)
    program = Program("p", torch.nn.Linear(3, 3), (edge,), (replace(edge, name="y"),), (profile,))
    exported = capture(program, profile)
    with pytest.raises(error, match=says):
        InductorBackend().build(lambda: exported, Signature.of(program, profile), "float32", tmp_path if kept else None, "key")


class PretendGraph:
    """What a CUDA graph does with a launch that tells it how to play itself."""

    recording: ClassVar[list[PretendGraph]] = []

    def __init__(self) -> None:
        self.played: list[Callable[[], object]] = []
        self.place: tuple[object, object] = (None, None)

    def replay(self) -> None:
        for play in self.played:
            play()


@contextmanager
def recording(graph: PretendGraph, *, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
    graph.place = pool, stream
    PretendGraph.recording.append(graph)
    yield
    PretendGraph.recording.pop()


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SimpleNamespace(wait_stream=lambda _: None, synchronize=lambda: None)
    answers = {"Stream": lambda _: SimpleNamespace(**vars(stream)), "current_stream": lambda _: stream, "stream": nullcontext, "graph_pool_handle": object}
    for name, answer in {**answers, "CUDAGraph": PretendGraph, "graph": recording}.items():
        monkeypatch.setattr(torch.cuda, name, answer)


def test_a_call_is_recorded_once_for_each_number_of_rows_and_then_replayed(pretended: None) -> None:
    launched: list[int] = []

    def doubles(x: Tensor) -> list[Tensor]:
        launched.append(len(x))
        out = torch.empty_like(x)

        def play() -> None:
            out.copy_(2 * x)

        play()
        for graph in PretendGraph.recording:
            graph.played.append(play)
        return [out]

    edge, profile = TensorSpec("x", "float32", ("B", "n")), Profile("any", {"n": 3}, 4)
    signature = Signature.of(Program("p", torch.nn.Identity(), (edge,), (replace(edge, name="y"),), (profile,)), profile)
    executable = Replayed(doubles, signature, "cpu")
    executable.open(2)
    given = [torch.randn(rows, 3) for rows in (2, 1, 2, 1)]
    found = [executable({"x": x})["y"] for x in given]
    assert launched == [2, 2, 1, 1], "a number of rows is launched to warm up and to be recorded, and never again"
    assert all(torch.equal(y, 2 * x) for x, y in zip(given, found, strict=True)), "what was given stays what it was when the next is replayed"
    one, two = (executable.recorded[rows].graph.place for rows in (1, 2))
    assert one[0] is two[0]
    assert one[1] is two[1], "memory of a pool is given again on the stream that it was taken on"


def test_what_cannot_be_recorded_is_launched_and_warned_of_once(pretended: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    @contextmanager
    def refuses_two_rows(graph: PretendGraph, **how: Any) -> Iterator[None]:
        with recording(graph, **how):
            yield
        if launched[-1] == 2:
            raise torch.AcceleratorError("operation failed due to a previous error during capture")

    launched: list[int] = []

    def doubles(x: Tensor) -> list[Tensor]:
        launched.append(len(x))
        return [2 * x]

    monkeypatch.setattr(torch.cuda, "graph", refuses_two_rows)
    signature = Signature("p", "any", (Edge("x", "float32", (3,)),), (Edge("y", "float32", (3,)),), 4)
    executable = Replayed(doubles, signature, "cpu")
    for _ in range(3):
        x = torch.randn(2, 3)
        assert torch.equal(executable({"x": x})["y"], 2 * x)
    assert launched == [2, 2, 2, 2, 2], "to warm up, to be recorded, and three times since it could not be"
    (warning,) = caplog.messages
    assert warning.startswith("program 'p' at profile 'any' of 2 rows cannot be recorded as a CUDA graph, and runs without")
    executable.open(3)
    assert executable.recorded[3] is not None, "other numbers of rows may"


def test_engines_are_recorded_one_after_the_other_and_not_while_one_is_made(pretended: None, monkeypatch: pytest.MonkeyPatch) -> None:
    busy, most = Lock(), []

    def alone(*_: object) -> tuple[PretendGraph, list[Tensor]]:
        most.append(busy.acquire(blocking=False))
        time.sleep(0.05)
        busy.release()
        return PretendGraph(), []

    def make() -> Executable:
        alone()
        return Replayed(list, signature, "cpu")

    monkeypatch.setattr(inductor, "record", alone)
    signature = Signature("p", "any", (Edge("x", "float32", (3,)),), (), 1)
    works = [Replayed(lambda _: [], signature, "cpu") for _ in range(3)] + [Later(signature, make, lambda: None)] * 2
    with ThreadPoolExecutor(5) as pool:
        for done in [pool.submit(work.open, 1) for work in works]:
            done.result()
    assert most == [True] * 5, "three, and another that was made before it was recorded"


def test_an_engine_for_a_gpu_is_kept_for_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    found = []
    for threads in (1, 16):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append((InductorBackend(device="cuda")._machine(), InductorBackend()._machine()))
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1], "on a CPU it is compiled for them"


def test_an_engine_for_a_gpu_is_of_what_its_products_were_chosen_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user who leaves products to cuBLAS, as TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS=ATEN does, is given no engine with tiles, nor the other way round."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="NVIDIA H200", major=9, minor=0))
    all_of_them, untuned = InductorBackend(device="cuda")._machine(), InductorBackend(device="cuda", autotune=False)._machine()
    with torch._inductor.config.patch(max_autotune_gemm_backends="ATEN"):
        assert InductorBackend(device="cuda")._machine() not in (all_of_them, untuned)
        assert InductorBackend(device="cuda", autotune=False)._machine() == untuned


def test_before_a_gpus_engine_is_loaded_memory_is_given_back_and_float32_is_not_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[str] = []
    backend = InductorBackend(device="cuda", cuda_graphs=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: did.append("empty"))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(InductorBackend, "_package", lambda *_: did.append(f"package, TF32 {torch.backends.cudnn.allow_tf32}"))
    monkeypatch.setattr(inductor, "AOTIModelPackageLoader", lambda *_: did.append("load"))
    signature = Signature("p", "any", (Edge("x", "float32", (3,)),), (), 1)
    backend.build(lambda: pytest.fail("it is packaged"), signature, "float32", None, "key")
    assert did == ["package, TF32 False", "empty", "load"]


@pytest.mark.gpu
@pytest.mark.parametrize("autotune", [False, True])
def test_an_engine_on_a_gpu_is_the_model_and_a_replay_of_it_the_same_for_any_number_of_rows(tmp_path: Path, autotune: bool) -> None:
    torch.manual_seed(0)
    model = MovieGenTransformer(CONFIG).eval()
    program = denoise_program(model, 8, (Profile("video", {"F": 2, "H": 4, "W": 4}, 2),))
    signature, backend = Signature.of(program, program.profiles[0]), InductorBackend(device="cuda", autotune=autotune)
    exported, _ = apply_passes(capture(program, program.profiles[0]), keep=backend.keeps("sm90"))
    replayed = backend.build(lambda: exported, signature, "bfloat16", tmp_path, "key")
    launched = replace(backend, cuda_graphs=False).build(lambda: pytest.fail("it is in the cache"), signature, "bfloat16", tmp_path, "key")
    replayed.open(2)
    kept = []
    for rows in (1, 2, 1):
        inputs = {edge.name: torch.randn(rows, *edge.sizes) for edge in signature.inputs}
        kept.append((replayed(inputs)["velocity"], launched(inputs)["velocity"], exactly(model, *inputs.values())))
    for found, once, truth in kept:
        assert torch.equal(found, once)
        assert (found.double() - truth).norm() / truth.norm() < 2**-7


def exactly(model: MovieGenTransformer, x: Tensor, modulation: Tensor, context: Tensor) -> Tensor:
    """In float64."""
    exact = MovieGenTransformer(CONFIG).double()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        return exact(x.double(), modulation.double(), None, context.double())
