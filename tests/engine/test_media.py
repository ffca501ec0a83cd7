"""Pictures in and files out, against what independent readers see in them."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageSequence

from reelstep.engine.media import decode_picture, encode, fit_picture
from reelstep.engine.media_types import ENCODERS, SUFFIXES, media_type_of
from reelstep.engine.request import Limits
from reelstep.errors import ConfigError, InvalidRequest, NotFound

LIMITS = Limits(sizes=((64, 64),), frames=(1, 8), max_steps=10, max_scale=10.0, max_count=1, max_image_bytes=50_000, max_image_pixels=10_000)
Pixels = npt.NDArray[np.uint8]


def noise(*shape: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def smooth(frames: int, height: int, width: int) -> Pixels:
    """A gradient that moves: what codecs keep well. [F, H, W, 3]."""
    f, y, x = np.mgrid[:frames, :height, :width]
    return np.stack([x * 2 + f * 10, y * 2, 128 + 0 * x], -1).clip(0, 255).astype(np.uint8)


def saved(pixels: Pixels, kind: str, **options: object) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
@pytest.mark.parametrize("shape", [(7, 5, 3), (1, 1, 3)])
def test_lossless_pictures_are_read_exactly(kind: str, options: dict[str, object], shape: tuple[int, ...]) -> None:
    pixels = noise(*shape)
    assert np.array_equal(decode_picture(saved(pixels, kind, **options), LIMITS), pixels)


def test_alpha_is_kept() -> None:
    pixels = noise(6, 4, 4)
    assert np.array_equal(decode_picture(saved(pixels, "PNG"), LIMITS), pixels)


def test_a_transparent_palette_picture_has_alpha() -> None:
    file = BytesIO()
    Image.new("P", (3, 2), 0).save(file, "GIF", transparency=0)
    picture = decode_picture(file.getvalue(), LIMITS)
    assert picture.shape == (2, 3, 4)
    assert not picture[..., 3].any()


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    file = BytesIO()
    Image.fromarray(np.full((2, 2), 0x4000, np.uint16)).save(file, "PNG")
    assert (decode_picture(file.getvalue(), LIMITS) == 0x40).all()


def test_a_photo_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    assert decode_picture(saved(noise(8, 4, 3), "JPEG", exif=exif), LIMITS).shape == (4, 8, 3)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a picture"),
        (b"hello, I am a text file", "not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
        (saved(noise(40, 40, 3), "PNG")[:500], "damaged or cut short"),
        (saved(noise(40, 40, 3), "JPEG")[:300], "damaged or cut short"),
        (saved(noise(40, 40, 3), "WEBP")[:200], "damaged|not a picture"),
        (saved(noise(4, 4, 3), "BMP"), "not a picture"),
        (png_header(101, 100), "101x100; at most 10000 pixels"),
        (png_header(60_000, 60_000), "10000 pixels"),
        (png_header(10_000, 10_000), "10000 pixels"),
        (png_header(2**31 - 1, 2**31 - 1), "10000 pixels|damaged"),
        (b"\0" * 50_001, "50001 bytes; at most 50000"),
    ],
)
def test_a_bad_picture_is_an_invalid_request_for_image(data: bytes, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        decode_picture(data, LIMITS)
    assert [v.field for v in caught.value.violations] == ["image"]


def test_a_line_of_few_pixels_and_a_picture_of_many_scans_are_refused_before_they_are_decoded() -> None:
    wide = replace(LIMITS, max_image_pixels=10**6)
    with pytest.raises(InvalidRequest, match="is 20000x1; at most 1000000 pixels, and 16384 on a side"):
        decode_picture(png_header(20_000, 1), wide)
    photo = saved(noise(40, 40, 3), "JPEG", progressive=True)
    assert decode_picture(photo, LIMITS).shape == (40, 40, 3)
    scan = photo[photo.rindex(b"\xff\xda") : -2]
    with pytest.raises(InvalidRequest, match=r"has \d+ scans; at most 100; save it again"):
        decode_picture(photo[:-2] + scan * 100 + photo[-2:], LIMITS)


def test_a_picture_is_fitted_with_its_aspect_over_white() -> None:
    red = np.zeros((10, 40, 3), np.uint8)
    red[..., 0] = 255
    fitted = fit_picture(red, 64, 64)
    assert fitted.shape == (64, 64, 3)
    assert (fitted[24:40] == (255, 0, 0)).all()
    assert (fitted[:24] == 255).all()
    assert (fitted[40:] == 255).all()


def test_transparent_parts_become_white_and_half_transparent_ones_mix() -> None:
    picture = np.zeros((1, 2, 4), np.uint8)
    picture[0, 1, 3] = 128
    assert np.allclose(fit_picture(picture, 2, 1)[0], [[255] * 3, [127] * 3], atol=1)


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 1000, 3), (1000, 1, 4), (64, 64, 4)])
def test_any_shape_fits(shape: tuple[int, ...]) -> None:
    assert fit_picture(noise(*shape), 64, 48).shape == (48, 64, 3)


def test_a_single_pixel_fills_the_frame() -> None:
    assert (fit_picture(np.full((1, 1, 3), 77, np.uint8), 64, 64) == 77).all()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (33, 47)])
def test_an_mp4_plays_every_frame_at_its_rate_and_looks_alike(height: int, width: int) -> None:
    frames = smooth(8, height, width)
    with av.open(BytesIO(encode(frames, 8.0, "video/mp4"))) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 8)
        seen = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)])
    assert seen.shape == (8, height + height % 2, width + width % 2, 3)
    error = (seen[:, :height, :width].astype(float) - frames) ** 2
    assert 10 * np.log10(255**2 / error.mean()) > 32  # dB; chroma is halved, so not exact


@pytest.mark.parametrize(("media_type", "tolerance"), [("image/png", 0.0), ("image/webp", 6.0), ("image/gif", 12.0)])
def test_animated_pictures_hold_every_frame_at_its_rate(media_type: str, tolerance: float) -> None:
    frames = smooth(8, 32, 32)
    with Image.open(BytesIO(encode(frames, 10.0, media_type))) as image:
        shown = [(np.asarray(f.convert("RGB")).astype(float), f.info["duration"]) for f in ImageSequence.Iterator(image)]
    assert [duration for _, duration in shown] == [100] * 8
    assert np.abs(np.stack([p for p, _ in shown]) - frames).mean() <= tolerance


@pytest.mark.parametrize("media_type", sorted(ENCODERS))
def test_one_frame_can_be_written_as_every_type(media_type: str) -> None:
    assert len(encode(smooth(1, 16, 16), 8.0, media_type)) > 50


def test_every_suffix_has_an_encoder_and_unknown_ones_say_which_are_known() -> None:
    assert set(SUFFIXES.values()) == set(ENCODERS)
    assert media_type_of(Path("A.MP4")) == "video/mp4"
    with pytest.raises(ConfigError, match=r"'.avi' is none of .mp4, .webp, .gif, .png"):
        media_type_of(Path("out.avi"))
    with pytest.raises(NotFound, match="known: image/gif"):
        encode(smooth(1, 2, 2), 8.0, "video/ogg")
