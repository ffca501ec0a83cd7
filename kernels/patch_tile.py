"""Tiles of a latent video and of its tokens, as patchify and unpatchify share them.

A program takes neighbouring tokens of one row of patches. As a video they are CHANNELS x PLACES lines (PLACES = P Q, a patch's rows) of TOKENS runs of
R values; as tokens, TOKENS lines of all a patch's values. Both are read and written as they lie in memory; in between the values change places in the
program, not by scattered addresses. Sizes of a tile are the powers of two above the real ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from reelstep.kernels.jit import jit, power_of_two, tl

VALUES = 4096
"""Of a tile, unless one token has more: 16 values a thread at 8 warps."""


@dataclass(frozen=True)
class PatchTile:
    """tokens: of a program, a power of two. channels, patch: of the video, as they are."""

    tokens: int
    channels: int
    patch: tuple[int, int, int]

    @property
    def sides(self) -> tuple[int, int, int]:
        """CHANNELS, PLACES, RUN."""
        p, q, r = self.patch
        return power_of_two(self.channels), power_of_two(p * q), power_of_two(r)

    @property
    def warps(self) -> int:
        return min(8, max(1, self.tokens * prod(self.sides) // 512))

    @property
    def constants(self) -> dict[str, int]:
        names = ("P", "Q", "R", "C", "TOKENS", "CHANNELS", "PLACES", "RUN")
        return dict(zip(names, (*self.patch, self.channels, self.tokens, *self.sides), strict=True))

    def programs(self, batch: int, grid: Sequence[int]) -> int:
        """grid: tokens along F, H, W."""
        return batch * grid[0] * grid[1] * -(-grid[2] // self.tokens)


def patch_tile(channels: int, patch: Sequence[int], columns: int) -> PatchTile:
    """columns: tokens of a row of patches."""
    p, q, r = patch
    one = PatchTile(1, channels, (p, q, r))
    return replace(one, tokens=min(power_of_two(columns), max(1, VALUES // prod(one.sides))))


@jit
def tile_place(frames: tl.tensor, rows: tl.tensor, columns: tl.tensor, TOKENS: tl.constexpr) -> tl.tensor:
    """Of a program: batch, frame, row and first column, in tokens; 64 bits, since they make addresses."""
    at, blocks = tl.program_id(0), tl.cdiv(columns, TOKENS)
    line = at // blocks
    return (line // rows // frames).to(tl.int64), (line // rows % frames).to(tl.int64), (line % rows).to(tl.int64), (at % blocks * TOKENS).to(tl.int64)


@jit
def in_video(
    left: tl.tensor, channel_step: tl.tensor, frame_step: tl.tensor, row_step: tl.tensor, column_step: tl.tensor,
    P: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr, RUN: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Offsets [CHANNELS * PLACES, TOKENS * RUN] from a tile's first value, and which are there. left: tokens from its first column on."""
    line, at = tl.arange(0, CHANNELS * PLACES), tl.arange(0, TOKENS * RUN)
    channel, place = line // PLACES, line % PLACES
    start = channel.to(tl.int64) * channel_step + (place // Q).to(tl.int64) * frame_step + (place % Q).to(tl.int64) * row_step
    if R == RUN:
        column, there = at, at < left * R
    else:
        column, there = at // RUN * R + at % RUN, (at // RUN < left) & (at % RUN < R)
    return start[:, None] + (column * column_step)[None, :], ((channel < C) & (place < P * Q))[:, None] & there[None, :]


@jit
def in_tokens(
    left: tl.tensor, token_step: tl.tensor, value_step: tl.tensor, P: tl.constexpr, Q: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    LAST: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr, RUN: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Offsets [TOKENS, values] from a tile's first token, and which are there. LAST: channels lie innermost in a patch, not outermost."""
    token, value = tl.arange(0, TOKENS), tl.arange(0, CHANNELS * PLACES * RUN)
    there = (token < left)[:, None]
    if C == CHANNELS and P * Q == PLACES and R == RUN:
        there = there & (value >= 0)[None, :]
    else:
        if LAST:
            channel, run, place = value % CHANNELS, value // CHANNELS % RUN, value // CHANNELS // RUN
            value = (place * R + run) * C + channel
        else:
            run, place, channel = value % RUN, value // RUN % PLACES, value // RUN // PLACES
            value = (channel * (P * Q) + place) * R + run
        there = there & ((channel < C) & (place < P * Q) & (run < R))[None, :]
    return (token.to(tl.int64) * token_step)[:, None] + (value * value_step)[None, :], there
