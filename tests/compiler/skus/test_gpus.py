"""Datasheet figures against what the chips are made of: units, clocks, buses and lanes, from the architecture whitepapers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from reelstep.compiler.skus import SKUS, detect, sku_of_device
from reelstep.errors import NotFound

GPUS = ("a100-80g", "l40s", "h100-sxm", "h200-sxm", "b200", "rtx-4090", "rtx-5090")


@pytest.mark.parametrize(
    ("name", "flops_per_cycle", "boost_hz"),
    [
        ("a100-80g", 2048, 1.41e9), ("h100-sxm", 4096, 1.83e9), ("h200-sxm", 4096, 1.83e9), ("l40s", 1024, 2.49e9), ("rtx-4090", 512, 2.52e9),
        ("rtx-5090", 512, 2.407e9),
    ],
)  # fmt: skip
def test_the_dense_peak_is_that_of_all_tensor_cores_at_boost(name: str, flops_per_cycle: int, boost_hz: float) -> None:
    sku = SKUS[name]
    assert sku.peak_flops["bfloat16"] == pytest.approx(sku.units * flops_per_cycle * boost_hz, rel=2e-3)  # datasheets round to three or four digits


@pytest.mark.parametrize(
    ("name", "bus_bits", "bits_per_s"),
    [
        ("a100-80g", 5120, 3.186e9), ("h100-sxm", 5120, 5.23e9), ("h200-sxm", 6144, 6.25e9), ("b200", 8192, 8e9), ("l40s", 384, 18e9),
        ("rtx-4090", 384, 21e9), ("rtx-5090", 512, 28e9),
    ],
)  # fmt: skip
def test_bandwidth_is_that_of_the_memory_bus(name: str, bus_bits: int, bits_per_s: float) -> None:
    assert SKUS[name].bandwidth_bytes_per_s == pytest.approx(bus_bits * bits_per_s / 8, rel=0.03)  # 8 TB/s of the B200 is 8.19 rounded down


@pytest.mark.parametrize(("name", "lanes", "bytes_per_s"), [("a100-80g", 12, 25e9), ("h100-sxm", 18, 25e9), ("h200-sxm", 18, 25e9), ("b200", 18, 50e9)])
def test_nvlink_is_counted_in_one_direction(name: str, lanes: int, bytes_per_s: float) -> None:
    link = SKUS[name].link
    assert link is not None
    assert link.bytes_per_s == lanes * bytes_per_s


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_states_what_a_plan_needs(name: str) -> None:
    sku = SKUS[name]
    assert (sku.name, sku.bf16) == (name, True)
    assert sku.features == {sku.arch}
    assert {"float32", "bfloat16"} <= sku.peak_flops.keys()
    assert "datasheet" in sku.source or "whitepaper" in sku.source


@pytest.mark.parametrize("name", GPUS)
def test_a_device_is_known_by_its_drivers_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (device_name,) = SKUS[name].device_names
    assert sku_of_device(device_name) is SKUS[name]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name=device_name))
    assert detect() is SKUS[name]


@pytest.mark.parametrize("device_name", ["NVIDIA H100 PCIe", "NVIDIA H200 MIG 1g.18gb", "NVIDIA GeForce RTX 4090 D"])
def test_a_variant_or_a_slice_is_not_taken_for_the_product(device_name: str) -> None:
    with pytest.raises(NotFound, match=r"known: .*NVIDIA H200 \(h200-sxm\)"):
        sku_of_device(device_name)


def test_without_a_gpu_the_cpu_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert detect() is SKUS["cpu"]
