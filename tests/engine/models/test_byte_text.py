"""The byte-level text encoder."""

import pytest
import torch

from reelstep.engine.models.byte_text import ByteTextConfig, ByteTextEncoder, tokenize


def test_tokens_are_utf8_bytes_moved_by_three_with_an_end_mark():
    assert tokenize("aé", 6) == [100, 0xC3 + 3, 0xA9 + 3, 1, 0, 0]
    assert tokenize("", 3) == [1, 0, 0]


def test_case_does_not_matter():
    assert tokenize("A Cat", 10) == tokenize("a cat", 10)


def test_a_text_that_does_not_fit_is_a_bug_of_the_caller():
    with pytest.raises(AssertionError, match="do not fit"):
        tokenize("abc", 3)


@torch.no_grad()
def test_padding_changes_nothing_and_gives_zeros():
    torch.manual_seed(0)
    encoder = ByteTextEncoder(ByteTextConfig(length=12, width=16, layers=2, heads=2)).eval()
    tokens = torch.tensor([tokenize("cat", 12)])
    out = encoder(tokens)
    assert torch.equal(out[0, 4:], torch.zeros(8, 16))
    encoder.embedding.weight[0] = 99.0  # whatever a pad looks like, nobody attends to it
    assert torch.allclose(encoder(tokens)[0, :4], out[0, :4], atol=1e-6)
