"""Temporal autoencoder (TAE) of Movie Gen: an image VAE inflated to video by 2.5-D convolutions.

Polyak et al. 2024, arXiv:2410.13720, section 3.1.1. Each 3x3 convolution is followed by a temporal one, each spatial
attention by a temporal one; an image is a video of one frame.

B batch, C channels, F frames, H W pixels; f h w the same after compression.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from reelstep.errors import ConfigError


@dataclass(frozen=True)
class TAEConfig:
    """Sizes of one TAE. Compression per side is `patch * 2**(levels - 1)`, in time `2**temporal_downs`."""

    channels: int
    multipliers: tuple[int, ...]
    res_blocks: int
    latent_channels: int
    patch: int  # space-to-depth factor before the first convolution; 1 in the paper's model
    temporal_downs: int  # the first levels that also halve the frames
    groups: int
    variational: bool  # the encoder gives (mean, log variance) instead of the mean alone
    linear_skip: bool  # a linear block code beside both halves, so that training starts from PCA
    scale: float  # latents are given out as (z - shift) * scale; both are stored with the weights
    shift: float

    def __post_init__(self) -> None:
        if self.temporal_downs > len(self.multipliers) - 1:
            raise ConfigError(f"temporal_downs={self.temporal_downs} needs as many spatial ones; {len(self.multipliers)} levels have one fewer")

    @property
    def spatial_stride(self) -> int:
        return int(self.patch * 2 ** (len(self.multipliers) - 1))

    @property
    def temporal_stride(self) -> int:
        return int(2**self.temporal_downs)

    def latent_frames(self, frames: int) -> int:
        """Latent frames of `frames` pixel frames: ceil(frames / temporal_stride)."""
        return -(-frames // self.temporal_stride)


def pad_time(x: Tensor) -> Tensor:
    """Repeat the first and the last frame once. x: [B, C, F, N] -> [B, C, F + 2, N]. Symmetric, so not causal."""
    return torch.cat([x[:, :, :1], x, x[:, :, -1:]], dim=2)


class TemporalConv(nn.Module):
    """k=3 convolution over frames, symmetric replicate padding; starts as the identity (centre tap = 1).

    Runs as a (3, 1) 2-D convolution over (F, H*W): with channels-last memory both this view and the per-frame view of the
    spatial convolutions are free.
    """

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, (3, 1), stride=(stride, 1))
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        with torch.no_grad():
            self.conv.weight[:, :, 1, 0] = torch.eye(channels)

    def forward(self, x: Tensor) -> Tensor:
        h = x.shape[-2]
        y = self.conv(pad_time(rearrange(x, "B C F H W -> B C F (H W)")))
        return rearrange(y, "B C F (H W) -> B C F H W", H=h)


class Conv25d(nn.Module):
    """3x3 convolution in each frame, then a temporal one: the paper's "2.5-D" convolution. [B, C, F, H, W]."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.temporal = TemporalConv(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.temporal(per_frame(self.spatial, x))


