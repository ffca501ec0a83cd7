"""What can be shown of backend `tensorrt` without its libraries and a GPU; run as `conformance.py FOLDER CHECK [ARGUMENTS]`, in a process of its own.

FOLDER holds the libraries of stub.py. Prints one line of JSON.
"""

from __future__ import annotations

import ast
import ctypes
import dataclasses
import importlib
import inspect
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from unittest import mock

import stub

stub.install(Path(sys.argv[1]))

import api  # noqa: E402  # these import tensorrt, which the line above made possible
import tensorrt as trt  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed._functional_collectives as functional  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch_tensorrt.dynamo.conversion import DYNAMO_ATEN_CONVERTERS  # noqa: E402
from torch_tensorrt.dynamo.lowering.passes.fuse_distributed_ops import tensorrt_fused_nccl_reduce_scatter_op  # noqa: E402

from reelstep.compiler import recording, sources  # noqa: E402
from reelstep.compiler.backends import unwatched  # noqa: E402
from reelstep.compiler.backends.tensorrt import cache, collectives, engine, network  # noqa: E402
from reelstep.compiler.backends.tensorrt.records import Progress, Records  # noqa: E402
from reelstep.compiler.capture import capture  # noqa: E402
from reelstep.compiler.passes import apply_passes  # noqa: E402
from reelstep.compiler.program import DType, Precision, Profile, Program, TensorSpec  # noqa: E402
from reelstep.compiler.sharded import rank_programs  # noqa: E402
from reelstep.compiler.signature import Signature, torch_dtype  # noqa: E402
from reelstep.errors import Cancelled, CompileError  # noqa: E402
from reelstep.parallel.mesh import Mesh  # noqa: E402
from reelstep.parallel.pretend import pretended_rank  # noqa: E402
from reelstep.tests.compiler.backends.shallow import parts_of, programs_of  # noqa: E402

FILES = ("build", "cache", "collectives", "engine", "network", "records")


def check_api() -> dict[str, int]:
    """Uses of TensorRT, Torch-TensorRT and torch.cuda in the backend's files, all of which are there and take their arguments."""
    used: Counter[str] = Counter()
    for name in FILES:
        module = importlib.import_module(f"reelstep.compiler.backends.tensorrt.{name}")
        tree = ast.parse(inspect.getsource(module))
        if name != "cache":  # its `cache` is a directory, and it calls nothing of TensorRT
            used += api.check_source(tree, name)
        used += api.check_imports(module, tree) + api.check_overrides(module)
    for kind in (trt.Builder, trt.INetworkDefinition, trt.Runtime, trt.Refitter, trt.IExecutionContext):
        assert hasattr(kind, "error_recorder"), f"{kind.__name__} takes no error recorder"
    runtime = importlib.import_module("torch_tensorrt.dynamo.runtime._TRTEngine")
    assert "._comm_ptr()" in inspect.getsource(runtime), "Torch-TensorRT takes its communicator otherwise; torch's CPU builds cannot tell"
    return dict(used)


def check_model(name: str) -> dict[str, Any]:
    """A dry run of every program of a model at its first profile, in every precision that it would run in."""
    return dry_run(programs_of(name))


def check_sharded(name: str, mesh: str) -> dict[str, Any]:
    """The same of what rank 0 of a mesh runs of a model, and whether its collectives can go over their groups."""
    with pretended_rank(Mesh.parse(mesh), 0) as comm:
        return dry_run(rank_programs(parts_of(name), comm))


def dry_run(programs: Sequence[Program]) -> dict[str, Any]:
    found = {}
    for program in programs:
        profile = program.profiles[0]
        exported, _ = apply_passes(capture(program, profile))
        precisions: tuple[Precision, ...] = ("float32",) if program.keep_f32 else ("bfloat16", "float32")
        for precision in precisions:
            lowered = network.lower(exported, Signature.of(program, profile), precision)
            about = {"groups": collectives.groups_of(lowered), **dataclasses.asdict(network.coverage(lowered))}
            found[f"{program.name} {profile.name} {precision}"] = about
    return found


