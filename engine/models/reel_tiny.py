"""`reel-tiny`: the small Movie Gen that this project trains (training/zoo/) and ships with its weights.

The classes of the 30B configuration at a size that a laptop serves: 64x64 stickers, 8 frames, made from words, a picture, or both.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from reelstep.compiler.part import Part
from reelstep.compiler.program import Profile, Program, TensorSpec
from reelstep.engine.models.byte_text import ByteTextConfig, ByteTextEncoder
from reelstep.engine.models.movie_gen import (
    Decode,
    Encode,
    MovieGenConfig,
    MovieGenTransformer,
    TextProjection,
    denoise_program,
    split_programs,
    time_program,
)
from reelstep.engine.models.spec import ModelSettings, ModelSpec
from reelstep.engine.models.tae import TAE, TAEConfig
from reelstep.engine.request import Choice, Defaults, Limits

TEXT_CONFIG = ByteTextConfig(length=128, width=160, layers=3, heads=4)
TAE_CONFIG = TAEConfig(
    channels=128, multipliers=(1, 1), res_blocks=1, latent_channels=16, patch=4, temporal_downs=1, groups=16,
    variational=False, linear_skip=True, scale=1.0, shift=0.0,
)  # fmt: skip
DENOISER_CONFIG = MovieGenConfig(
    layers=6, width=256, ffn=576, heads=4, latent_channels=16, condition_channels=16, patch=(1, 1, 1), positions=(4, 8, 8),
    text_widths=(160,), time_frequencies=256, time_scale=1000.0, qk_norm=True,
)  # fmt: skip
WEIGHTS = Path(__file__).parent / "weights"
SIDE, FRAMES = 64, 8
FITTED = ("bns_4", "bns_6", "bns_8", "bns_10", "bns_12", "bns_16", "bespoke_8", "linear_ag_12", "adaptive")
"""Of `reelstep fit`, for videos from words at the default scale."""
PROFILES = tuple(
    Profile(name, {"F": latent_frames, "H": SIDE // TAE_CONFIG.spatial_stride, "W": SIDE // TAE_CONFIG.spatial_stride}, 64)
    for name, latent_frames in (("video", TAE_CONFIG.latent_frames(FRAMES)), ("image", 1))
)
"""Of the denoiser."""

MEASURED = "reelstep bench steps"
MENU = {
    "draft": Choice(solver="bns_4", forwards=8, psnr_db=31.63, ssim=0.9493, frechet=0.4399, command=MEASURED),
    "standard": Choice(solver="bns_8", forwards=16, psnr_db=42.75, ssim=0.9944, frechet=0.0365, command=MEASURED),
    "best": Choice(solver="bns_16", forwards=32, psnr_db=50.01, ssim=0.9976, frechet=0.0047, command=MEASURED),
}
"""For videos from words: rows of benchmarks/results/steps.json."""
MEASURED_PICTURES = "reelstep bench steps --task text_to_image --nfe 4 6 8 12 24 --only ab2 euler"
PICTURES = {
    "draft": Choice(solver="ab2", steps=6, forwards=12, psnr_db=31.45, ssim=0.9160, frechet=0.7470, command=MEASURED_PICTURES),
    "standard": Choice(solver="ab2", steps=12, forwards=24, psnr_db=41.72, ssim=0.9813, frechet=0.0410, command=MEASURED_PICTURES),
    "best": Choice(solver="ab2", steps=24, forwards=48, psnr_db=48.25, ssim=0.9954, frechet=0.0036, command=MEASURED_PICTURES),
}
"""For pictures from words, to which no solver is fitted: rows of benchmarks/results/pictures.json."""
MEASURED_ANIMATIONS = "reelstep bench steps --task animate_sticker --nfe 4 6 8 12 16 24 --only ab2 euler"
ANIMATIONS = {
    "draft": Choice(solver="ab2", steps=4, forwards=4, psnr_db=39.64, ssim=0.9798, frechet=0.0797, command=MEASURED_ANIMATIONS),
    "standard": Choice(solver="ab2", steps=8, forwards=8, psnr_db=45.88, ssim=0.9919, frechet=0.0254, command=MEASURED_ANIMATIONS),
    "best": Choice(solver="ab2", steps=16, forwards=16, psnr_db=50.52, ssim=0.9957, frechet=0.0075, command=MEASURED_ANIMATIONS),
}
"""For animations, at scale 1, to which no solver is fitted: rows of benchmarks/results/animations.json."""


class Text(nn.Module):
    """`encode_text`: tokens [B, L] -> context [B, L, D]. Constant over the steps, so it runs once per request."""

    def __init__(self, encoder: ByteTextEncoder, projection: TextProjection) -> None:
        super().__init__()
        self.encoder = encoder
        self.projection = projection

    def forward(self, tokens: Tensor) -> Tensor:
        return self.projection(self.encoder(tokens))


class ReelTiny(nn.Module):
    """Text encoder, denoiser and TAE."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ByteTextEncoder(TEXT_CONFIG)
        self.denoiser = build_denoiser()
        self.tae = TAE(TAE_CONFIG)


