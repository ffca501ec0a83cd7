"""NVIDIA A100 80GB SXM."""

from __future__ import annotations

from reelstep.compiler.skus import Link, Sku

SKU = Sku(
    name="a100-80g",
    arch="sm80",
    model="NVIDIA A100 80GB SXM",
    units=108,  # architecture whitepaper
    features=frozenset({"sm80"}),
    memory_bytes=80_000_000_000,
    bandwidth_bytes_per_s=2.039e12,
    link=Link("NVLink 3", 300e9),  # 600 GB/s both ways
    network=Link("8 x 200 Gb/s InfiniBand", 25e9),  # DGX A100
    devices=8,
    peak_flops={"float32": 19.5e12, "tfloat32": 156e12, "float16": 312e12, "bfloat16": 312e12, "int8": 624e12},
    source=(
        "NVIDIA A100 Tensor Core GPU datasheet (nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf), table of the A100 80GB SXM: memory, bandwidth, NVLink, "
        "peaks without sparsity; NVIDIA A100 Tensor Core GPU Architecture whitepaper, table 4: multiprocessors; NVIDIA DGX A100 datasheet: network"
    ),
    device_names=("NVIDIA A100-SXM4-80GB",),
)