class RankBlock(nn.Module):
    """One rank's attention block, made by hand: 8 heads of 16 over 2 Ulysses ranks, its output projection over 2 tensor-parallel ranks."""

    def __init__(self, ulysses: str, tensor: str, uneven: bool) -> None:
        super().__init__()
        self.ulysses, self.tensor, self.sizes = ulysses, tensor, [3, 5] if uneven else [4, 4]
        self.qkv = nn.Linear(128, 3 * 128)
        self.out = nn.Linear(64, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[1, L / 2, 128]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, 8, 16)).permute(2, 3, 0, 1, 4).unbind(0)  # [8, 1, L / 2, 16]
        q, k, v = (self.trade(part) for part in (q, k, v))
        y = scaled_dot_product_attention(q, k, v).unflatten(2, (2, -1)).permute(2, 0, 3, 1, 4).flatten(3)  # [2, 1, L / 2, 64]
        back = functional.all_to_all_single(y.contiguous(), None, None, self.ulysses)
        joined = back.permute(1, 2, 0, 3).flatten(2)
        reduced = functional.all_reduce(self.out(joined[..., :64]), "sum", self.tensor)
        return functional.all_gather_tensor(reduced, 0, self.tensor)[:1] + x

    def trade(self, part: Tensor) -> Tensor:
        """Heads for tokens: [8, 1, L / 2, 16] to [1, 4, L, 16]."""
        got = functional.all_to_all_single(part.contiguous(), self.sizes, self.sizes, self.ulysses)
        return got.unflatten(0, (2, 4)).permute(2, 1, 0, 3, 4).flatten(2, 3)


def rank_graph(ulysses: str, tensor: str, uneven: bool = False) -> tuple[network.GraphModule, Signature]:
    exported = torch.export.export(RankBlock(ulysses, tensor, uneven), (torch.zeros(1, 32, 128),), strict=False)
    edge = TensorSpec("x", "float32", ("B", 32, 128))
    program = Program("block", nn.Identity(), (edge,), (edge,), (Profile("p", {}, 1),))
    signature = Signature.of(program, program.profiles[0])
    return network.lower(exported, signature, "float32"), signature


def check_rank() -> dict[str, Any]:
    """A rank's graph with collectives over two axes of a world of four: one engine, over the ranks of each axis; uneven shares are refused."""
    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=4)
    groups = {name: [dist.new_group(line) for line in lines] for name, lines in {"u": ([0, 1], [2, 3]), "t": ([0, 2], [1, 3])}.items()}
    ulysses, tensor = groups["u"][1].group_name, groups["t"][0].group_name
    lowered, _ = rank_graph(ulysses, tensor)
    uneven, signature = rank_graph(ulysses, tensor, uneven=True)
    named = collectives.groups_of(lowered)
    made = []
    for node in lowered.graph.nodes:
        if node.target in collectives.COLLECTIVES:
            converter, _, about = network.DYNAMO_CONVERTERS[node]
            assert about["requires_native_multidevice"]
            net = mock.Mock()
            converter(SimpleNamespace(net=net), node.target, node.args, {}, node.name)
            _, op, reduction, root, ranks = net.add_dist_collective.call_args.args
            made.append([op.name, reduction.name, root, ranks.tolist(), net.add_dist_collective.return_value.num_ranks])
    return {
        "whole": dataclasses.asdict(network.coverage(lowered)),
        "groups": [named[ulysses], named[tensor]],
        "layers": made,
        "scatters": tensorrt_fused_nccl_reduce_scatter_op in DYNAMO_ATEN_CONVERTERS,
        "uneven": refused(lambda: network.convert(uneven, signature, Records())),
    }


