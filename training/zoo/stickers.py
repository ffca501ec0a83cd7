"""Animated stickers: glyphs of Noto Color Emoji moved about procedurally, with captions in plain words.

The pictures come from the font file of Debian's package fonts-noto-color-emoji (SIL OFL 1.1); nothing of it is kept in this
project. A clip is a function of (glyph, motion, amplitude, background): the conditioning picture is its frame F // 2, the rest
pose, from which the motion unfolds both ways (middle-frame conditioning, Yan et al. 2024, arXiv:2402.06088).

B batch, F frames, S side in pixels.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFont
from torch import Tensor

from reelstep.errors import NotFound

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
SIDE = 64
FRAMES = 8
GLYPH_PX = 40  # of SIDE at rest, so that a motion has room
TEXTURE_PX = 48

BACKGROUNDS = {
    "white": (250, 250, 250), "black": (15, 15, 15), "gray": (135, 135, 135), "red": (205, 45, 45),
    "orange": (245, 150, 50), "yellow": (248, 218, 80), "green": (70, 165, 80), "teal": (50, 160, 165),
    "blue": (60, 100, 205), "light blue": (150, 205, 245), "purple": (130, 75, 180), "pink": (245, 160, 195),
}  # fmt: skip

NAMES = {
    0x2764: "red heart", 0x2B50: "yellow star", 0x1F431: "cat", 0x1F436: "dog", 0x1F600: "smiley", 0x1F34E: "red apple",
    0x1F697: "red car", 0x1F68C: "bus", 0x1F3E0: "house", 0x2600: "sun", 0x1F319: "moon", 0x1F333: "tree", 0x1F339: "rose",
    0x1F98A: "fox", 0x1F43B: "bear", 0x1F43C: "panda", 0x1F984: "unicorn", 0x1F419: "octopus", 0x1F41F: "fish",
    0x1F40E: "horse", 0x1F426: "bird", 0x1F382: "birthday cake", 0x1F369: "donut", 0x1F355: "pizza", 0x26BD: "soccer ball",
    0x1F3C0: "basketball", 0x1F3B8: "guitar", 0x1F451: "crown", 0x1F48E: "gem", 0x1F47B: "ghost", 0x1F480: "skull",
    0x1F916: "robot", 0x1F47D: "alien", 0x1F525: "fire", 0x2602: "umbrella", 0x2603: "snowman", 0x260E: "telephone",
    0x2708: "airplane", 0x1F602: "laughing face", 0x1F60D: "heart eyes", 0x1F622: "crying face", 0x1F99D: "raccoon",
}  # fmt: skip
"""Everyday names where Unicode's are not what a person would write (U+2764 is HEAVY BLACK HEART)."""


@dataclass(frozen=True)
class Pose:
    """Where the glyph is in each frame. Tensors [F]: shift in pixels, angle in radians, scale along x and y, opacity."""

    dx: Tensor
    dy: Tensor
    angle: Tensor
    sx: Tensor
    sy: Tensor
    opacity: Tensor


@dataclass(frozen=True)
class Motion:
    """One way to move. `pose` maps (u [F] in [-1, 1), 0 at rest; amplitude) to changes of the rest pose."""

    amplitudes: tuple[float, float, float]  # slight, plain, strong
    pose: Callable[[Tensor, float], dict[str, Tensor]]
    phrases: tuple[str, ...]


def slide(x: int, y: int) -> Callable[[Tensor, float], dict[str, Tensor]]:
    return lambda u, a: {"dx": x * a * u, "dy": y * a * u}


CLOCKWISE = ("spins clockwise", "rotates clockwise", "turns to the right like a clock")
COUNTERCLOCKWISE = ("spins counterclockwise", "rotates counterclockwise", "turns anticlockwise")
MOTIONS = {
    "still": Motion((0, 0, 0), lambda u, a: {}, ("stands still", "does not move", "is at rest", "")),
    "slide_left": Motion((9, 15, 22), slide(-1, 0), ("slides left", "moves to the left", "glides leftwards")),
    "slide_right": Motion((9, 15, 22), slide(1, 0), ("slides right", "moves to the right", "glides rightwards")),
    "slide_up": Motion((9, 15, 22), slide(0, -1), ("slides up", "moves upwards", "rises")),
    "slide_down": Motion((9, 15, 22), slide(0, 1), ("slides down", "moves downwards", "sinks")),
    "spin_clockwise": Motion((0.7, 1.6, math.pi), lambda u, a: {"angle": a * u}, CLOCKWISE),
    "spin_counterclockwise": Motion((0.7, 1.6, math.pi), lambda u, a: {"angle": -a * u}, COUNTERCLOCKWISE),
    "grow": Motion((0.2, 0.35, 0.5), lambda u, a: {"sx": 1 + a * u, "sy": 1 + a * u}, ("grows", "gets bigger", "becomes larger")),
    "shrink": Motion((0.2, 0.35, 0.5), lambda u, a: {"sx": 1 - a * u, "sy": 1 - a * u}, ("shrinks", "gets smaller", "becomes tiny")),
    "bounce": Motion((6, 11, 17), lambda u, a: {"dy": -a * (math.pi * u).sin().abs()}, ("bounces", "jumps up and down", "hops")),
    "shake": Motion((4, 7, 11), lambda u, a: {"dx": a * (2 * math.pi * u).sin()}, ("shakes", "trembles from side to side", "wobbles")),
    "fade": Motion((0.5, 0.75, 1.0), lambda u, a: {"opacity": 1 - a * u.abs()}, ("fades in and out", "fades", "appears and vanishes")),
    "flip": Motion((0.5, 0.75, 1.0), lambda u, a: {"sx": (math.pi * a * u).cos()}, ("flips", "turns around like a coin", "flips over")),
}  # fmt: skip
MOVING = tuple(motion for motion in MOTIONS if motion != "still")
AMOUNTS = (("slightly", "a little"), ("",), ("strongly", "a lot"))


