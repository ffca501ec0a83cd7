"""NVIDIA H200 SXM."""

from __future__ import annotations

from dataclasses import replace

from reelstep.compiler.skus import h100

SKU = replace(
    h100.SKU,  # the same chip: peaks, multiprocessors, NVLink and network are those of the H100 SXM, in the datasheet of the H200 too
    name="h200-sxm",
    model="NVIDIA H200 SXM",
    memory_bytes=141_000_000_000,
    bandwidth_bytes_per_s=4.8e12,
    source=(
        "NVIDIA H200 Tensor Core GPU datasheet (nvidia.com/en-us/data-center/h200), table of the H200 SXM: memory, bandwidth, NVLink; tensor peaks are half of "
        "its figures, which are with sparsity; NVIDIA H100 Tensor Core GPU Architecture whitepaper: multiprocessors; NVIDIA DGX H200 datasheet: network"
    ),
    device_names=("NVIDIA H200",),
)