class Affine(nn.Module):
    """Rows [B, 3] to [B, 2], a second output of integers."""

    def __init__(self, shift: float, step: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.arange(6.0).reshape(3, 2))
        self.b = nn.Parameter(torch.full((2,), shift))
        self.register_buffer("step", torch.tensor([step]))

    def forward(self, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.w + self.b, n + self.step


def affine(shift: float, step: int = 1) -> Program:
    edges = TensorSpec("x", "float32", ("B", 3)), TensorSpec("n", "int64", ("B", 1))
    outputs = TensorSpec("y", "float32", ("B", 2)), TensorSpec("next", "int64", ("B", 1))
    return Program("affine", Affine(shift, step), edges, outputs, (Profile("p", {}, 4),))


class PretendEngine:
    """Computes Affine with the weights that it was given, reading and writing where it was told, as a plan of it would."""

    def __init__(self, streamable: int = 0, recordable: bool = True) -> None:
        self.io = {"x": trt.DataType.FLOAT, "n": trt.DataType.INT64, "output0": trt.DataType.FLOAT, "output1": trt.DataType.INT64}
        self.num_io_tensors, self.device_memory_size_v2, self.streamable_weights_size = len(self.io), 64, streamable
        self.weight_streaming_budget_v2 = streamable
        self.weights: dict[str, Tensor] = {}
        self.recordable, self.capturing, self.captures = recordable, False, 0
        self.contexts: list[PretendContext] = []

    def get_tensor_name(self, index: int) -> str:
        return list(self.io)[index]

    def get_tensor_dtype(self, name: str) -> trt.DataType:
        return self.io[name]

    def create_execution_context(self, strategy: trt.ExecutionContextAllocationStrategy) -> PretendContext:
        assert strategy == trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self.contexts.append(PretendContext(self))
        return self.contexts[-1]


class PretendContext:
    def __init__(self, owner: PretendEngine) -> None:
        self.owner, self.profile, self.rows, self.runs = owner, 0, 0, 0
        self.addresses: dict[str, int] = {}
        self.memory = 0

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self.owner.device_memory_size_v2
        self.memory = memory

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.rows = shape[0]
        return self.profile == 1 or shape[0] == 1

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.rows, {"output0": 2, "output1": 1}[name]

    def at(self, name: str, width: int, dtype: torch.dtype) -> Tensor:
        return memory(self.addresses[name], self.rows * width, dtype).reshape(self.rows, width)

    def execute_async_v3(self, stream: int) -> bool:
        assert self.memory
        if self.owner.capturing and not self.owner.recordable:
            return False
        self.runs += 1
        weights = self.owner.weights
        self.at("output0", 2, torch.float32).copy_(self.at("x", 3, torch.float32) @ weights["w"].reshape(3, 2) + weights["b"])
        self.at("output1", 1, torch.int64).copy_(self.at("n", 1, torch.int64) + 1)
        return True


def memory(address: int, count: int, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(address), dtype=dtype)


class PretendRefitter:
    def __init__(self, owner: PretendEngine, log: Any) -> None:
        self.owner, self.given = owner, dict[str, Any]()

    def get_all_weights(self) -> list[str]:
        return ["w", "b"]

    def set_named_weights(self, name: str, weights: Any, location: Any) -> bool:
        self.given[name] = weights
        return True

    def get_missing_weights(self) -> list[str]:
        return [name for name in self.get_all_weights() if name not in self.given]

    def refit_cuda_engine(self) -> bool:
        self.owner.weights = {name: memory(address, count, torch.float32).clone() for name, (_, address, count) in self.given.items()}
        return True


class PretendGraph:
    """Does again what was enqueued while it was recorded."""

    def __init__(self) -> None:
        self.recorded: list[Callable[[], object]] = []

    def replay(self) -> None:
        for work in self.recorded:
            work()


def pretend(runtime: PretendEngine) -> Any:
    """TensorRT and CUDA on the CPU, for the backend's own part of a run: names, rows, addresses, weights, graphs."""

    class Recording:
        def __init__(self, graph: PretendGraph, pool: Any, stream: Any, capture_error_mode: str) -> None:
            self.graph = graph

        def __enter__(self) -> None:
            self.before = [context.runs for context in runtime.contexts]
            runtime.capturing = True
            runtime.captures += 1

        def __exit__(self, *_: object) -> None:
            runtime.capturing = False
            if not runtime.recordable:
                raise torch.AcceleratorError("operation failed due to a previous error during capture")
            for context, before in zip(runtime.contexts, self.before, strict=True):
                self.graph.recorded += [lambda c=context: c.execute_async_v3(0)] * (context.runs - before)  # with whatever shapes the context has by then

    cuda = {
        "Stream": mock.Mock(), "stream": lambda _: nullcontext(), "device": lambda _: nullcontext(), "current_stream": mock.Mock(),
        "CUDAGraph": PretendGraph, "graph": Recording,
    }  # fmt: skip
    stack = mock.MagicMock()
    patches = [
        mock.patch.multiple(torch.cuda, **cuda),
        mock.patch.object(trt, "Runtime", return_value=mock.Mock(deserialize_cuda_engine=lambda data: runtime if data == b"plan" else None)),
        mock.patch.object(trt, "Refitter", PretendRefitter),
        mock.patch.object(trt, "Weights", lambda dtype, address, count: (dtype, address, count)),
    ]
    stack.__enter__.side_effect = lambda *_: [patch.__enter__() for patch in patches]
    stack.__exit__.side_effect = lambda *error: [patch.__exit__(*error) for patch in reversed(patches)] and None
    return stack


def plan_of(program: Program) -> engine.Plan:
    module: Any = program.module
    return engine.Plan(b"plan", ("x", "n"), ("output0", "output1"), {"w": module.w.detach(), "b": module.b.detach()}, False, None)


def check_run() -> dict[str, Any]:
    """An executable over a pretended runtime gives what the module gives, for any rows in any order, one graph for each number of rows."""
    program = affine(7.0)
    signature = Signature.of(program, program.profiles[0])
    runtime, worst, kept = PretendEngine(), 0.0, []
    with pretend(runtime):
        run = engine.TensorRtExecutable(plan_of(program), signature, torch.device("cpu"))
        for rows in (2, 1, 4, 2, 1, 3):
            inputs = {"x": torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows)), "n": torch.arange(rows)[:, None]}
            found, wanted = run(inputs), program.module(**inputs)
            kept.append((found["y"], wanted[0]))
            assert torch.equal(found["next"], wanted[1])
        worst = max(float((y - want).abs().max()) for y, want in kept)
        graphs = sorted(run.graphs)
        foreign = dataclasses.replace(plan_of(program), data=b"another's")
        unreadable = refused(lambda: engine.TensorRtExecutable(foreign, signature, torch.device("cpu")))
        with mock.patch.object(torch.cuda, "mem_get_info", return_value=(8, 80 << 30)):
            crowded = refused(lambda: engine.TensorRtExecutable(foreign, signature, torch.device("cpu")))
        unweighted = dataclasses.replace(plan_of(program), weights={"w": torch.zeros(3, 2)})
        weightless = refused(lambda: engine.TensorRtExecutable(unweighted, signature, torch.device("cpu")))
    short = PretendEngine(streamable=100 << 30)  # more than the 64 GB that are free
    with pretend(short):
        streamed = engine.TensorRtExecutable(plan_of(program), signature, torch.device("cpu"))
        streamed({"x": torch.zeros(2, 3), "n": torch.zeros(2, 1, dtype=torch.int64)})
    stubborn = PretendEngine(recordable=False)
    with pretend(stubborn), mock.patch.object(recording.log, "warning") as warned:
        unrecorded = engine.TensorRtExecutable(plan_of(program), signature, torch.device("cpu"))
        ones = [unrecorded({"x": torch.ones(rows, 3), "n": torch.zeros(rows, 1, dtype=torch.int64)})["y"].tolist() for rows in (2, 1, 2)]
    return {
        "crowded": crowded, "ones": ones, "captures": stubborn.captures, "warnings": [call.args[0] % call.args[1:] for call in warned.call_args_list],
        "worst": worst, "graphs": graphs, "profiles": [context.profile for context in runtime.contexts], "unreadable": unreadable, "weightless": weightless,
        "plans": [name for name, value in vars(run).items() if isinstance(value, engine.Plan)],
        "budget": short.weight_streaming_budget_v2, "streamed_graphs": len(streamed.graphs),
    }  # fmt: skip


