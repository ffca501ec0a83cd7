"""The table of SKUs: products that a plan is made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reelstep.errors import unknown
from reelstep.registry import Registry


@dataclass(frozen=True)
class Link:
    """What joins devices. The rate is of one device in one direction, while it receives as much: half of what vendors call bidirectional."""

    name: str
    bytes_per_s: float


@dataclass(frozen=True)
class Sku:
    """One product. What is not known is None or absent, never guessed. A vendor's GB is taken as 1e9 bytes; a device may report more."""

    name: str
    arch: str  # instruction set that compiled code may use: "x86_64+avx512_bf16", "sm90"
    model: str  # as the vendor prints it
    units: int  # physical cores this process may use, or multiprocessors
    features: frozenset[str]
    memory_bytes: int
    bandwidth_bytes_per_s: float | None
    link: Link | None  # between devices of one machine
    network: Link | None  # of one device, between machines, in the vendor's own system
    devices: int | None  # of one machine of the vendor's; None where the vendor states none
    peak_flops: Mapping[str, float]  # per second, by dtype; dense, that is without structured sparsity
    source: str  # where the numbers come from
    device_names: tuple[str, ...] = ()  # as the driver gives it; a slice or a variant of the product has another

    @property
    def bf16(self) -> bool:
        """Whether matrix products in bfloat16 are native."""
        return bool(self.features & {"avx512_bf16", "amx_bf16", "sm80", "sm89", "sm90", "sm100", "sm120"})

    @property
    def int8(self) -> bool:
        """Whether a CPU sums products of 8-bit integers in 32 bits. One without VNNI or AMX sums pairs in 16, where they are cut off."""
        return bool(self.features & {"avx512_vnni", "avx_vnni", "amx_int8"})


SKUS: Registry[Sku] = Registry(
    "SKU",
    {
        "cpu": "reelstep.compiler.skus.cpu:SKU",
        "a100-80g": "reelstep.compiler.skus.a100:SKU",
        "l40s": "reelstep.compiler.skus.l40s:SKU",
        "h100-sxm": "reelstep.compiler.skus.h100:SKU",
        "h200-sxm": "reelstep.compiler.skus.h200:SKU",
        "b200": "reelstep.compiler.skus.b200:SKU",
        "rtx-4090": "reelstep.compiler.skus.rtx_4090:SKU",
        "rtx-5090": "reelstep.compiler.skus.rtx_5090:SKU",
    },
)


def is_gpu(arch: str) -> bool:
    return arch.startswith("sm")


def sku_of_device(device_name: str) -> Sku:
    """The SKU of a CUDA device by the name its driver gives. Raises NotFound with the names there are: peaks of a near variant would mislead."""
    names = {name: sku for sku in SKUS.values() for name in sku.device_names}
    if device_name not in names:
        raise unknown("SKU of device", device_name, (f"{name} ({sku.name})" for name, sku in names.items()))
    return names[device_name]


def device_here() -> str | None:
    """This machine's first CUDA device, as its driver names it; None where there is none."""
    import torch  # only here: a table of numbers is read where torch is not

    return str(torch.cuda.get_device_properties(0).name) if torch.cuda.is_available() else None


def detect() -> Sku:
    """The SKU of this machine's first CUDA device, or of its CPU where there is none. Raises NotFound for a device that is in no table."""
    device = device_here()
    return SKUS["cpu"] if device is None else sku_of_device(device)
