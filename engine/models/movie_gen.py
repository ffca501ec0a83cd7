"""The Movie Gen Video transformer (Polyak et al. 2024, arXiv:2410.13720, section 3.1) and the system around it.

B batch, C latent channels, F H W latent frames and sides, L video tokens, S text tokens, D width, N heads, K head dim,
P values of a patch. Tags say where a size comes from: the paper (notes), a re-implementation, or inference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reelstep.compiler.part import Part
from reelstep.compiler.program import Profile, Program, TensorSpec
from reelstep.engine.models.spec import ModelSettings, ModelSpec
from reelstep.engine.request import Limits
from reelstep.errors import ConfigError
from reelstep.kernels.gated_residual import gated_residual
from reelstep.kernels.patchify import patchify
from reelstep.kernels.qk_norm_rope import qk_norm_rope
from reelstep.kernels.rms_modulate import rms_modulate
from reelstep.kernels.swiglu import swiglu
from reelstep.kernels.unpatchify import unpatchify

if TYPE_CHECKING:
    from reelstep.engine.models.tae import TAE

EPS = 1e-6
"""Of every norm."""


@dataclass(frozen=True)
class MovieGenConfig:
    """Sizes of one Movie Gen transformer. A config states everything; there are no defaults."""

    layers: int
    width: int
    ffn: int
    heads: int
    latent_channels: int
    condition_channels: int  # latents concatenated on channels (sticker conditioning, editing); 0 for none
    patch: tuple[int, int, int]  # latent frames, rows, columns in one token
    positions: tuple[int, int, int]  # sizes of the learned tables for T, H, W, in tokens
    text_widths: tuple[int, ...]  # one per text encoder
    time_frequencies: int
    time_scale: float  # t is multiplied by this before the sinusoid; the paper does not say
    qk_norm: bool  # not in the paper; for look-alikes and small models

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} is not divisible by {self.heads} heads")

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Tokens of a latent of these sizes."""
        return (frames // self.patch[0]) * (height // self.patch[1]) * (width // self.patch[2])


class Attention(nn.Module):
    """Multi-head attention without biases. Queries from x [B, L, D]; keys and values from context [B, S, D].

    Torch's own attention: what replaces it where a sequence is split, where gradients are taken, or where a backend keeps the op of ours does so by its name.
    """

    def __init__(self, config: MovieGenConfig) -> None:
        super().__init__()
        d, k = config.width, config.width // config.heads
        self.heads = config.heads
        self.q = nn.Linear(d, d, bias=False)
        self.k = nn.Linear(d, d, bias=False)
        self.v = nn.Linear(d, d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.q_norm = nn.RMSNorm(k, eps=EPS) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(k, eps=EPS) if config.qk_norm else None

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q_BLNK = self.q(x).unflatten(-1, (self.heads, -1))
        k_BSNK = self.k(context).unflatten(-1, (self.heads, -1))
        v_BSNK = self.v(context).unflatten(-1, (self.heads, -1))
        if self.q_norm is not None and self.k_norm is not None:
            q_BLNK, k_BSNK = qk_norm_rope(q_BLNK, k_BSNK, self.q_norm.weight, self.k_norm.weight, eps=EPS)
        y_BNLK = F.scaled_dot_product_attention(q_BLNK.transpose(1, 2), k_BSNK.transpose(1, 2), v_BSNK.transpose(1, 2))
        return self.out(y_BNLK.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """W2(silu(W1 x) * W3 x), no biases."""

    def __init__(self, config: MovieGenConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.width, config.ffn, bias=False)
        self.w3 = nn.Linear(config.width, config.ffn, bias=False)
        self.w2 = nn.Linear(config.ffn, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class Positions(nn.Module):
    """Learned tables [N, D], "0" of frames, "1" of rows, "2" of columns of tokens."""

    def __init__(self, sizes: tuple[int, int, int], width: int) -> None:
        super().__init__()
        for i, n in enumerate(sizes):
            self.register_parameter(str(i), nn.Parameter(torch.randn(n, width) * 0.02))

    def forward(self, f: int, h: int, w: int) -> Tensor:
        """Their sum on the token grid, in (t, h, w) order: [L, D]. Raises ConfigError for a grid that is larger than the tables."""
        t_table, h_table, w_table = self.parameters()
        most = tuple(len(table) for table in self.parameters())
        if any(asked > n for asked, n in zip((f, h, w), most, strict=True)):
            raise ConfigError(f"{f} x {h} x {w} tokens; this model has positions for {' x '.join(map(str, most))}: take fewer frames or a smaller size")
        grid = t_table[:f, None, None] + h_table[None, :h, None] + w_table[None, None, :w]
        return grid.flatten(0, 2)


class Block(nn.Module):
    """Self-attention, text cross-attention, SwiGLU; the first and last modulated and gated by time.

    The six vectors are shared over layers, plus this layer's own `table` (PixArt's form: the count of 29.3B parameters needs
    it). Positions are added to the input of every layer, the text is neither normed nor gated.
    """

    def __init__(self, config: MovieGenConfig) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.width, eps=EPS)
        self.self_attention = Attention(config)
        self.cross_attention = Attention(config)
        self.norm2 = nn.RMSNorm(config.width, eps=EPS)
        self.ffn = SwiGLU(config)
        self.table = nn.Parameter(torch.randn(6, config.width) / math.sqrt(config.width))

    def forward(self, x: Tensor, positions: Tensor, modulation: Tensor, context: Tensor) -> Tensor:
        # x: [B, L, D]; positions: [L, D]; modulation: [B, 6, D]; context: [B, S, D]
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation + self.table).unbind(1)
        x = x + positions
        y = rms_modulate(x, scale1, shift1, self.norm1.weight, EPS)
        x = gated_residual(x, gate1, self.self_attention(y, y))
        x = x + self.cross_attention(x, context)
        y = rms_modulate(x, scale2, shift2, self.norm2.weight, EPS)
        return gated_residual(x, gate2, self.ffn(y))

    def modulated_input(self, x: Tensor, positions: Tensor, modulation: Tensor) -> Tensor:
        """What `forward` hands to self-attention, [B, L, D]: it changes with x and with time, and knows no text."""
        shift, scale, *_ = (modulation + self.table).unbind(1)
        return rms_modulate(x + positions, scale, shift, self.norm1.weight, EPS)


class TimeEmbedding(nn.Module):
    """t [B] -> modulation [B, 7, D]: the six shared adaLN vectors, then the embedding itself for the head.

    Apart from the blocks, so that it can stay in float32 and be computed once for all the steps of a schedule.
    """

    def __init__(self, config: MovieGenConfig) -> None:
        super().__init__()
        half = config.time_frequencies // 2
        self.scale = config.time_scale
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(config.time_frequencies, config.width, bias=False), nn.SiLU(), nn.Linear(config.width, config.width, bias=False))
        self.shared = nn.Linear(config.width, 6 * config.width, bias=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = self.scale * t[:, None] * self.frequencies
        embedding = self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))
        six = self.shared(F.silu(embedding)).unflatten(1, (6, -1))
        return torch.cat([six, embedding[:, None]], dim=1)