def refused(call: Callable[[], object]) -> str:
    try:
        call()
    except CompileError as error:
        return str(error)
    raise AssertionError("nothing was raised")


def check_cache() -> dict[str, Any]:
    """Two bundles that differ in weights only share a plan; two SKUs share weights; what is damaged is made again."""
    builds: list[str] = []
    reads: list[float] = []

    def convert(lowered: Any, signature: Signature, records: Records) -> network.Network:
        weights = {"w": lowered.get_parameter("w").detach(), "b": lowered.get_parameter("b").detach(), "step": lowered.get_buffer("step")}
        return network.Network(None, None, ("x", "n"), ("output0", "output1"), weights, {}, None)

    def build_plan(*_: Any) -> bytes:
        builds.append("plan")
        return b"plan"

    def load(folder: Path, shift: float, gpu: str = "NVIDIA H100 80GB HBM3", key: str = "bundle", step: int = 1) -> Tensor:
        program = affine(shift, step)
        exported, _ = apply_passes(capture(program, program.profiles[0]))

        def graph() -> Any:
            reads.append(shift)
            return exported

        sku = SimpleNamespace(**{**vars(stub.GPU), "name": gpu})
        here = mock.patch.object(cache, "here", return_value=torch.device("cpu"))
        with pretend(PretendEngine()), here, mock.patch.object(torch.cuda, "get_device_properties", return_value=sku):
            run = cache.build(graph, Signature.of(program, program.profiles[0]), "float32", folder, f"{key} {shift}", unwatched)
            return run({"x": torch.ones(1, 3), "n": torch.zeros(1, 1, dtype=torch.int64)})["y"]

    with (
        tempfile.TemporaryDirectory() as name,
        mock.patch.object(cache, "convert", convert),
        mock.patch.object(cache, "lower", lambda exported, *_: exported.module()),
        mock.patch.object(cache, "build_plan", build_plan),
    ):
        folder = Path(name)
        outputs = [load(folder, shift).tolist() for shift in (0.0, 100.0, 0.0)]
        shared = {"builds": len(builds), "reads": len(reads), "plans": len(list(folder.glob("*.plan"))), "weights": len(weight_files(folder))}
        other = load(folder, 0.0, "NVIDIA H200").tolist()
        ported = {"builds": len(builds), "plans": len(list(folder.glob("*.plan"))), "weights": len(weight_files(folder))}
        with mock.patch.object(sources, "source_hash", return_value="edited"):
            load(folder, 0.0, key="bundle, by edited sources")
        edited = len(builds)
        for file in weight_files(folder):
            file.write_bytes(b"damaged")
        again, mended = load(folder, 100.0).tolist(), len(builds)
        load(folder, 100.0, key="bundle of other steps", step=2)
    return {"stepped": len(builds), "outputs": outputs, "shared": shared, "other": other, "ported": ported, "edited": edited, "again": again, "mended": mended}


