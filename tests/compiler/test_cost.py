from __future__ import annotations

import torch

from reelstep.compiler.bundle import Bundle
from reelstep.compiler.cost import graph_flops, graph_parameters, module_flops, module_parameters
from reelstep.compiler.program import Program


def by_hand(rows: int, length: int) -> int:
    """The toy: qkv 8x24, two heads of 4 (scores and sum), convolution 8x8x3 over `length` tokens; 2 FLOPs per multiply-add."""
    return rows * 2 * (length * 8 * 24 + 2 * (2 * length * length * 4) + length * 8 * 8 * 3)


def test_flops_of_a_graph_are_those_counted_by_hand(bundle: Bundle) -> None:
    for profile, length in (("l4", 4), ("l3", 3)):
        for rows in (1, 5):
            assert graph_flops(bundle.program("denoise", profile), rows) == by_hand(rows, length)


def test_parameters_are_those_that_the_graph_reads(bundle: Bundle) -> None:
    assert graph_parameters(bundle.program("denoise", "l4")) == 11 * 8 + 24 * 9 + 8 * (8 * 3 + 1)
    assert graph_parameters(bundle.program("lookup", "l4")) == 11 * 8


def test_a_module_on_the_meta_device_costs_the_same(programs: tuple[Program, ...]) -> None:
    with torch.device("meta"):
        toy = type(programs[0].module)()
        inputs = torch.zeros(5, 4, dtype=torch.int64), torch.zeros(5)
    assert module_flops(toy, *inputs) == by_hand(5, 4)
    assert module_parameters(toy) == sum(p.numel() for p in programs[0].module.parameters())