class TextProjection(nn.Module):
    """Each encoder's tokens through its own Linear and LayerNorm, then joined along the tokens."""

    def __init__(self, config: MovieGenConfig) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(width, config.width, bias=False) for width in config.text_widths)
        self.norms = nn.ModuleList(nn.LayerNorm(config.width, eps=EPS) for _ in config.text_widths)

    def forward(self, *texts: Tensor) -> Tensor:
        parts = [norm(linear(text)) for linear, norm, text in zip(self.linears, self.norms, texts, strict=True)]
        return torch.cat(parts, dim=1)


class MovieGenTransformer(nn.Module):
    """Velocity of flow matching: x_t, time, text (and condition latents) -> dx/dt, all [B, C, F, H, W]."""

    def __init__(self, config: MovieGenConfig) -> None:
        super().__init__()
        self.config = config
        volume = math.prod(config.patch)
        d = config.width
        self.time = TimeEmbedding(config)
        self.text = TextProjection(config)
        self.patch_in = nn.Linear((config.latent_channels + config.condition_channels) * volume, d, bias=False)
        self.positions = Positions(config.positions, d)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(d, eps=EPS)
        self.table = nn.Parameter(torch.randn(2, d) / math.sqrt(d))
        self.patch_out = nn.Linear(d, config.latent_channels * volume, bias=False)

    def forward(self, x: Tensor, modulation: Tensor, condition: Tensor | None, context: Tensor) -> Tensor:
        """x, condition: [B, C, F, H, W]; modulation: [B, 7, D] of `time`; context: [B, S, D] of `text`."""
        grid = self.grid(x)
        tokens = self.embed(x, condition)
        tokens = self.through(self.blocks, tokens, grid, modulation, context)
        return self.head(tokens, grid, modulation)

    def grid(self, x: Tensor) -> tuple[int, int, int]:
        """Tokens of a latent [B, C, F, H, W] along F, H, W."""
        pt, ph, pw = self.config.patch
        return x.shape[2] // pt, x.shape[3] // ph, x.shape[4] // pw

    def embed(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """x, condition: [B, C, F, H, W] -> tokens [B, L, D]."""
        if condition is not None:
            x = torch.cat([x, condition], dim=1)
        return self.patch_in(patchify(x, self.config.patch))

    def through(self, blocks: Iterable[nn.Module], tokens: Tensor, grid: tuple[int, int, int], modulation: Tensor, context: Tensor) -> Tensor:
        """Tokens [B, L, D] after some of the blocks."""
        positions = self.positions(*grid)
        for block in blocks:
            tokens = block(tokens, positions, modulation[:, :6], context)
        return tokens

    def head(self, tokens: Tensor, grid: tuple[int, int, int], modulation: Tensor) -> Tensor:
        """Tokens [B, L, D] after the last block -> velocity [B, C, F, H, W]."""
        shift, scale = (modulation[:, 6, None] + self.table).unbind(1)
        tokens = self.patch_out(rms_modulate(tokens, scale, shift, self.norm.weight, EPS))
        return unpatchify(tokens, grid, self.config.patch)


class Unconditioned(nn.Module):
    """`denoise` of a transformer without condition latents."""

    def __init__(self, transformer: MovieGenTransformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Tensor, modulation: Tensor, context: Tensor) -> Tensor:
        return self.transformer(x, modulation, None, context)


class Embed(nn.Module):
    """`denoise_embed`: the tokens, on their grid [B, f, h, w, D], and the first block's modulated input, which tells how much the network's work changes."""

    def __init__(self, transformer: MovieGenTransformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, x: Tensor, modulation: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        grid = self.transformer.grid(x)
        tokens = self.transformer.embed(x, condition)
        first = self.transformer.blocks[0]
        assert isinstance(first, Block)
        signal = first.modulated_input(tokens, self.transformer.positions(*grid), modulation[:, :6])
        return tokens.unflatten(1, grid), signal.unflatten(1, grid)


class First(nn.Module):
    """`denoise_first`: tokens [B, f, h, w, D] after the first block."""

    def __init__(self, transformer: MovieGenTransformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, hidden: Tensor, modulation: Tensor, context: Tensor) -> Tensor:
        _, f, h, w, _ = hidden.shape
        tokens = self.transformer.through(self.transformer.blocks[:1], hidden.flatten(1, 3), (f, h, w), modulation, context)
        return tokens.unflatten(1, (f, h, w))


class Rest(nn.Module):
    """`denoise_rest`: from the tokens after the first block what the other blocks add to them, [B, f, h, w, D], and the velocity."""

    def __init__(self, transformer: MovieGenTransformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, hidden: Tensor, modulation: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        _, f, h, w, _ = hidden.shape
        begun = hidden.flatten(1, 3)
        tokens = self.transformer.through(self.transformer.blocks[1:], begun, (f, h, w), modulation, context)
        return (tokens - begun).unflatten(1, (f, h, w)), self.transformer.head(tokens, (f, h, w), modulation)


class Last(nn.Module):
    """`denoise_last`: the velocity from tokens and what blocks added to such tokens before, each [B, f, h, w, D]."""

    def __init__(self, transformer: MovieGenTransformer) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, hidden: Tensor, residual: Tensor, modulation: Tensor) -> Tensor:
        _, f, h, w, _ = hidden.shape
        return self.transformer.head((hidden + residual).flatten(1, 3), (f, h, w), modulation)


class Encode(nn.Module):
    """`encode_image` of a system."""

    def __init__(self, tae: TAE) -> None:
        super().__init__()
        self.tae = tae

    def forward(self, picture: Tensor) -> Tensor:
        return self.tae.encode(picture)


class Decode(nn.Module):
    """`decode` of a system."""

    def __init__(self, tae: TAE) -> None:
        super().__init__()
        self.tae = tae

    def forward(self, z: Tensor) -> Tensor:
        return self.tae.decode(z)


def time_program(transformer: MovieGenTransformer, max_batch: int) -> Program:
    """t [B] -> modulation [B, 7, D], in float32 always."""
    d = transformer.config.width
    return Program(
        "embed_time", transformer.time, (TensorSpec("t", "float32", ("B",)),), (TensorSpec("modulation", "float32", ("B", 7, d)),),
        (Profile("any", {}, max_batch),), keep_f32=True,
    )  # fmt: skip


def latent_edge(config: MovieGenConfig, name: str) -> TensorSpec:
    """x and velocity."""
    return TensorSpec(name, "float32", ("B", config.latent_channels, "F", "H", "W"))


def condition_edges(config: MovieGenConfig) -> tuple[TensorSpec, ...]:
    """The condition latents, where the transformer has any."""
    return (TensorSpec("condition", "float32", ("B", config.condition_channels, "F", "H", "W")),) if config.condition_channels else ()


def modulation_edge(config: MovieGenConfig) -> TensorSpec:
    return TensorSpec("modulation", "float32", ("B", 7, config.width))


def context_edge(config: MovieGenConfig, text_tokens: int) -> TensorSpec:
    return TensorSpec("context", "float32", ("B", text_tokens, config.width))


def denoise_program(transformer: MovieGenTransformer, text_tokens: int, profiles: Sequence[Profile]) -> Program:
    """The network call that a sampler asks for. Profiles give F, H, W of the latent."""
    config = transformer.config
    condition = condition_edges(config)
    return Program(
        "denoise", transformer if condition else Unconditioned(transformer),
        (latent_edge(config, "x"), modulation_edge(config), *condition, context_edge(config, text_tokens)), (latent_edge(config, "velocity"),),
        tuple(profiles),
    )  # fmt: skip


def split_programs(transformer: MovieGenTransformer, text_tokens: int, profiles: Sequence[Profile]) -> tuple[Program, ...]:
    """`denoise` in the pieces that a step cache needs; run one after another they give its velocity. Weights are those of `denoise`.

    Profiles as there. Raises ConfigError for a transformer of one block, of which nothing is left to skip.
    """
    config = transformer.config
    if config.layers < 2:
        raise ConfigError("a transformer of 1 layer has nothing behind its first block for a step cache to skip; leave its split programs out")
    hidden, signal, residual = (TensorSpec(name, "float32", ("B", "f", "h", "w", config.width)) for name in ("hidden", "signal", "residual"))
    modulation, context = modulation_edge(config), context_edge(config, text_tokens)
    velocity, (pt, ph, pw) = latent_edge(config, "velocity"), config.patch
    grids = tuple(Profile(p.name, {**p.sizes, "f": p.sizes["F"] // pt, "h": p.sizes["H"] // ph, "w": p.sizes["W"] // pw}, p.max_batch) for p in profiles)
    return (
        Program("denoise_embed", Embed(transformer), (latent_edge(config, "x"), modulation, *condition_edges(config)), (hidden, signal), grids),
        Program("denoise_first", First(transformer), (hidden, modulation, context), (hidden,), grids),
        Program("denoise_rest", Rest(transformer), (hidden, modulation, context), (residual, velocity), grids),
        Program("denoise_last", Last(transformer), (hidden, residual, modulation), (velocity,), grids),
    )


CONFIG_30B = MovieGenConfig(
    layers=48, width=6144, ffn=16384, heads=48, latent_channels=16, condition_channels=0, patch=(1, 2, 2), positions=(32, 96, 96),
    text_widths=(4096, 1280, 1472), time_frequencies=256, time_scale=1.0, qk_norm=False,
)  # fmt: skip
"""Movie Gen Video. Text widths are UL2, MetaCLIP and ByT5 as a re-implementation has them; H, W tables are inferred."""

TEXT_TOKENS_30B = 1024


def programs_30b(transformer: nn.Module) -> tuple[Program, ...]:
    """256 x 768 x 768 (73,728 tokens) and a 768 px image. The text encoders and the TAE come with weights of their own."""
    assert isinstance(transformer, MovieGenTransformer)
    video = Profile("video", {"F": 32, "H": 96, "W": 96}, 2)
    image = Profile("image", {"F": 1, "H": 96, "W": 96}, 2)
    return time_program(transformer, 64), denoise_program(transformer, TEXT_TOKENS_30B, (video, image))


def build_30b() -> MovieGenTransformer:
    """On the meta device: the weights (58.6 GB in bfloat16) were never released, so there is nothing to load."""
    with torch.device("meta"):
        return MovieGenTransformer(CONFIG_30B)


SPEC_30B = ModelSpec(
    name="movie-gen-30b",
    version="1",
    settings=ModelSettings(
        tasks=(), limits=Limits(sizes=((768, 768),), frames=(1, 256), max_steps=1000, max_scale=30.0, max_count=1), defaults={},
        path="condot", prediction="velocity", latent_channels=16, condition_channels=0, spatial_stride=8, temporal_stride=8, text_length=TEXT_TOKENS_30B,
        tile_frames=4, tile_overlap=2,
    ),
    build=build_30b,
    programs=programs_30b,
    card=None,
    sharding=(Part(f"{__name__}:build_30b", f"{__name__}:programs_30b", rules="movie-gen", prefix=""),),
)  # fmt: skip
