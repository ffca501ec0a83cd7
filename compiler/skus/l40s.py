"""NVIDIA L40S."""

from __future__ import annotations

from reelstep.compiler.skus import Link, Sku

SKU = Sku(
    name="l40s",
    arch="sm89",
    model="NVIDIA L40S",
    units=142,  # as many RT cores, one in each
    features=frozenset({"sm89"}),
    memory_bytes=48_000_000_000,
    bandwidth_bytes_per_s=864e9,
    link=Link("PCIe 4.0 x16", 32e9),  # 64 GB/s both ways; there is no NVLink
    network=None,  # a card; the datasheet names no system
    devices=None,
    peak_flops={"float32": 91.6e12, "tfloat32": 183e12, "float16": 362.05e12, "bfloat16": 362.05e12, "float8": 733e12, "int8": 733e12},
    source="NVIDIA L40S datasheet (nvidia.com/en-us/data-center/l40s), table of specifications, the figures without sparsity",
    device_names=("NVIDIA L40S",),
)