def per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply an image layer to every frame of x [B, C, F, H, W]."""
    b = x.shape[0]
    return rearrange(layer(rearrange(x, "B C F H W -> (B F) C H W")), "(B F) C H W -> B C F H W", B=b)


class ResBlock(nn.Module):
    """GroupNorm, SiLU, 2.5-D convolution, twice, around a residual."""

    def __init__(self, c_in: int, c_out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = Conv25d(c_in, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = Conv25d(c_out, c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(per_frame(self.norm1, x)))
        y = self.conv2(F.silu(per_frame(self.norm2, y)))
        return y + per_frame(self.skip, x)


class Attention(nn.Module):
    """Single-head attention with a residual over the pixels of a frame (`axis="space"`) or over the frames of a pixel (`"time"`)."""

    def __init__(self, channels: int, groups: int, axis: str) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.out = nn.Linear(channels, channels)
        self.to_tokens = "B C F H W -> (B F) (H W) C" if axis == "space" else "B C F H W -> (B H W) F C"
        self.to_video = "(B F) (H W) C -> B C F H W" if axis == "space" else "(B H W) F C -> B C F H W"

    def forward(self, x: Tensor) -> Tensor:
        b, _, f, h, w = x.shape
        tokens = rearrange(per_frame(self.norm, x), self.to_tokens)
        y = F.scaled_dot_product_attention(self.q(tokens)[:, None], self.k(tokens)[:, None], self.v(tokens)[:, None])
        sizes = {"B": b, "H": h, "W": w} if "(B H W)" in self.to_video else {"B": b, "F": f, "H": h, "W": w}
        return x + rearrange(self.out(y[:, 0]), self.to_video, **sizes)


class Mid(nn.Module):
    """The bottleneck: residual block, attention over space, attention over time, residual block."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.block1 = ResBlock(channels, channels, groups)
        self.space = Attention(channels, groups, "space")
        self.time = Attention(channels, groups, "time")
        self.block2 = ResBlock(channels, channels, groups)
        nn.init.zeros_(self.time.out.weight)  # inflated: an image model stays the same at the start
        nn.init.zeros_(self.time.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(self.time(self.space(self.block1(x))))


class Down(nn.Module):
    """Halve H and W, and F too where `temporal`: ceil(F / 2) frames."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(channels, channels, 3, stride=2)
        self.temporal = TemporalConv(channels, stride=2) if temporal else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.temporal(per_frame(self.spatial, F.pad(x, (0, 1, 0, 1))))


class Up(nn.Module):
    """Double F where `temporal`, then H and W: nearest neighbour, then a convolution."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.temporal = TemporalConv(channels) if temporal else None
        self.spatial = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.temporal is not None:
            x = self.temporal(x.repeat_interleave(2, dim=2))
        return per_frame(self.spatial, x.repeat_interleave(2, dim=3).repeat_interleave(2, dim=4))


class Encoder(nn.Module):
    """RGB [B, 3, F, H, W] -> latent moments [B, C or 2C, f, h, w]."""

    def __init__(self, config: TAEConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        self.patch = config.patch
        self.conv_in = Conv25d(3 * config.patch**2, widths[0])
        self.levels = nn.ModuleList()
        previous = widths[0]
        for i, width in enumerate(widths):
            level = [ResBlock(previous if j == 0 else width, width, config.groups) for j in range(config.res_blocks)]
            down = [Down(width, temporal=i < config.temporal_downs)] if i < len(widths) - 1 else []
            self.levels.append(nn.Sequential(*level, *down))
            previous = width
        self.mid = Mid(previous, config.groups)
        self.norm = nn.GroupNorm(config.groups, previous, eps=1e-6)
        self.conv_out = Conv25d(previous, config.latent_channels * (2 if config.variational else 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(rearrange(x, "B C F (H p) (W q) -> B (C p q) F H W", p=self.patch, q=self.patch))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(per_frame(self.norm, self.mid(x))))


class Decoder(nn.Module):
    """Latent [B, C, f, h, w] -> RGB [B, 3, f * temporal_stride, H, W]."""

    def __init__(self, config: TAEConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.multipliers]
        self.patch = config.patch
        self.conv_in = Conv25d(config.latent_channels, widths[-1])
        self.mid = Mid(widths[-1], config.groups)
        self.levels = nn.ModuleList()
        previous = widths[-1]
        for i in reversed(range(len(widths))):
            level = [ResBlock(previous if j == 0 else widths[i], widths[i], config.groups) for j in range(config.res_blocks + 1)]
            up = [Up(widths[i], temporal=i - 1 < config.temporal_downs)] if i > 0 else []
            self.levels.append(nn.Sequential(*level, *up))
            previous = widths[i]
        self.norm = nn.GroupNorm(config.groups, previous, eps=1e-6)
        self.conv_out = Conv25d(previous, 3 * config.patch**2)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in self.levels:
            x = level(x)
        x = self.conv_out(F.silu(per_frame(self.norm, x)))
        return rearrange(x, "B (C p q) F H W -> B C F (H p) (W q)", p=self.patch, q=self.patch)


class LinearSkip(nn.Module):
    """Linear code of t x s x s pixel blocks, added to both halves of the TAE.

    Set to the principal components of such blocks (`from_components`), with the last convolutions zero, the untrained TAE *is*
    PCA; the convolutions then only learn what is left. The idea of space-to-channel shortcuts: Chen et al. 2024, arXiv:2410.10733.
    """

    def __init__(self, config: TAEConfig) -> None:
        super().__init__()
        self.t, self.s = config.temporal_stride, config.spatial_stride
        self.encode = nn.Linear(3 * self.t * self.s**2, config.latent_channels)
        self.decode = nn.Linear(config.latent_channels, 3 * self.t * self.s**2)

    def from_components(self, mean: Tensor, components: Tensor) -> None:
        """mean: [3 t s s]; components: [C, 3 t s s], orthonormal rows."""
        with torch.no_grad():
            self.encode.weight.copy_(components)
            self.encode.bias.copy_(-components @ mean)
            self.decode.weight.copy_(components.T)
            self.decode.bias.copy_(mean)

    def blocks(self, x: Tensor) -> Tensor:
        """[B, 3, F, H, W] -> [B, f, h, w, 3 t s s]; the last frame is repeated up to a whole block."""
        missing = -x.shape[2] % self.t
        if missing:
            x = torch.cat([x, x[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)
        return rearrange(x, "B C (F t) (H p) (W q) -> B F H W (C t p q)", t=self.t, p=self.s, q=self.s)

    def to_latent(self, x: Tensor) -> Tensor:
        return rearrange(self.encode(self.blocks(x)), "B F H W C -> B C F H W")

    def to_pixels(self, z: Tensor) -> Tensor:
        x = self.decode(rearrange(z, "B C F H W -> B F H W C"))
        return rearrange(x, "B F H W (C t p q) -> B C (F t) (H p) (W q)", C=3, t=self.t, p=self.s, q=self.s)


class TAE(nn.Module):
    """Video [B, 3, F, H, W] in [-1, 1] <-> normalised latents [B, C, f, h, w].

    `decode` gives `f * temporal_stride` frames; a caller that encoded fewer keeps the first ones (the rest are "spurious").
    """

    def __init__(self, config: TAEConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("scale", torch.tensor(config.scale))
        self.register_buffer("shift", torch.tensor(config.shift))
        self.scale: Tensor
        self.shift: Tensor
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.skip = LinearSkip(config) if config.linear_skip else None
        if self.skip is not None:
            for last in (self.encoder.conv_out.spatial, self.decoder.conv_out.spatial):
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)  # type: ignore[arg-type]

    def encode(self, x: Tensor) -> Tensor:
        """Normalised latent mean of x."""
        mean = self.encoder(x)[:, : self.config.latent_channels]
        if self.skip is not None:
            mean = mean + self.skip.to_latent(x)
        return (mean - self.shift) * self.scale

    def decode(self, z: Tensor) -> Tensor:
        z = z / self.scale + self.shift
        x = self.decoder(z)
        return x if self.skip is None else x + self.skip.to_pixels(z)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


def outlier_penalty(z: Tensor, r: float = 3.0) -> Tensor:
    """Outlier penalty loss: mean over the batch of how far latents lie beyond r standard deviations of their frame.

    Statistics per frame and channel, over H and W. Polyak et al. 2024, section 3.1.1. z: [B, C, f, h, w].
    """
    mean = z.mean(dim=(-2, -1), keepdim=True)
    std = z.std(dim=(-2, -1), keepdim=True)
    return F.relu((z - mean).abs() - r * std).mean()


TAE_30B = TAEConfig(
    channels=128, multipliers=(1, 2, 4, 4), res_blocks=2, latent_channels=16, patch=1, temporal_downs=3, groups=32,
    variational=True, linear_skip=False, scale=1.5305, shift=0.0609,
)  # fmt: skip
"""Movie Gen's TAE on the SD3.5 image VAE. scale and shift are a re-implementation's, not the paper's."""


def blend_ramp(overlap: int, device: torch.device | None = None) -> Tensor:
    """Weights of the later tile over `overlap` frames, rising: (j + 0.5) / overlap. The earlier tile gets 1 - w."""
    return (torch.arange(overlap, dtype=torch.float32, device=device) + 0.5) / overlap


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """First latent frame of each tile: 0, tile - overlap, ... until `length` is covered. The last tile may be short.

    Raises ConfigError unless 0 <= overlap < tile.
    """
    if not 0 <= overlap < tile:
        raise ConfigError(f"overlap {overlap} must be at least 0 and below the tile length {tile}")
    return [0] + [tile - overlap + k * (tile - overlap) for k in range(math.ceil(max(length - tile, 0) / (tile - overlap)))]
