"""How attention's kernel is launched: tiles that fit, and a grid as large as there are rows of heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

import pytest
import torch

from reelstep.compiler.cubins import SHARED_LIMIT, compile_kernels
from reelstep.kernels import attention_triton
from reelstep.kernels.attention_triton import kernels, launch_attention, tiles
from reelstep.kernels.jit import HAS_TRITON


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize("head", [128, 256])
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_one_tile_fits_every_head_dim_on(arch: str, head: int) -> None:
    """In float32; a row of 256 values in half precision is as long as one of 128."""
    number = int(arch.removeprefix("sm"))
    usual, tile = kernels(number)[1], tiles(number, 4 * head)[-1]
    changed = {**dict.fromkeys(("q", "k", "v", "out"), "*fp32"), "HEAD": head, "EXACT": True, "QUERIES": tile.queries, "KEYS": tile.keys}
    kernel = replace(usual, arguments={**usual.arguments, **changed}, warps=tile.warps, stages=tile.stages)
    (cubin,) = compile_kernels(arch, [kernel])
    assert cubin.shared_bytes <= SHARED_LIMIT[arch], cubin


def test_more_heads_than_an_axis_of_the_grid_has_places_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's limits are 2^31 - 1 along the first axis and 65,535 along the others."""
    grids: list[tuple[int, ...]] = []

    class Recorded:
        def __getitem__(self, grid: Callable[[dict[str, int]], tuple[int, ...]]) -> Callable[..., None]:
            return lambda *arguments, **constants: grids.append(grid(constants))

    monkeypatch.setattr(attention_triton, "attention_kernel", Recorded())
    monkeypatch.setattr(attention_triton, "interpreted", lambda kernel: True)
    monkeypatch.setattr(attention_triton, "check_launch", lambda kernel, tensor: None)
    q = torch.empty(40_000, 2, 65, 8)
    launch_attention(q, q, q, None, 1.0)
    (grid,) = grids
    assert prod(grid) == 40_000 * 2 * 2, "two tiles of 64 queries"
    assert all(side <= 65_535 for side in grid[1:])
