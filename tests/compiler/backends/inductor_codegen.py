"""What AOTInductor makes of a model's graph for a GPU, up to the point where it runs kernels on one; run as `inductor_codegen.py MODEL PROGRAM CHECK ...`.

CHECK is PRECISION or PRECISION:SCHEME. A process of its own, since much of torch.cuda is replaced: what is made up is one GPU that can be asked its name
and size, and tensors on it have shapes and no values. The lowering, the source it gives and Triton's compiler are the real ones. Prints one line of JSON.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, get_args
from unittest import mock

import torch
import triton
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.async_compile import AsyncCompile, _load_triton_kernel_from_source
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from reelstep.compiler.backends import inductor
from reelstep.compiler.capture import capture
from reelstep.compiler.cubins import resources
from reelstep.compiler.passes import apply_passes
from reelstep.compiler.passes.quantise import Scheme, linears, quantise
from reelstep.compiler.program import Precision
from reelstep.compiler.signature import Signature
from reelstep.compiler.skus import SKUS
from reelstep.engine.models import MODELS

DEVICE, SKU = "cuda:0", SKUS["h100-sxm"]
CAPABILITY = int(SKU.arch.removeprefix("sm"))
GPU = SimpleNamespace(
    name=SKU.device_names[0], major=CAPABILITY // 10, minor=CAPABILITY % 10, total_memory=SKU.memory_bytes, multi_processor_count=SKU.units, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536, shared_memory_per_block_optin=232448,
)  # fmt: skip
"""The limits of compute capability 9.0 (CUDA C++ Programming Guide)."""


class Driver:
    """What Triton asks of a driver before it compiles."""

    limits: Mapping[str, int] = {"max_shared_mem": GPU.shared_memory_per_block_optin, "multiprocessor_count": SKU.units, "warpSize": GPU.warp_size}
    utils = SimpleNamespace(get_device_properties=lambda _: Driver.limits)

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", CAPABILITY, GPU.warp_size)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device(DEVICE)


class Generated(BaseException):
    """All source is there; next AOTInductor would run its kernels. Not an Exception, which it would wrap.

    calls: what the program does, a line for each; kernels: the source of each Triton kernel by its name.
    """

    def __init__(self, wrapper: PythonWrapperCodegen) -> None:
        super().__init__()
        self.calls = "\n".join(str(getattr(line, "line", line)) for line in wrapper.wrapper_call._lines)
        self.kernels: dict[str, str] = {}
        with mock.patch.object(AsyncCompile, "triton", lambda _, name, source, **__: self.kernels.setdefault(name, source)):
            exec(wrapper.kernel_autotune_defs.getvalue(), {})


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Inside, torch and Triton find one GPU. A tensor on it can only be a fake one."""
    answers: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": GPU, "get_device_capability": (GPU.major, GPU.minor),
        "_lazy_init": None, "set_device": None, "synchronize": None, "_exchange_device": 0, "_maybe_exchange_device": 0,
        "get_rng_state": torch.get_rng_state(), "set_rng_state": None,
    }  # fmt: skip
    interface = {"get_compute_capability": CAPABILITY, "exchange_device": 0, "maybe_exchange_device": 0}
    interface |= {name: answers[name] for name in ("is_available", "device_count", "current_device", "get_device_properties", "set_device", "synchronize")}
    workers = {name: interface[name] for name in ("current_device", "get_device_properties", "set_device")}

    def answering(values: dict[str, Any], wrap: Any = lambda f: f) -> dict[str, Any]:
        return {name: wrap(lambda *_, value=value, **__: value) for name, value in values.items()}

    triton.runtime.driver.set_active(Driver())
    if not hasattr(torch._C, "_CudaDeviceProperties"):
        torch._C._CudaDeviceProperties = type("_CudaDeviceProperties", (), {})  # type: ignore[attr-defined]
    with (
        mock.patch("torch.version.cuda", "13.0"),
        mock.patch.multiple(torch.cuda, **answering(answers)),
        mock.patch.multiple(CudaInterface, **answering(interface, staticmethod)),
        mock.patch.multiple(CudaInterface.Worker, **answering(workers, staticmethod)),
        mock.patch("torch._inductor.fx_passes.joint_graph.lazy_init"),  # patterns of attention and of products, which it makes with tensors on the GPU
        mock.patch("torch._inductor.fx_passes.post_grad.lazy_init"),
        mock.patch("torch._inductor.graph.is_same_tensor", lambda a, b: a is b),  # and not by address
        mock.patch("torch._inductor.runtime.triton_helpers.set_driver_to_gpu"),
        mock.patch("torch._inductor.runtime.triton_heuristics.StaticTritonCompileResult.can_statically_launch", return_value=None),
        mock.patch.object(inductor, "move_to_device_pass", move),
        mock.patch.object(PythonWrapperCodegen, "generate_and_run_autotune_block", stop),
        torch.no_grad(),
    ):
        yield


