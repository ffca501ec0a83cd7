from __future__ import annotations

import pytest

from reelstep.compiler.skus import SKUS
from reelstep.compiler.skus.cpu import describe

TWO_CORES_FOUR_THREADS = "\n\n".join(
    f"processor\t: {n}\nmodel name\t: Example 9000\nphysical id\t: 0\ncore id\t: {n % 2}\nflags\t: fpu avx2 avx512f avx512_bf16" for n in range(4)
)


@pytest.mark.parametrize(("usable", "cores"), [({0, 1, 2, 3}, 2), ({0, 2}, 1), ({1}, 1)])
def test_threads_of_one_core_count_once_and_only_usable_ones(usable: set[int], cores: int) -> None:
    assert describe(TWO_CORES_FOUR_THREADS, "", usable).units == cores


def test_flags_decide_bfloat16_and_arch() -> None:
    sku = describe(TWO_CORES_FOUR_THREADS, "MemTotal:  2048 kB\n", {0})
    assert sku.bf16
    assert sku.arch.endswith("+avx2+avx512f+avx512_bf16")
    assert (sku.model, sku.memory_bytes) == ("Example 9000", 2 << 20)
    assert not describe(TWO_CORES_FOUR_THREADS.replace("avx512_bf16", ""), "", {0}).bf16


def test_a_machine_without_cpuinfo_is_still_described() -> None:
    assert describe("", "", {0, 1, 2}).units == 3


def test_every_registered_sku_says_where_its_numbers_come_from() -> None:
    assert all(SKUS[name].source and SKUS[name].units >= 1 for name in SKUS)
