"""NVIDIA H100 SXM (80 GB)."""

from __future__ import annotations

from reelstep.compiler.skus import Link, Sku

SKU = Sku(
    name="h100-sxm",
    arch="sm90",
    model="NVIDIA H100 SXM",
    units=132,  # architecture whitepaper
    features=frozenset({"sm90"}),
    memory_bytes=80_000_000_000,
    bandwidth_bytes_per_s=3.35e12,
    link=Link("NVLink 4", 450e9),  # 900 GB/s both ways
    network=Link("8 x 400 Gb/s InfiniBand", 50e9),  # DGX H100
    devices=8,
    peak_flops={"float32": 67e12, "tfloat32": 494.5e12, "float16": 989.5e12, "bfloat16": 989.5e12, "float8": 1979e12, "int8": 1979e12},
    source=(
        "NVIDIA H100 Tensor Core GPU datasheet (nvidia.com/en-us/data-center/h100), table of the H100 SXM: memory, bandwidth, NVLink; tensor peaks are half of "
        "its figures, which are with sparsity; NVIDIA H100 Tensor Core GPU Architecture whitepaper: multiprocessors; NVIDIA DGX H100 datasheet: network"
    ),
    device_names=("NVIDIA H100 80GB HBM3",),
)