def build() -> ReelTiny:
    """With the shipped weights (bfloat16 on disk, float32 here)."""
    model = ReelTiny()
    load_weights(model, WEIGHTS / "reel-tiny.safetensors")
    return model.eval()


def load_weights(module: nn.Module, file: Path, prefix: str = "") -> None:
    """The part of a weights file whose names begin with `prefix`, into `module`, in float32."""
    module.load_state_dict({name.removeprefix(prefix): w.float() for name, w in load_file(file).items() if name.startswith(prefix)})


def build_denoiser() -> MovieGenTransformer:
    """Random weights, or none where none are wanted."""
    return MovieGenTransformer(DENOISER_CONFIG)


def denoiser_programs(denoiser: nn.Module) -> tuple[Program, ...]:
    """What is worth sharing among ranks."""
    assert isinstance(denoiser, MovieGenTransformer)
    return (denoise_program(denoiser, TEXT_CONFIG.length, PROFILES),)


def programs(model: nn.Module) -> tuple[Program, ...]:
    """encode_text, encode_image, embed_time, denoise, decode; a video and an image profile where frames matter."""
    assert isinstance(model, ReelTiny)
    channels, side, stride = TAE_CONFIG.latent_channels, SIDE // TAE_CONFIG.spatial_stride, TAE_CONFIG.temporal_stride
    context = TensorSpec("context", "float32", ("B", TEXT_CONFIG.length, DENOISER_CONFIG.width))
    tiles = tuple(Profile(p.name, {**p.sizes, "frames": p.sizes["F"] * stride, "height": SIDE, "width": SIDE}, 16) for p in PROFILES)
    return (
        Program(
            "encode_text", Text(model.text, model.denoiser.text), (TensorSpec("tokens", "int64", ("B", TEXT_CONFIG.length)),), (context,),
            (Profile("any", {}, 64),),
        ),
        Program(
            "encode_image", Encode(model.tae), (TensorSpec("picture", "float32", ("B", 3, 1, SIDE, SIDE)),),
            (TensorSpec("latent", "float32", ("B", channels, 1, side, side)),), (Profile("image", {}, 16),),
        ),
        time_program(model.denoiser, 256),
        *denoiser_programs(model.denoiser),
        Program(
            "decode", Decode(model.tae), (TensorSpec("latent", "float32", ("B", channels, "F", "H", "W")),),
            (TensorSpec("video", "float32", ("B", 3, "frames", "height", "width")),), tiles,
        ),
    )  # fmt: skip


def adaptable(model: nn.Module) -> dict[str, nn.Linear]:
    """Attention and FFN of every block."""
    assert isinstance(model, ReelTiny)
    return {name: layer for name, layer in model.denoiser.named_modules() if isinstance(layer, nn.Linear) and name.startswith("blocks.")}


def pieces(model: nn.Module) -> tuple[Program, ...]:
    """`denoise` split."""
    assert isinstance(model, ReelTiny)
    return split_programs(model.denoiser, TEXT_CONFIG.length, PROFILES)


SPEC = ModelSpec(
    name="reel-tiny",
    version="1",
    settings=ModelSettings(
        tasks=("text_to_image", "text_to_video", "animate_sticker"),
        limits=Limits(sizes=((SIDE, SIDE),), frames=(1, FRAMES), max_steps=250, max_scale=20.0, max_count=16, max_prompt_bytes=TEXT_CONFIG.length - 1),
        defaults={
            "text_to_image": Defaults("ab2", "linear", 12, 3.0, 1, 8.0, menu=PICTURES),
            "text_to_video": Defaults("ab2", "linear", 12, 3.0, FRAMES, 8.0, menu=MENU),
            "animate_sticker": Defaults("euler", "linear", 6, 1.0, FRAMES, 8.0, menu=ANIMATIONS),
        },
        path="condot",
        prediction="velocity",
        latent_channels=TAE_CONFIG.latent_channels,
        condition_channels=DENOISER_CONFIG.condition_channels,
        spatial_stride=TAE_CONFIG.spatial_stride,
        temporal_stride=TAE_CONFIG.temporal_stride,
        text_length=TEXT_CONFIG.length,
        tile_frames=TAE_CONFIG.latent_frames(FRAMES),
        tile_overlap=2,
    ),
    build=build,
    programs=programs,
    card=WEIGHTS / "reel-tiny.md",
    fitted=tuple(WEIGHTS / f"reel-tiny.{name}.json" for name in FITTED),
    pieces=pieces,
    adaptable=adaptable,
    sharding=(Part(f"{__name__}:build_denoiser", f"{__name__}:denoiser_programs", rules="movie-gen", prefix="denoiser."),),
)
