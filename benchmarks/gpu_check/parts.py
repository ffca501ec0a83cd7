"""What is checked. A new part is a function from a bench to findings, in a file of its own, and a line here."""

from __future__ import annotations

from reelstep.benchmarks.gpu_check.attention import attention_rates
from reelstep.benchmarks.gpu_check.ceilings import ceilings
from reelstep.benchmarks.gpu_check.correctness import correctness
from reelstep.benchmarks.gpu_check.fp8 import fp8_layers
from reelstep.benchmarks.gpu_check.memory_bound import memory_bound
from reelstep.benchmarks.gpu_check.ranks import rank_shapes
from reelstep.benchmarks.gpu_check.running import Part
from reelstep.benchmarks.gpu_check.transformer import one_block, whole_forward
from reelstep.benchmarks.gpu_check.words_to_video import end_to_end

PARTS = (
    Part("ceilings", 5, ceilings),
    Part("kernels", 30, memory_bound),
    Part("attention", 50, attention_rates),
    Part("fp8", 20, fp8_layers),
    Part("block", 30, one_block),
    Part("ranks", 35, rank_shapes),
    Part("correctness", 90, correctness, alone=True),
    Part("forward", 60, whole_forward),
    Part("end to end", 215, end_to_end, alone=True),
)
"""In the order they run: 535 s in all. What shares are of comes first, and what may end its process last."""
