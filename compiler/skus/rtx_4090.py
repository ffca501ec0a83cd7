"""NVIDIA GeForce RTX 4090."""

from __future__ import annotations

from reelstep.compiler.skus import Link, Sku

SKU = Sku(
    name="rtx-4090",
    arch="sm89",
    model="NVIDIA GeForce RTX 4090",
    units=128,
    features=frozenset({"sm89"}),
    memory_bytes=24_000_000_000,
    bandwidth_bytes_per_s=1008e9,
    link=Link("PCIe 4.0 x16", 32e9),  # through the host's memory: GeForce has neither NVLink nor peer access
    network=None,
    devices=None,
    # tensor cores that accumulate in float32; in float16 they reach twice as much
    peak_flops={"float32": 82.6e12, "tfloat32": 82.6e12, "float16": 165.2e12, "bfloat16": 165.2e12, "float8": 330.3e12, "int8": 660.6e12},
    source=(
        "NVIDIA Ada GPU Architecture whitepaper (images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf), appendix A, table of the "
        "GeForce RTX 4090, the figures without sparsity"
    ),
    device_names=("NVIDIA GeForce RTX 4090",),
)
