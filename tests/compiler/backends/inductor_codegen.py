"""What AOTInductor makes of a model's programs for a GPU, up to the point where it runs kernels on one; run as `inductor_codegen.py SKU MODEL`.

Every program at every profile, in the precision that its engine would have; a denoiser in E4M3 too where the SKU has it. A process of its own, since much
of torch.cuda is replaced: what is made up is one GPU that can be asked its name and size, and tensors on it have shapes and no values. The lowering, the
source it gives and Triton's compiler are the real ones. Prints one line of JSON.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
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
from reelstep.compiler.cubins import SHARED_LIMIT, resources
from reelstep.compiler.passes import apply_passes
from reelstep.compiler.passes.quantise import Scheme, linears, quantise
from reelstep.compiler.program import Precision, Profile, Program
from reelstep.compiler.signature import Signature
from reelstep.compiler.skus import SKUS
from reelstep.tests.compiler.backends.shallow import programs_of

DEVICE, SKU = "cuda:0", SKUS[sys.argv[1]]
CAPABILITY = int(SKU.arch.removeprefix("sm"))
THREADS = {"sm80": 2048, "sm89": 1536, "sm90": 2048, "sm100": 2048, "sm120": 1536}
"""Of a multiprocessor (CUDA C++ Programming Guide, compute capabilities), from which the other limits are as well."""
GPU = SimpleNamespace(
    name=SKU.device_names[0], major=CAPABILITY // 10, minor=CAPABILITY % 10, total_memory=SKU.memory_bytes, multi_processor_count=SKU.units, warp_size=32,
    max_threads_per_multi_processor=THREADS[SKU.arch], max_threads_per_block=1024, regs_per_multiprocessor=65536,
    shared_memory_per_block_optin=SHARED_LIMIT[SKU.arch],
)  # fmt: skip


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
        mock.patch.object(Tensor, "__invert__", Tensor.bitwise_not),  # the same, but that it sets the device first, which a CPU build of torch cannot
        mock.patch.object(Tensor, "item", return_value=1.0),  # which a weight of one value is written into the source as
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


def check(program: Program, profile: Profile, scheme: Scheme | None) -> dict[str, Any]:
    """Operators of the graph; casts of weights; in the C++ calls of products, and of ops that torch has no C function for; what each kernel uses, as
    first configured.
    """
    signature = Signature.of(program, profile)
    precision: Precision = "float32" if program.keep_f32 else "bfloat16"
    backend = inductor.InductorBackend(device=DEVICE, autotune=False)
    exported, _ = apply_passes(capture(program, profile), keep=backend.keeps(SKU.arch))
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
    found = {}
    for program in programs_of(sys.argv[2]):
        for profile in program.profiles:
            schemes: tuple[Scheme | None, ...] = (None, "fp8") if program.name == "denoise" and CAPABILITY >= 89 else (None,)
            for scheme in schemes:
                name = f"{program.name} {profile.name} {scheme or ''}".strip()
                print(name, file=sys.stderr)
                found[name] = check(program, profile, scheme)
    print(json.dumps(found))
