"""First-block cache: the first block always runs; while what it adds is near to what it added when all blocks last ran, the others are skipped.

It sees the text as well as the time, and costs a block where it skips. Known from ParaAttention and from diffusers' FirstBlockCache.
"""

from __future__ import annotations

from reelstep.engine.samplers.guidance import Option
from reelstep.engine.samplers.step_cache import OPTIONS, Rule, StepCache


def first_block(evaluations: int, fresh_pairs: bool, threshold: float, first: float, last: float) -> Rule:
    """The distance is the change since all blocks last ran: small steps in one direction add up by themselves."""
    return Rule(evaluations, threshold, first, last, True, False, lambda so_far, change: change, fresh_pairs)


STEP_CACHE = StepCache(
    "first_block",
    first_block,
    {"threshold": Option(0.05, 0.0, 10.0, "relative change of what the first block adds from which on all blocks run; 0 is no cache"), **OPTIONS},
)
