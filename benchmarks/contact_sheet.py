"""Pictures of results: rows of frames with words beside them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

Frames = npt.NDArray[np.uint8]
"""[F, H, W, 3]."""

TEXT_PX = 300
GAP_PX = 4


def sheet(rows: Sequence[tuple[str, Sequence[Frames]]], path: Path, zoom: int = 1) -> None:
    """One line for each row: its words, then the frames of each of its clips side by side, clips apart by a wider gap."""
    font = ImageFont.load_default(size=13)
    strips = [np.concatenate([widen(strip(clip), 4 * GAP_PX) for clip in clips], axis=1) for _, clips in rows]
    height = max(s.shape[0] for s in strips) * zoom
    width = max(s.shape[1] for s in strips) * zoom
    picture = Image.new("RGB", (TEXT_PX + width, len(rows) * (height + GAP_PX)), "white")
    draw = ImageDraw.Draw(picture)
    for i, ((words, _), pixels) in enumerate(zip(rows, strips, strict=True)):
        top = i * (height + GAP_PX)
        picture.paste(Image.fromarray(pixels).resize((pixels.shape[1] * zoom, pixels.shape[0] * zoom), Image.Resampling.NEAREST), (TEXT_PX, top))
        draw.multiline_text((6, top + 4), textwrap.fill(words, 40), fill="black", font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)


def strip(clip: Frames) -> Frames:
    """Frames side by side, a thin white line between them: [H, F * (W + 1), 3]."""
    return np.concatenate([widen(frame, 1) for frame in clip], axis=1)


def widen(picture: Frames, by: int) -> Frames:
    """White columns at the right."""
    return np.pad(picture, ((0, 0), (0, by), (0, 0)), constant_values=255)