def stop(wrapper: PythonWrapperCodegen) -> None:
    raise Generated(wrapper)


def move(exported: ExportedProgram, device: str) -> ExportedProgram:
    """The real pass over weights that have no values."""
    mode: Any = next(node.meta["val"] for node in exported.graph.nodes if isinstance(node.meta.get("val"), Tensor)).fake_mode
    with mode:
        for tensors in (exported.state_dict, exported.constants):
            for name, tensor in tensors.items():
                if isinstance(tensor, Tensor):
                    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                    tensors[name] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
        assert exported.example_inputs is not None
        exported._example_inputs = (tuple(map(mode.from_tensor, exported.example_inputs[0])), {})
        return move_to_device_pass(exported, device)


def check(model: str, name: str, precision: Precision, scheme: Scheme | None) -> dict[str, Any]:
    """Operators of the graph; casts of weights; in the C++ calls of products, and of ops that torch has no C function for; what each kernel uses, as
    first configured.
    """
    spec = MODELS[model]
    program = next(program for program in spec.programs(spec.build()) if program.name == name)
    signature = Signature.of(program, program.profiles[0])
    backend = inductor.InductorBackend(device=DEVICE, autotune=False)
    exported, _ = apply_passes(capture(program, program.profiles[0]), keep=backend.keeps(SKU.arch))
    if scheme is not None:
        exported = quantise(exported, signature, scheme, [*linears(exported).values()], {})
    ops = Counter(str(node.target) for node in exported.graph.nodes if node.op == "call_function")
    with pretended_gpu():
        lowered = backend._lowered(exported, signature, precision)
        weights = {node for node in lowered.graph.find_nodes(op="placeholder") if node.name not in lowered.graph_signature.user_inputs}
        casts = sum(node.target is torch.ops.aten.to.dtype and node.args[0] in weights for node in lowered.graph.nodes)
        try:
            torch._inductor.aoti_compile_and_package(lowered, inductor_configs=backend._options(lowered))
        except Generated as made:
            used = {kernel: compiled(kernel, source) for kernel, source in made.kernels.items()}
            products = Counter(re.findall(r"aoti_torch_cuda_(\w*mm)_out\(", made.calls))
            others = made.calls.count("aoti_torch_proxy_executor_call_function(")
    return {"graph": ops, "casts": casts, "products": products, "others": others, "kernels": used}


def compiled(name: str, source: str) -> tuple[int, int]:
    """Registers and spilled bytes of a thread."""
    autotuner = _load_triton_kernel_from_source(name, source)
    built = autotuner._precompile_config(autotuner.configs[0])
    code: bytes = built.kernel.asm["cubin"]
    return resources(code)


if __name__ == "__main__":
    model, program, *checks = sys.argv[1:]
    found = {}
    for each in checks:
        precision, _, scheme = each.partition(":")
        assert precision in get_args(Precision)
        found[each] = check(model, program, precision, scheme or None)  # type: ignore[arg-type]  # looked at above, and by `quantise`
    print(json.dumps(found))
