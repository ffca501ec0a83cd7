"""A graph without its collectives computes what its pieces do over links that carry nothing."""

from dataclasses import replace

import pytest
import torch

from reelstep.benchmarks import piecewise
from reelstep.engine.models import dit_mid


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("patch", "tokens"), [((1, 2, 2), 32), ((1, 1, 1), 128)])
def test_pieces_are_counted_and_equal_the_whole_graph(monkeypatch, threads, patch, tokens):
    small = replace(dit_mid.CONFIG, layers=2, width=32, heads=2, ffn=64, text_widths=(32,), positions=(2, 8, 8), latent_channels=4, patch=patch)
    monkeypatch.setattr(piecewise, "SUBJECTS", {"small": (small, 5, (2, 8, 8), 2)})
    row = piecewise.measure("small", "eager", 0)
    assert (row["tokens"], row["pieces"], row["rounds"]) == (tokens, 1 + 3 * small.layers, 2)  # a cut behind two attentions and the FFN of each layer
    assert row["rel_l2"] < 1e-6
    assert row["overhead"] == pytest.approx(row["pieces_s"] / row["whole_s"] - 1)
