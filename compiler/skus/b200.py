"""NVIDIA B200 (SXM, 1000 W)."""

from __future__ import annotations

from reelstep.compiler.skus import Link, Sku

SKU = Sku(
    name="b200",
    arch="sm100",
    model="NVIDIA B200",
    units=148,  # as the driver reports it; the datasheets do not say
    features=frozenset({"sm100"}),
    memory_bytes=180_000_000_000,  # 1,440 GB of the eight
    bandwidth_bytes_per_s=8e12,  # 64 TB/s of the eight
    link=Link("NVLink 5", 900e9),  # 1.8 TB/s both ways
    network=Link("8 x 400 Gb/s InfiniBand", 50e9),
    devices=8,
    peak_flops={"float32": 80e12, "tfloat32": 1100e12, "float16": 2250e12, "bfloat16": 2250e12, "float8": 4500e12, "int8": 4500e12, "float4": 9000e12},
    source=(
        "NVIDIA DGX B200 datasheet (nvidia.com/en-us/data-center/dgx-b200): memory, bandwidth, NVLink, network of eight GPUs, divided by eight; NVIDIA "
        "Blackwell Architecture Technical Brief, table of the HGX B200: dense peaks of one GPU"
    ),
    device_names=("NVIDIA B200",),
)
