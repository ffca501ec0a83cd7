"""The table of SKUs: products that a plan is made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reelstep.registry import Registry


@dataclass(frozen=True)
class Sku:
    """One product. What is not known is None or absent, never guessed."""

    name: str
    arch: str  # instruction set that compiled code may use: "x86_64+avx512_bf16", "sm90"
    model: str  # as the vendor prints it
    units: int  # physical cores this process may use, or multiprocessors
    features: frozenset[str]
    memory_bytes: int
    bandwidth_bytes_per_s: float | None
    link: str | None  # between devices of one machine
    peak_flops: Mapping[str, float]  # per second, by dtype
    source: str  # where the numbers come from

    @property
    def bf16(self) -> bool:
        """Whether matrix products in bfloat16 are native."""
        return bool(self.features & {"avx512_bf16", "amx_bf16", "sm80", "sm90"})


SKUS: Registry[Sku] = Registry("SKU", {"cpu": "reelstep.compiler.skus.cpu:SKU"})
