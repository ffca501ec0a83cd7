"""The meter of activations, and the formula of the bytes."""

import torch

from reelstep.benchmarks.context_parallel import Held, formula
from reelstep.engine.models.movie_gen import CONFIG_30B
from reelstep.parallel.mesh import Mesh

KB = 1024


def test_the_most_that_was_held_counts_each_storage_once_until_it_is_gone():
    x = torch.ones(256)
    with Held() as held:
        a = x + 1
        view = a.view(16, 16)
        b = a * 2
        del a
        assert (held.now, held.most) == (2 * KB, 2 * KB), "the view keeps it"
        del view
        assert held.now == KB
        b.add_(1)
        c = b + x
        assert (held.now, held.most) == (2 * KB, 2 * KB)
        del b, c
    assert (held.now, held.most) == (0, 2 * KB)


def test_formulas_of_one_block_of_the_30b_model():
    tokens, width = 73_728, 6144
    whole = tokens * width * 4
    assert formula(Mesh.parse(""), CONFIG_30B, tokens) == 0
    assert formula(Mesh.parse("cp=4"), CONFIG_30B, tokens) == 4 * whole * 3 // 16, "four tensors, of whose quarter three quarters leave"
    assert formula(Mesh.parse("cp=4,ring=4"), CONFIG_30B, tokens) == 2 * whole * 3 // 4
    assert formula(Mesh.parse("tp=4"), CONFIG_30B, tokens) == 3 * 2 * whole * 3 // 4
