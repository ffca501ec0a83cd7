"""Exchanges of attention against the formula in float64, DeepSpeed, and their volumes against formulas."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import on_ranks
import pytest

from reelstep.parallel.mesh import Mesh, shares

B, N, L, K = 2, 5, 27, 8


def tensors(heads: int = N, length: int = L) -> tuple[np.ndarray, ...]:
    random = np.random.default_rng(0)
    return tuple(random.standard_normal((B, heads, length, K)).astype(np.float32) for _ in range(3))


def formula(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    scores = q.astype(np.float64) @ k.astype(np.float64).swapaxes(2, 3) / np.sqrt(K)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("mesh", ["cp=2", "cp=2,ring=2", "cp=4", "cp=4,ring=4", "cp=4,ring=2"])
@pytest.mark.parametrize("masked", [False, True])
def test_uneven_heads_and_lengths_give_the_formula(world: Any, mesh: str, masked: bool) -> None:
    q, k, v = tensors()
    mask = None
    if masked:
        mask = np.ones((B, 1, 1, L), bool)
        mask[0, ..., 5:20] = False  # a ring stage of four holds no key that counts
        mask[1, ..., -1] = False
    answers = world.run(Mesh.parse(mesh).world, on_ranks.attentions, mesh, q, k, v, mask)
    for name in ("usp", "gathered"):
        assert error(np.concatenate([answer[name][0] for answer in answers], axis=2), formula(q, k, v, mask)) < 1e-6


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_sent_are_those_of_the_formulas(world: Any, ranks: int) -> None:
    lengths, heads = shares(L, ranks, ""), shares(N, ranks, "")
    ulysses = world.run(ranks, on_ranks.attentions, f"cp={ranks}", *tensors(), None)
    ring = world.run(ranks, on_ranks.attentions, f"cp={ranks},ring={ranks}", *tensors(), None)
    for rank in range(ranks):
        to_heads = 3 * B * K * lengths[rank] * (N - heads[rank])
        back = B * K * heads[rank] * (L - lengths[rank])
        assert ulysses[rank]["usp"][1] == {("all_to_all_single", "ulysses"): 4 * (to_heads + back)}
        passed_on = L - lengths[(rank + 1) % ranks]  # every stage's keys but those that began at the next rank
        assert ring[rank]["usp"][1] == {("shift", "ring"): 4 * 2 * B * N * K * passed_on}
        padded = max(lengths)
        assert ring[rank]["gathered"][1] == {("all_gather_into_tensor", "cp"): 4 * 2 * B * N * K * padded * (ranks - 1)}


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="an independent Ulysses is not installed: pip install 'reelstep[deepspeed]'")
def test_deepspeeds_distributed_attention_agrees(world: Any) -> None:
    q, k, v = tensors(heads=4, length=28)  # DeepSpeed wants lengths that divide
    answers = world.run(2, on_ranks.deepspeed_ulysses, q, k, v)
    for theirs, ours in answers:
        assert error(ours, theirs) < 1e-6
    assert error(np.concatenate([ours for _, ours in answers], axis=2), formula(q, k, v)) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"is_causal": True}, "is_causal=True"), ({"attn_mask": np.zeros((1, 1, 3, 3), np.float32)}, r"\[1, 1, 3, 3\]")],
)
def test_attention_that_cannot_be_exchanged_is_refused(arguments: dict[str, Any], words: str) -> None:
    import torch

    from reelstep.errors import ConfigError
    from reelstep.parallel.context import _plain

    given = {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in arguments.items()}
    with pytest.raises(ConfigError, match=words):
        _plain(*(torch.zeros(1, 1, 3, 4) for _ in range(3)), **given)
