"""Compile the kernels for a GPU that is not here: Triton and the assembler it ships need none.

A bundle can carry the result to the machine that runs it, and registers, spills and shared memory say beforehand how a kernel will fit an arch.
`python -P -m reelstep.compiler.cubins --arch sm90` prints them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from reelstep.compiler.plan import KernelPlan, Plan, canonical_json
from reelstep.compiler.storage import replace_file
from reelstep.errors import CompileError, NotFound, ReelstepError, StorageError, unknown
from reelstep.kernels import OPS
from reelstep.kernels.jit import HAS_TRITON, interpreted, triton
from reelstep.kernels.op import NAMESPACE, Kernel

SHARED_LIMIT = {"sm80": 163 * 1024, "sm89": 99 * 1024, "sm90": 227 * 1024, "sm100": 227 * 1024, "sm120": 99 * 1024}
"""Every arch we compile for, and the bytes of shared memory that one program may have there (CUDA C++ Programming Guide, compute capabilities)."""

USAGE = re.compile(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:\d+ LOCAL:(?P<local>\d+)")


@dataclass(frozen=True)
class Cubin:
    """One kernel in the machine code of one arch."""

    kernel: str
    arch: str
    warps: int
    stages: int
    registers: int  # a thread; 255 is the most
    spilled_bytes: int  # a thread, of memory that stands in for registers
    shared_bytes: int  # a program
    code: bytes = field(repr=False)

    def __str__(self) -> str:
        return (
            f"{self.kernel:<24} {self.arch:<6} {self.warps:>5} {self.stages:>6} {self.registers:>9} {self.spilled_bytes:>7} {self.shared_bytes:>7}"
            f" {len(self.code):>7}"
        )


HEADER = f"{'kernel':<24} {'arch':<6} warps stages registers spilled  shared    code"


def kernels_for(arch: str) -> tuple[Kernel, ...]:
    """The kernels of every op that `arch` can run; each op names those with the shapes that matter. Raises NotFound for an arch we do not compile for."""
    if arch not in SHARED_LIMIT:
        raise unknown("arch", arch, SHARED_LIMIT)
    number = int(arch.removeprefix("sm"))
    return tuple(kernel for op in OPS.values() for kernel in op.kernels(number) if kernel.min_arch <= number)


def compile_kernels(arch: str, kernels: Sequence[Kernel] | None = None) -> Iterator[Cubin]:
    """Cubins of `kernels`, by default all for `arch`, as they are made.

    Raises NotFound for an arch we do not compile for, CompileError without Triton, in its interpreter, or naming the kernel that does not compile.
    """
    chosen = kernels_for(arch) if kernels is None else kernels
    if not HAS_TRITON:
        raise CompileError("compiling kernels needs Triton; install reelstep[triton]")
    return (_compile(kernel, arch) for kernel in chosen)


def with_kernels(plan: Plan, folder: Path | None = None) -> Plan:
    """`plan` with what the kernels of its kept ops use on its arch, or why nobody knows. folder: of figures by the hash of kernel, arch and compiler.

    Raises CompileError naming a kernel that does not compile.
    """
    programs = (*plan.programs, *(program for group in plan.ranks for program in group.programs))
    called = {name.split(".")[1] for program in programs for name in program.ops if name.startswith(f"{NAMESPACE}.")}
    kept = [name for name in OPS if name in called]
    if not kept or plan.arch not in SHARED_LIMIT:
        return plan
    if _why_not():
        return replace(plan, kernels_by=f"{compiled_by(plan.arch)} ({', '.join(kept)})")
    number = int(plan.arch.removeprefix("sm"))
    found = [_figures(name, kernel, plan.arch, folder) for name in kept for kernel in OPS[name].kernels(number) if kernel.min_arch <= number]
    return replace(plan, kernels=tuple(found), kernels_by=compiled_by(plan.arch))


def compiled_by(arch: str) -> str:
    """What compiles kernels for an arch here, or why nothing does, as a plan says it."""
    why = _why_not()
    return f"not compiled: {why}" if why else f"compiled for {arch} by Triton {triton.__version__}"


def _why_not() -> str | None:
    if not HAS_TRITON:
        return "Triton is not installed; install reelstep[triton]"
    if any(interpreted(kernel.function) for op in OPS.values() for kernel in op.kernels(90)):
        return "TRITON_INTERPRET=1 is set, and the interpreter makes no machine code"
    return None


def _figures(op: str, kernel: Kernel, arch: str, folder: Path | None) -> KernelPlan:
    if folder is None:
        return _measured(op, kernel.name, arch)
    made_of = [triton.__version__, arch, kernel.function.cache_key, dict(kernel.arguments), kernel.warps, kernel.stages]
    file = folder / f"kernel-{op}-{hashlib.sha256(canonical_json(made_of)).hexdigest()}.json"
    if file.is_file():
        with suppress(ValueError, TypeError):  # damaged: measured again
            return KernelPlan(**json.loads(file.read_bytes()))
    found = _measured(op, kernel.name, arch)
    with suppress(OSError):  # then they are found again the next time
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(file, canonical_json(asdict(found)))
    return found


@cache
def _measured(op: str, name: str, arch: str) -> KernelPlan:
    (kernel,) = (kernel for kernel in OPS[op].kernels(int(arch.removeprefix("sm"))) if kernel.name == name)
    cubin = _compile(kernel, arch)
    return KernelPlan(op, cubin.kernel, cubin.warps, cubin.stages, cubin.registers, cubin.spilled_bytes, cubin.shared_bytes)


def _compile(kernel: Kernel, arch: str) -> Cubin:
    if interpreted(kernel.function):
        raise CompileError("TRITON_INTERPRET=1 is set, and the interpreter makes no machine code; unset it before Triton is imported")
    target = triton.backends.compiler.GPUTarget("cuda", int(arch.removeprefix("sm")), 32)
    try:
        built = triton.compile(_source(kernel), target=target, options={"num_warps": kernel.warps, "num_stages": kernel.stages})
    except Exception as error:  # the compiler's stages and the assembler raise classes of their own
        raise CompileError(f"kernel {kernel.name!r} does not compile for {arch}: {error}") from error
    code: bytes = built.asm["cubin"]
    registers, spilled = resources(code)
    return Cubin(kernel.name, arch, kernel.warps, kernel.stages, registers, spilled, built.metadata.shared, code)


def _source(kernel: Kernel) -> Any:
    """What Triton's own launcher would ask for, with addresses, strides and sizes that are multiples of 16, as they are in models."""
    signature: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    for position, name in enumerate(kernel.function.arg_names):
        given = kernel.arguments[name]
        if isinstance(given, str | tuple):
            signature[name] = given
            types = enumerate(given) if isinstance(given, tuple) else [(None, given)]
            aligned |= {(position,) if i is None else (position, i): [["tt.divisibility", 16]] for i, kind in types if kind[0] in "*i"}
        else:
            signature[name], constants[name] = "constexpr", given
    return triton.compiler.ASTSource(kernel.function, signature, constants, aligned)


