"""What results can be written as. Apart from `media`, whose libraries take long to import: a request is checked, and runs, before its pixels are there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from reelstep.errors import ConfigError
from reelstep.registry import Registry

ENCODERS: Registry[Callable[[Any, float], bytes]] = Registry(
    "media type",
    {
        "video/mp4": "reelstep.engine.media:encode_mp4",
        "image/webp": "reelstep.engine.media:encode_webp",
        "image/gif": "reelstep.engine.media:encode_gif",
        "image/png": "reelstep.engine.media:encode_png",
    },
)
"""From frames, [F, H, W, 3] in uint8, and their number in a second to a file."""
SUFFIXES = {".mp4": "video/mp4", ".webp": "image/webp", ".gif": "image/gif", ".png": "image/png"}
STILL_TYPES = frozenset({"image/png"})
"""Types that mean one picture unless frames are asked for."""
INPUT_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
NO_PICTURE = f"is not a picture that can be read; send one of: {', '.join(INPUT_FORMATS)}"
"""Of an image, by whoever finds it out first."""


def media_type_of(path: Path) -> str:
    """The media type that a file name asks for. Raises ConfigError with the known suffixes."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"cannot write {path.name!r}: suffix {path.suffix!r} is none of {', '.join(SUFFIXES)}; rename the output")
    return SUFFIXES[path.suffix.lower()]
