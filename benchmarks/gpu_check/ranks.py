"""How long does one rank of a mesh compute for its share of a block?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F

from reelstep.benchmarks.gpu_check.bench import Bench, Finding
from reelstep.kernels import OPS


@dataclass(frozen=True)
class Piece:
    """Of one rank's block. Bound by products if it has flops, else by memory."""

    what: str
    runs: tuple[Callable[[], object], ...]
    flops: float = 0.0
    bytes_: float = 0.0

    def __call__(self) -> None:
        for run in self.runs:
            run()


def rank_pieces(bench: Bench, cp: int, tp: int) -> Iterator[Piece]:
    """What one rank of a mesh computes of a block: tokens over cp, heads and feed-forward over tp, attention by Ulysses."""
    sizes, config, randn = bench.sizes, bench.sizes.config, bench.randn
    length, d, ffn, k = sizes.tokens // cp, config.width, config.ffn // tp, sizes.head
    mine = d // tp
    layers = [(length, d, mine, 4), (length, mine, d, 2), (sizes.text, d, mine, 2), (length, d, ffn, 2), (length, ffn, d, 1)]
    products: list[Callable[[], object]] = []
    for rows, inner, outer, count in layers:
        x, w = randn(rows, inner), randn(outer, inner)
        products += [partial(F.linear, x, w)] * count
    yield Piece("linear layers", tuple(products), sum(2.0 * rows * inner * outer * count for rows, inner, outer, count in layers))
    own, all_heads = config.heads // (cp * tp), config.heads // tp
    for what, heads, queries, keys in (("self-attention", own, sizes.tokens, sizes.tokens), ("attention to text", all_heads, length, sizes.text)):
        q, kv = randn(1, queries, heads, k).transpose(1, 2), randn(1, keys, heads, k).transpose(1, 2)
        yield Piece(what, (partial(OPS["attention"].overload, q, kv, kv, None, k**-0.5, "auto"),), 4.0 * heads * queries * keys * k)
    x, y, vector, gain = randn(1, length, d), randn(1, length, d), randn(1, d), randn(d)
    a, b = randn(1, length, ffn), randn(1, length, ffn)
    norm = (lambda: OPS["rms_modulate"].overload(x, vector, vector, gain, 1e-6, False),)
    residual, added = (lambda: OPS["gated_residual"].overload(x, vector, y),), (lambda: x + y,)
    middle = (lambda: OPS["swiglu"].overload(a, b),)
    yield Piece("between them", norm * 2 + residual * 2 + added * 2 + middle, bytes_=(2 * 2 + 2 * 3 + 2 * 3) * x.nbytes + 3 * a.nbytes)


def rank_shapes(bench: Bench) -> Iterator[Finding]:
    """Compute of one rank as measured; what ranks send each other is in no number here."""
    for cp, tp in ((bench.sizes.ranks, 1), (1, bench.sizes.ranks)):
        mesh, total = f"cp={cp}" if cp > 1 else f"tp={tp}", 0.0
        for piece in rank_pieces(bench, cp, tp):
            seconds = bench.seconds(piece)
            total += seconds
            what = f"{mesh}, a rank's {piece.what}"
            yield bench.computed(what, seconds, piece.flops) if piece.flops else bench.moved(what, seconds, piece.bytes_, None)
        yield Finding(f"{mesh}, a rank's block", total, note="compute alone: communication was not measured and is left out")
