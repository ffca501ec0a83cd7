"""The CPU that this process runs on, as the kernel describes it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from reelstep.compiler.skus import Sku

ARCH_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8")
"""The flags that decide what code a backend generates."""


def parse_cpuinfo(text: str) -> list[dict[str, str]]:
    """One mapping per logical processor of /proc/cpuinfo."""
    blocks = [block for block in text.strip().split("\n\n") if block.strip()]
    return [{key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())} for block in blocks]


def physical_cores(processors: list[dict[str, str]], usable: set[int]) -> int:
    """Distinct cores among the usable logical processors; hyper-threads of one core count once. At least 1."""
    cores = {
        (processor.get("physical id", "0"), processor.get("core id", processor["processor"]))
        for processor in processors
        if int(processor.get("processor", -1)) in usable
    }
    return max(1, len(cores))


def describe(cpuinfo: str, meminfo: str, usable: set[int]) -> Sku:
    """The SKU that these texts describe."""
    processors = parse_cpuinfo(cpuinfo)
    first = processors[0] if processors else {}
    flags = frozenset(first.get("flags", "").split())
    arch = "+".join([platform.machine(), *(flag for flag in ARCH_FLAGS if flag in flags)])
    memory_kb = next((int(line.split()[1]) for line in meminfo.splitlines() if line.startswith("MemTotal:")), 0)
    return Sku(
        name="cpu",
        arch=arch,
        model=first.get("model name", platform.processor() or "unknown"),
        units=physical_cores(processors, usable) if processors else len(usable),
        features=flags,
        memory_bytes=memory_kb * 1024,
        bandwidth_bytes_per_s=None,
        link=None,
        network=None,
        devices=1,
        peak_flops={},
        source="detected: /proc/cpuinfo, /proc/meminfo",
    )


def detect() -> Sku:
    """This machine. Off Linux only the number of processors is known, and no instruction set is assumed."""
    texts = [path.read_text() if path.exists() else "" for path in (Path("/proc/cpuinfo"), Path("/proc/meminfo"))]
    usable = set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    return describe(texts[0], texts[1], usable)


SKU = detect()