@dataclass(frozen=True)
class Sticker:
    """One glyph: code point, name in words, whether it is held out of training, texture [4, T, T] premultiplied RGBA in 0..1."""

    codepoint: int
    name: str
    held_out: bool
    texture: Tensor


def is_held_out(codepoint: int) -> bool:
    """One in ten, by hash, so that it never depends on the font's version or on an order."""
    return hashlib.sha256(f"sticker {codepoint:x}".encode()).digest()[0] % 10 == 0


def load_stickers(font: Path = FONT) -> list[Sticker]:
    """Every picture of the font that is one code point with a Unicode name; letters, digits and skin-tone swatches are left out.

    Raises NotFound if the font is not installed.
    """
    if not font.exists():
        raise NotFound(f"{font} is missing; install Debian's package fonts-noto-color-emoji")
    from fontTools.ttLib import TTFont

    face = ImageFont.truetype(str(font), 109)  # the only strike of this bitmap font
    stickers = []
    for codepoint in sorted(TTFont(font).getBestCmap()):
        unicode_name = unicodedata.name(chr(codepoint), "")
        if codepoint < 0x2190 or not unicode_name or unicodedata.category(chr(codepoint)) not in ("So", "Po", "Sm"):
            continue
        if "IDEOGRAPH" in unicode_name or "REGIONAL" in unicode_name:
            continue
        mask = face.getmask(chr(codepoint), mode="RGBA")
        if mask.size != (136, 128):
            continue
        pixels = np.asarray(mask, dtype=np.uint8).reshape(128, 136, 4)
        stickers.append(Sticker(codepoint, NAMES.get(codepoint, words(unicode_name)), is_held_out(codepoint), texture(pixels)))
    return stickers


def words(unicode_name: str) -> str:
    """"HEAVY BLACK HEART" -> "heart": lower case, without the words that speak of typography."""
    drop = {"BLACK", "WHITE", "HEAVY", "SIGN", "SYMBOL", "EMOJI"}
    kept = [w for w in unicode_name.split() if w not in drop]
    return " ".join(kept or unicode_name.split()).lower()


def texture(rgba: np.ndarray) -> Tensor:
    """A glyph bitmap as premultiplied [4, T, T], centred in a square with a clear rim."""
    square = Image.new("RGBA", (160, 160))
    square.paste(Image.fromarray(rgba, "RGBA"), (12, 16))
    small = np.asarray(square.convert("RGBa").resize((TEXTURE_PX, TEXTURE_PX), Image.Resampling.LANCZOS), dtype=np.float32) / 255
    return torch.from_numpy(small).permute(2, 0, 1).contiguous()