def resources(code: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory, of one thread, as the tool that Triton ships reads them from a cubin of one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        text = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = USAGE.search(text)
    if found is None:
        raise CompileError(f"cuobjdump said nothing of registers: {text.strip()!r}")
    return int(found["registers"]), int(found["stack"]) + int(found["local"])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: a row for each kernel and arch."""
    parser = argparse.ArgumentParser(prog="python -P -m reelstep.compiler.cubins", description="Compile the kernels without a GPU and print what they use.")
    parser.add_argument("--arch", action="append", choices=list(SHARED_LIMIT), help="may be given again; default: all of them")
    parser.add_argument("--kernel", action="append", metavar="NAME", help="only this one; may be given again; default: all of them")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="also write each as FOLDER/NAME.ARCH.cubin")
    options = parser.parse_args(arguments)
    try:
        chosen = _chosen(options.arch or [*SHARED_LIMIT], options.kernel)
        if options.out:
            _make(options.out, "folder", "--out")
        print(HEADER)
        for arch, kernels in chosen.items():
            for cubin in compile_kernels(arch, kernels):
                print(cubin, flush=True)
                if options.out:
                    replace_file(options.out / f"{cubin.kernel}.{arch}.cubin", cubin.code)
    except ReelstepError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, NotFound) else 1  # as of `reelstep`: 2 for what is wrong with the command
    print("registers and spilled bytes are a thread's, shared bytes a program's; more than 0 spilled is slow")
    return 0


def _make(folder: Path, called: str, option: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the {called} {folder}: {error.strerror}; choose another with {option}") from error


def _chosen(archs: Sequence[str], names: Sequence[str] | None) -> dict[str, tuple[Kernel, ...]]:
    """By arch, those of these names that it can run. Raises NotFound for a name that is a kernel's on none of them."""
    found = {arch: kernels_for(arch) for arch in archs}
    known = dict.fromkeys(kernel.name for kernels in found.values() for kernel in kernels)
    for name in names or ():
        if name not in known:
            raise unknown(f"kernel for {', '.join(archs)}", name, known)
    return {arch: tuple(kernel for kernel in kernels if not names or kernel.name in names) for arch, kernels in found.items()}


if __name__ == "__main__":
    sys.exit(main())