def weight_files(folder: Path) -> list[Path]:
    """Those named by a sha256; seals lie beside them."""
    return [file for file in (folder / "tensorrt-weights").iterdir() if len(file.name) == 64]


def check_records() -> dict[str, Any]:
    """Errors and warnings are kept in an explanation; an exception of the watcher stops a build and is not lost."""
    told: list[tuple[str, int, int]] = []

    def watch(phase: str, done: int, total: int) -> None:
        told.append((phase, done, total))
        if done == 2:
            raise Cancelled("enough")

    progress = Progress(watch, "here")
    progress.phase_start("Tactics", None, 3)
    goes_on = [progress.step_complete("Tactics", step) for step in (0, 1, 2)]
    progress.phase_finish("Tactics")
    with Records() as records:
        fatal = records.errors.report_error(trt.ErrorCodeTRT.INVALID_ARGUMENT, "bad node /attention")
        importlib.import_module("torch_tensorrt").logging.TRT_LOGGER.log(trt.ILogger.Severity.WARNING, "slow tactic")
    importlib.import_module("torch_tensorrt").logging.TRT_LOGGER.log(trt.ILogger.Severity.WARNING, "of another's work")
    return {"told": told, "goes_on": goes_on, "stopped": str(progress.stopped), "fatal": fatal, "explained": records.explain(), "silent": Records().explain()}


CHECKS: dict[str, Callable[..., Any]] = {
    "api": check_api, "model": check_model, "sharded": check_sharded, "rank": check_rank, "run": check_run, "cache": check_cache, "records": check_records,
}  # fmt: skip

if __name__ == "__main__":
    names = {str(torch_dtype(name)) for name in get_args(DType)}
    assert names <= {str(dtype) for dtype in engine.TRT_DTYPES}
    print(json.dumps({check: CHECKS[check.split(":")[0]](*check.split(":")[1:]) for check in sys.argv[2:]}))
