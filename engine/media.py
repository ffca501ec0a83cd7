"""Pictures in, files out: safe decoding, and encoding by media type.

F frames, H W pixels; everything uint8 RGB, or RGBA where a picture came with alpha.
"""

from __future__ import annotations

import struct
import zlib
from fractions import Fraction
from io import BytesIO

import av
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from reelstep.engine.media_types import ENCODERS, INPUT_FORMATS, NO_PICTURE
from reelstep.engine.request import Limits
from reelstep.errors import FieldViolation, InvalidRequest

Pixels = npt.NDArray[np.uint8]

WHITE = (255, 255, 255)
GIF_TICKS_PER_S = 100

MAX_SIDE = 16384
"""Of a picture, which else might be a line of few pixels that takes as long to scale as a photo of many."""
SCAN, MAX_SCANS = b"\xff\xda", 100
"""The marker that begins a scan of a JPEG, which goes through the whole picture; progressive ones have about ten."""


def bad_image(description: str) -> InvalidRequest:
    return InvalidRequest([FieldViolation("image", description)])


def decode_picture(data: bytes, limits: Limits) -> Pixels:
    """The first frame of a PNG, JPEG, WebP or GIF as [H, W, 3], or [H, W, 4] where it has alpha, turned upright by its EXIF.

    Bytes are checked before anything is read and pixels in the header before they are decoded. Raises InvalidRequest for `image`.
    """
    if len(data) > limits.max_image_bytes:
        raise bad_image(f"is {len(data)} bytes; at most {limits.max_image_bytes}; scale it down")
    try:
        with Image.open(BytesIO(data), formats=INPUT_FORMATS) as image:
            width, height = image.size
            if width * height > limits.max_image_pixels or max(width, height) > MAX_SIDE:
                raise bad_image(f"is {width}x{height}; at most {limits.max_image_pixels} pixels, and {MAX_SIDE} on a side; scale it down")
            if image.format == "JPEG" and (scans := data.count(SCAN)) > MAX_SCANS:
                raise bad_image(f"has {scans} scans; at most {MAX_SCANS}; save it again")
            return to_pixels(image)
    except InvalidRequest:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise bad_image(f"has far more than {limits.max_image_pixels} pixels, the most; scale it down") from error
    except UnidentifiedImageError as error:
        raise bad_image(NO_PICTURE) from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise bad_image(f"is damaged or cut short ({error}); send the whole file") from error


def to_pixels(image: Image.Image) -> Pixels:
    """[H, W, 3 or 4]; 16-bit grey is scaled, not clipped."""
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image, np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return np.array(image.convert("RGBA" if image.has_transparency_data else "RGB"))


def fit_picture(image: Pixels, width: int, height: int) -> Pixels:
    """[H, W, 3 or 4] of any size -> [height, width, 3]: over white, scaled with its aspect kept, centred on white."""
    source = Image.fromarray(np.ascontiguousarray(image))
    flat = Image.new("RGB", source.size, WHITE)
    flat.paste(source, mask=source.getchannel("A") if source.mode == "RGBA" else None)
    ratio = min(width / flat.width, height / flat.height)
    size = max(1, round(flat.width * ratio)), max(1, round(flat.height * ratio))
    canvas = Image.new("RGB", (width, height), WHITE)
    canvas.paste(flat.resize(size, Image.Resampling.LANCZOS), ((width - size[0]) // 2, (height - size[1]) // 2))
    return np.array(canvas)


def encode_mp4(frames: Pixels, frames_per_second: float) -> bytes:
    """H.264 yuv420p; odd sides get their last row or column twice, because the format has no odd sizes."""
    padded = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    buffer = BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(frames_per_second).limit_denominator(1001), options={"crf": "14"})
        stream.height, stream.width = padded.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in padded:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def save_animation(frames: Pixels, file_format: str, duration_ms: int, **options: object) -> bytes:
    first, *rest = [Image.fromarray(frame) for frame in frames]
    buffer = BytesIO()
    if rest:
        options |= {"save_all": True, "append_images": rest, "duration": duration_ms, "loop": 0}
    first.save(buffer, file_format, **options)
    return buffer.getvalue()


def encode_webp(frames: Pixels, frames_per_second: float) -> bytes:
    return save_animation(frames, "WEBP", round(1000 / frames_per_second), quality=90)


def encode_gif(frames: Pixels, frames_per_second: float) -> bytes:
    """GIF counts hundredths of a second, so 8 frames per second becomes 8.33."""
    ticks = max(1, round(GIF_TICKS_PER_S / frames_per_second))
    return save_animation(frames, "GIF", ticks * 1000 // GIF_TICKS_PER_S)


def encode_png(frames: Pixels, frames_per_second: float) -> bytes:
    """A still picture, or an animated PNG where there are more frames. Lossless."""
    return save_animation(frames, "PNG", round(1000 / frames_per_second))


def encode(frames: Pixels, frames_per_second: float, media_type: str) -> bytes:
    """frames: [F, H, W, 3] -> a file. Raises NotFound for a media type that is not in ENCODERS."""
    return ENCODERS[media_type](frames, frames_per_second)