def pose_of(motion: str, amount: int) -> Pose:
    """The pose in each of FRAMES frames; at rest in frame FRAMES // 2."""
    u = (torch.arange(FRAMES, dtype=torch.float32) - FRAMES // 2) / (FRAMES // 2)
    one, zero = torch.ones_like(u), torch.zeros_like(u)
    rest = {"dx": zero, "dy": zero, "angle": zero, "sx": one, "sy": one, "opacity": one}
    return Pose(**{**rest, **MOTIONS[motion].pose(u, MOTIONS[motion].amplitudes[amount])})


def render(textures: Tensor, poses: Sequence[Pose], backgrounds: Tensor, sizes: Tensor | None = None) -> Tensor:
    """Composite moving glyphs over plain backgrounds.

    textures: [B, 4, T, T]; backgrounds: [B, 3] in 0..1; sizes: [B], of GLYPH_PX at rest, 1 unless given. Returns [B, 3, F, S, S] in -1..1.
    """
    b = len(poses)
    dx, dy, angle, sx, sy, opacity = (torch.stack([getattr(p, k) for p in poses]) for k in ("dx", "dy", "angle", "sx", "sy", "opacity"))
    if sizes is not None:
        sx, sy = sx * sizes[:, None], sy * sizes[:, None]
    sx = torch.where(sx.abs() < 0.03, 0.03, sx)  # edge-on coin: a thin line, not a division by zero
    half = GLYPH_PX * (160 / 136) / 2  # half side of the texture square, in pixels
    cos, sin = angle.cos(), angle.sin()
    # output pixel -> texture: undo the shift, then the rotation, then the scale
    row_x = torch.stack([cos / sx, sin / sx, -(cos * dx + sin * dy) / sx / (SIDE / 2)], -1)
    row_y = torch.stack([-sin / sy, cos / sy, (sin * dx - cos * dy) / sy / (SIDE / 2)], -1)
    theta = torch.stack([row_x, row_y], -2).flatten(0, 1) * (SIDE / 2 / half)  # [B F, 2, 3]
    grid = F.affine_grid(theta, [b * FRAMES, 4, SIDE, SIDE], align_corners=False)
    source = textures[:, None].expand(-1, FRAMES, -1, -1, -1).flatten(0, 1)
    rgba = F.grid_sample(source, grid, align_corners=False).unflatten(0, (b, FRAMES)) * opacity[:, :, None, None, None]
    video = rgba[:, :, :3] + (1 - rgba[:, :, 3:]) * backgrounds[:, None, :, None, None]
    return video.clamp(0, 1).permute(0, 2, 1, 3, 4) * 2 - 1


def caption(rng: np.random.Generator, name: str, motion: str, amount: int, background: str) -> str:
    """A sentence for a clip, e.g. "a red heart spins clockwise slightly on a blue background"."""
    article = rng.choice([f"{'an' if name[0] in 'aeiou' else 'a'} ", "the ", ""])
    phrase = rng.choice(MOTIONS[motion].phrases)
    how = "" if motion == "still" else rng.choice(AMOUNTS[amount])
    verb = " ".join(w for w in ((how, phrase) if rng.random() < 0.3 and how != "a lot" and how != "a little" else (phrase, how)) if w)
    where = rng.choice([f"on a {background} background", f"on {background}", f"with a {background} background", f"{background} background"])
    if rng.random() < 0.2:
        return f"{where}, {article}{name} {verb}".strip()
    return " ".join(w for w in (f"{article}{name}", verb, where) if w)


def prompts(count: int, seed: int) -> list[str]:
    """`count` different captions of everyday stickers, in no order."""
    rng = np.random.default_rng((seed, 1))
    names, places, found = list(NAMES.values()), list(BACKGROUNDS), dict[str, None]()
    while len(found) < count:
        found[caption(rng, str(rng.choice(names)), str(rng.choice(MOVING)), int(rng.integers(3)), str(rng.choice(places)))] = None
    return list(found)


@dataclass(frozen=True)
class Clips:
    """A batch of clips. video: [B, 3, F, S, S] in -1..1; the rest are lists of length B."""

    video: Tensor
    captions: list[str]
    names: list[str]
    motions: list[str]
    amounts: list[int]
    backgrounds: list[str]

    @property
    def picture(self) -> Tensor:
        """The conditioning picture: the rest frame, [B, 3, 1, S, S]."""
        return self.video[:, :, FRAMES // 2 : FRAMES // 2 + 1]


def make_clips(
    stickers: Sequence[Sticker], rng: np.random.Generator, count: int, motions: Sequence[str] = tuple(MOTIONS), varied: bool = False
) -> Clips:
    """`count` clips drawn uniformly from stickers, motions, amounts and backgrounds (their shade varied by +-4 %).

    `varied`: half of the glyphs are mirrored, and half are 0.8 to 1.5 times their size, as people's own pictures may be.
    """
    chosen = [stickers[i] for i in rng.integers(len(stickers), size=count)]
    kinds = [motions[i] for i in rng.integers(len(motions), size=count)]
    amounts = [int(a) for a in rng.integers(3, size=count)]
    places = [list(BACKGROUNDS)[i] for i in rng.integers(len(BACKGROUNDS), size=count)]
    shade = np.clip(np.array([BACKGROUNDS[p] for p in places]) / 255 + rng.uniform(-0.04, 0.04, (count, 3)), 0, 1)
    textures, sizes = torch.stack([s.texture for s in chosen]), None
    if varied:
        mirrored = torch.from_numpy(rng.random(count) < 0.5)[:, None, None, None]
        textures = torch.where(mirrored, textures.flip(-1), textures)
        sizes = torch.from_numpy(np.where(rng.random(count) < 0.5, 1.0, rng.uniform(0.8, 1.5, count))).float()
    video = render(textures, [pose_of(m, a) for m, a in zip(kinds, amounts, strict=True)], torch.from_numpy(shade).float(), sizes)
    texts = [caption(rng, s.name, m, a, p) for s, m, a, p in zip(chosen, kinds, amounts, places, strict=True)]
    return Clips(video, texts, [s.name for s in chosen], kinds, amounts, places)
