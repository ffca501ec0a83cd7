"""NVIDIA GeForce RTX 5090."""

from __future__ import annotations

from reelstep.compiler.skus import Link, Sku

SKU = Sku(
    name="rtx-5090",
    arch="sm120",
    model="NVIDIA GeForce RTX 5090",
    units=170,
    features=frozenset({"sm120"}),
    memory_bytes=32_000_000_000,
    bandwidth_bytes_per_s=1792e9,
    link=Link("PCIe 5.0 x16", 64e9),  # through the host's memory: GeForce has neither NVLink nor peer access
    network=None,
    devices=None,
    # tensor cores that accumulate in float32; in float16 they reach twice as much
    peak_flops={"float32": 104.8e12, "tfloat32": 104.8e12, "float16": 209.5e12, "bfloat16": 209.5e12, "float8": 419e12, "int8": 838e12, "float4": 1676e12},
    source=(
        "NVIDIA RTX Blackwell GPU Architecture whitepaper (images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf), "
        "table of the GeForce RTX 5090, the figures without sparsity"
    ),
    device_names=("NVIDIA GeForce RTX 5090",),
)
