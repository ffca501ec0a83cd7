"""LoRA files: read in every spelling, refused with the key that is wrong, fused, packed, and run for requests that share batches."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reelstep.compiler.lora import Adapted, Layout, layers_of, with_lora
from reelstep.compiler.program import Profile
from reelstep.engine import build
from reelstep.engine.build import build_bundle
from reelstep.engine.executors.inline import Inline
from reelstep.engine.loop import BatchRecord, Engine, open_engine
from reelstep.engine.lora import Adapter, fuse, pack, read_adapter
from reelstep.engine.models import MODELS
from reelstep.engine.models.movie_gen import MovieGenConfig, MovieGenTransformer, denoise_program
from reelstep.engine.models.reel_tiny import adaptable
from reelstep.engine.models.spec import ModelSettings, ModelSpec
from reelstep.engine.request import Choice
from reelstep.engine.resolve import Ask, resolve
from reelstep.engine.runner import Runner
from reelstep.engine.served import ServedModel, read_loras
from reelstep.errors import ConfigError, InvalidRequest, NotFound, UnsupportedRequest
from reelstep.tests.engine.conftest import PROGRAMS, SETTINGS, TARGET, Heard, denoise, make_model, make_request

CONFIG = MovieGenConfig(
    layers=1, width=16, ffn=24, heads=2, latent_channels=3, condition_channels=0, patch=(1, 1, 1), positions=(2, 3, 3),
    text_widths=(8,), time_frequencies=8, time_scale=1000.0, qk_norm=True,
)  # fmt: skip
LAYERS = ("blocks.0.self_attention.q", "blocks.0.ffn.w2")
"""That files here adapt: a square layer and one that is not."""


def blocks_of(transformer: nn.Module) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear) and name.startswith("blocks.")}


@pytest.fixture
def transformer() -> MovieGenTransformer:
    torch.manual_seed(0)
    return MovieGenTransformer(CONFIG).eval()


@pytest.fixture
def layers(transformer: MovieGenTransformer):
    return layers_of(blocks_of(transformer))


SHAPES = {"blocks.0.self_attention.q": (16, 16), "blocks.0.ffn.w2": (24, 16)}


def matrices(rank: int = 2, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """A [r, inputs] and B [outputs, r] of each layer."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)) for name, (inputs, outputs) in SHAPES.items()
    }


def peft(pairs: Mapping[str, tuple[Tensor, Tensor]], prefix: str = "transformer.") -> dict[str, Tensor]:
    return {f"{prefix}{name}.lora_{letter}.weight": m for name, pair in pairs.items() for letter, m in zip("AB", pair, strict=True)}


def saved(folder: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None, name: str = "style") -> Path:
    file = folder / f"{name}.safetensors"
    save_file(dict(tensors), file, metadata)
    return file


def changes(adapter: Adapter) -> dict[str, Tensor]:
    """What is added to each weight, at strength 1."""
    return {name: (up.double() @ down.double()) for name, (down, up) in adapter.pairs.items()}


def kohya(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    flat = {f"lora_unet_{name.replace('.', '_')}": pair for name, pair in pairs.items()}
    return {f"{name}.lora_{part}.weight": m for name, pair in flat.items() for part, m in zip(("down", "up"), pair, strict=True)}


ALPHA = 6.0


@pytest.mark.parametrize(
    ("tensors", "factor"),
    [
        (peft(matrices()), 1.0),  # without alpha, alpha is the rank
        (peft(matrices(), ""), 1.0),
        (peft(matrices(), "diffusion_model."), 1.0),
        (peft(matrices()) | {f"transformer.{name}.alpha": torch.tensor(ALPHA) for name in LAYERS}, ALPHA / 2),
        (kohya(matrices()) | {f"lora_unet_{name.replace('.', '_')}.alpha": torch.tensor(ALPHA) for name in LAYERS}, ALPHA / 2),
        ({f"transformer.{n}.lora.{part}.weight": m for n, pair in matrices().items() for part, m in zip(("down", "up"), pair, strict=True)}, 1.0),
    ],
)
def test_every_spelling_means_the_same_pairs(tensors: dict[str, Tensor], factor: float, tmp_path: Path, layers) -> None:
    adapter = read_adapter(saved(tmp_path, tensors), "tiny", layers)
    assert adapter.rank == 2
    assert adapter.pairs.keys() == SHAPES.keys()
    for name, (a, b) in matrices().items():
        assert torch.allclose(changes(adapter)[name], factor * b.double() @ a.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("config", "factor"), [({"lora_alpha": 8, "r": 2}, 4.0), ({"lora_alpha": 8, "use_rslora": True}, 8 / 2**0.5), ({}, 1.0)])
@pytest.mark.parametrize("by", ["diffusers", "peft"])
def test_the_configuration_of_peft_scales_as_it_says(by: str, config: dict[str, object], factor: float, tmp_path: Path, layers) -> None:
    if by == "diffusers":
        metadata = {"format": "pt", "lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in config.items()})}
        file = saved(tmp_path, peft(matrices()), metadata)
    else:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        file = saved(tmp_path, peft(matrices(), "base_model.model."), {"format": "pt"}, "adapter_model")
    found = changes(read_adapter(file, "tiny", layers))
    for name, (a, b) in matrices().items():
        assert torch.allclose(found[name], factor * b.double() @ a.double(), rtol=1e-6, atol=1e-6)


def with_a(change: Tensor, name: str = LAYERS[0], letter: str = "A") -> dict[str, Tensor]:
    return peft(matrices()) | {f"transformer.{name}.lora_{letter}.weight": change}


DORA = {"lora_adapter_metadata": json.dumps({"transformer.use_dora": True})}
PATTERN = {"lora_adapter_metadata": json.dumps({"transformer.alpha_pattern": {"q": 3}})}
PISSA = {"lora_adapter_metadata": json.dumps({"transformer.init_lora_weights": "pissa_niter_16"})}


@pytest.mark.parametrize(
    ("tensors", "metadata", "says"),
    [
        ({}, None, r"no pair of matrices in it; a LoRA for 'tiny' has some for blocks\.\*\.self_attention\.q"),
        (peft({"blocks.7.ffn.w2": matrices()[LAYERS[1]]}), None, r"'transformer\.blocks\.7\.ffn\.w2\.lora_A\.weight' is no part .* blocks\.\*\.ffn\.w\*"),
        ({"text_encoder.q.lora_A.weight": torch.ones(2, 16)}, None, r"'text_encoder\.q\.lora_A\.weight' is no part of a LoRA for 'tiny'"),
        ({f"transformer.{LAYERS[0]}.lora_magnitude_vector": torch.ones(16)}, None, "lora_magnitude_vector' is no part"),
        ({f"transformer.{LAYERS[0]}.lora_A.weight": torch.ones(2, 16)}, None, rf"layer '{LAYERS[0]}' has transformer\.\S+ alone; a pair is A and B"),
        ({f"transformer.{LAYERS[0]}.alpha": torch.ones(())}, None, "alpha alone; a pair is A and B"),
        (with_a(torch.ones(2, 17)), None, r"lora_A\.weight' is \[2, 17\]; layer 'blocks\.0\.self_attention\.q' takes \[rank, 16\]"),
        (with_a(torch.ones(2, 16, 1, 1)), None, r"is \[2, 16, 1, 1\]; layer"),
        (with_a(torch.ones(3, 16)), None, r"lora_B\.weight' is \[16, 2\] beside \S+ of \[3, 16\]; layer \S+ takes \[16, rank\]"),
        (peft(matrices(17)), None, "a rank of 1 to 16"),
        (with_a(torch.full((2, 16), torch.nan)), None, r"blocks\.0\.self_attention\.q\.lora_A\.weight' holds numbers that are not finite"),
        (with_a(torch.full((16, 2), torch.inf), letter="B"), None, r"lora_B\.weight' holds numbers that are not finite"),
        (peft(matrices()) | {f"{LAYERS[0]}.lora_A.weight": torch.ones(2, 16)}, None, "are one and the same; leave one out"),
        (peft(matrices()) | {f"{LAYERS[0]}.alpha": torch.ones(2)}, None, "alpha' has 2 numbers; an alpha is one"),
        (peft(matrices()), {"base_model": "other"}, r"trained on 'other' and this is 'tiny'"),
        (peft(matrices()), DORA, "trained with use_dora, which is not done here"),
        (peft(matrices()), PATTERN, "trained with alpha_pattern"),
        (peft(matrices()), PISSA, "began with init_lora_weights 'pissa_niter_16', which changes the model's own weights as well"),
        (peft(matrices(), "base_model.model."), None, r"PEFT keeps alpha in adapter_config\.json, and there is none beside it"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_with_its_name_and_what_is_wrong(tensors, metadata, says: str, tmp_path: Path, layers) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        read_adapter(saved(tmp_path, tensors, metadata), "tiny", layers)
    assert "style.safetensors: " in str(caught.value)


def test_what_is_no_safetensors_file_is_refused_and_never_unpickled(tmp_path: Path, layers) -> None:
    pickled = tmp_path / "style.bin"
    torch.save(peft(matrices()), pickled)
    for file in (pickled, tmp_path / "gone.safetensors", tmp_path):
        with pytest.raises(ConfigError, match=file.name):
            read_adapter(file, "tiny", layers)


def test_the_file_is_known_by_its_hash_and_may_name_its_model(tmp_path: Path, layers) -> None:
    file = saved(tmp_path, peft(matrices()), {"base_model": "tiny"})
    adapter = read_adapter(file, "tiny", layers)
    assert adapter.base == "tiny"
    assert len(bytes.fromhex(adapter.digest)) == 32
    assert adapter.digest != read_adapter(saved(tmp_path, peft(matrices(seed=1)), name="other"), "tiny", layers).digest


@pytest.fixture
def adapters(tmp_path: Path, layers) -> list[Adapter]:
    """Of ranks 2 and 1."""
    return [read_adapter(saved(tmp_path, peft(matrices(rank, seed)), name=f"a{rank}"), "tiny", layers) for rank, seed in ((2, 0), (1, 5))]


def test_fused_weights_are_float64_arithmetic_rounded_once(transformer: MovieGenTransformer, adapters: list[Adapter]) -> None:
    before = {name: p.detach().numpy().astype(np.float64) for name, p in transformer.named_parameters()}
    fuse(blocks_of(transformer), [(adapters[0], 0.75), (adapters[1], -1.5)])
    for name, weight in transformer.named_parameters():
        layer = name.removesuffix(".weight")
        added = np.zeros(())
        if layer in SHAPES:
            for strength, (a, b) in ((0.75, matrices(2, 0)[layer]), (-1.5, matrices(1, 5)[layer])):
                added = added + strength * b.numpy().astype(np.float64) @ a.numpy().astype(np.float64)
        assert np.array_equal(weight.detach().numpy(), (before[name] + added).astype(np.float32)), name


def test_a_model_without_weights_cannot_be_fused_into(adapters: list[Adapter]) -> None:
    with torch.device("meta"):
        empty = MovieGenTransformer(CONFIG)
    with pytest.raises(ConfigError, match="without weights; compile it without --lora"):
        fuse(blocks_of(empty), [(adapters[0], 1.0)])


def test_a_lora_that_overflows_what_it_is_fused_into_changes_nothing(transformer: MovieGenTransformer, adapters: list[Adapter]) -> None:
    before = {name: weight.detach().clone() for name, weight in transformer.named_parameters()}
    with pytest.raises(ConfigError, match=r"with the LoRAs fused, \S+ holds numbers that float32 does not; look at the files"):
        fuse(blocks_of(transformer), [(adapters[0], 1e39)])
    assert all(torch.equal(weight, before[name]) for name, weight in transformer.named_parameters())


def inputs(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = {"x": (rows, 3, 2, 3, 3), "modulation": (rows, 7, 16), "context": (rows, 4, 16)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@torch.no_grad()
def test_a_batch_of_different_adapters_is_each_network_with_its_fused_weights(transformer: MovieGenTransformer, adapters: list[Adapter], layers) -> None:
    layout = Layout(4, layers)
    program = with_lora(denoise_program(transformer, 4, (Profile("video", {"F": 2, "H": 3, "W": 3}, 4),)), blocks_of(transformer), layout)
    blends = [[(adapters[0], 1.0)], [(adapters[1], 0.5)], [(adapters[0], -0.5), (adapters[1], 2.0)], []]
    given = inputs(len(blends))
    found = program.module(*given.values(), torch.cat([pack(layout, blend) for blend in blends]))
    for row, blend in enumerate(blends):
        other = copy.deepcopy(transformer)
        fuse(blocks_of(other), blend)
        expected = other(given["x"][row, None], given["modulation"][row, None], None, given["context"][row, None])
        assert torch.linalg.vector_norm(found[row] - expected[0]) <= 1e-5 * torch.linalg.vector_norm(expected)
        base = transformer(given["x"][row, None], given["modulation"][row, None], None, given["context"][row, None])
        assert bool(blend) == (torch.linalg.vector_norm(expected - base) > 1e-2 * torch.linalg.vector_norm(base)), "the adapters change something"


@torch.no_grad()
def test_the_shipped_model_runs_two_adapters_in_one_batch() -> None:
    model = MODELS["reel-tiny"].build()
    linears = adaptable(model)
    layout = Layout(2, layers_of(linears))
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, layout.numbers, generator=generator) * 0.05
    x, condition = (torch.randn(2, 16, 1, 8, 8, generator=generator) for _ in range(2))
    modulation, context = torch.randn(2, 7, 256, generator=generator), torch.randn(2, 128, 256, generator=generator)
    found = Adapted(model.denoiser, linears, layout)(x, modulation, condition, context, packed)
    for row in range(2):
        other = copy.deepcopy(model.denoiser)
        for layer, (down, up) in zip(blocks_of(other).values(), layout.pairs(packed[row, None]), strict=True):
            layer.weight += (down[0] @ up[0]).T
        expected = other(x[row, None], modulation[row, None], condition[row, None], context[row, None])
        assert torch.linalg.vector_norm(found[row] - expected[0]) <= 1e-5 * torch.linalg.vector_norm(expected)
    assert len(layout.layers) == 6 * 11


def served_with(tmp_path: Path, rank: int = 3) -> ServedModel:
    """The closed-form model with two adapters of its only layer, of ranks 2 and 1, that move its target; `denoise_lora` reads what was packed."""
    layer = nn.Linear(3, 3)
    settings = replace(SETTINGS, lora=Layout(rank, layers_of({"blocks.0.q": layer})))
    files = {}
    for name, adapter_rank in (("two", 2), ("one", 1)):
        ones = {"blocks.0.q.lora_A.weight": torch.ones(adapter_rank, 3), "blocks.0.q.lora_B.weight": torch.ones(3, adapter_rank)}
        files[name] = saved(tmp_path, ones, name=name)
    return replace(make_model(), settings=settings, loras=read_loras("toy", settings, files))


def moved(settings: ModelSettings):
    """`denoise` whose target moves by the first entry of the change: strength times rank of the adapters here."""

    def denoise_lora(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert settings.lora is not None
        ((down, up),) = settings.lora.pairs(given["lora"])
        shift = (down[:, :1] @ up[:, :, :1])[:, :, :, None, None]
        return denoise({**{k: v for k, v in given.items() if k != "lora"}, "condition": given["condition"] + shift})

    return denoise_lora


@pytest.fixture
def lora_engine(tmp_path: Path):
    served, batches = served_with(tmp_path), list[BatchRecord]()
    programs = PROGRAMS | {("denoise_lora", profile): moved(served.settings) for profile in ("video", "image")}
    engine = Engine({"toy": served}, Inline({"toy": Runner(programs, dict.fromkeys(programs, 8))}), on_batch=batches.append)
    yield engine, batches
    engine.close(0)


def test_requests_with_different_adapters_share_batches_and_those_without_run_the_plain_program(lora_engine) -> None:
    engine, batches = lora_engine
    asked = [{"two": 0.125}, {"one": -0.25}, {"two": 0.0625, "one": 0.125}, {}, {"two": 0.0}]
    heard = [Heard() for _ in asked]
    for lora, listener in zip(asked, heard, strict=True):
        engine.submit(make_request(scale=1.0, steps=6, lora=lora), listener)
    for expected, listener in zip((0.25, -0.25, 0.25, 0.0, 0.0), heard, strict=True):
        end = listener.result()
        assert np.all(end.media.frames == round((TARGET + expected + 1) * 127.5)), "the exact solution is the target, moved by strength times rank"
        assert ("denoise_lora" in end.usage.compute_s) == (expected != 0)
        assert ("denoise" in end.usage.compute_s) == (expected == 0), "strength 0 is the plain program"
    assert max(record.calls for record in batches if record.key[1] == "denoise_lora") > 1


def test_both_branches_of_guidance_are_adapted(lora_engine) -> None:
    engine, _ = lora_engine
    heard = [Heard(), Heard()]
    for lora, listener in zip(({}, {"two": 0.125}), heard, strict=True):
        engine.submit(make_request(scale=1.25, lora=lora), listener)
    base, adapted = (int(np.unique(listener.result().media.frames).item()) for listener in heard)
    # x1 = null + s (text - null): moved by 0.25 where both branches are, by 1.25 times that or less otherwise
    assert adapted - base in (round(0.25 * 127.5), round(0.25 * 127.5) - 1, round(0.25 * 127.5) + 1)


def asks(served: ServedModel, **asked: object):
    return resolve(Ask("a fox", frames=8, **asked), {"toy": served})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"lora": {"two": 1.0, "one": 1.0}}, r"lora: rank 2 of 'two' \+ 1 of 'one', where this bundle takes 2; use fewer, or compile with --lora-rank 3"),
        ({"lora": {"two": 10.5}}, r"lora: 'two': strength 10\.5 is not in -10\.\.10"),
        ({"lora": {"two": float("nan")}}, "strength nan is not in"),
        ({"lora": {"two": 1.0}, "solver": "bns_2"}, r"lora: 'bns_2', fitted to 'toy' without a LoRA; .* such as solver 'euler' with guidance 'cfg'"),
        ({"lora": {"two": 1.0}, "guidance": "linear_4"}, "lora: 'linear_4', fitted to 'toy' without a LoRA"),
        ({"lora": {"two": 1.0}, "quality": "draft"}, r"quality 'draft' names 'bns_2', fitted to 'toy' without a LoRA; choose what needs no fit"),
        ({"lora": {"two": 1.0}, "step_cache": "first_block"}, "step cache 'first_block' runs the network in pieces, which take no LoRA"),
    ],
)
def test_what_does_not_go_with_a_lora_is_refused_before_it_runs(asked: dict[str, object], says: str, tmp_path: Path) -> None:
    served = served_with(tmp_path, rank=2)
    draft = Choice(solver="bns_2", forwards=4.0, psnr_db=30.0, ssim=0.9, frechet=None, command="a bench")
    defaults = {task: replace(d, menu={"draft": draft}) for task, d in served.settings.defaults.items()}
    served = replace(served, settings=replace(served.settings, defaults=defaults))
    with pytest.raises(InvalidRequest, match=says):
        asks(served, **asked)
    without = {**asked, "lora": dict.fromkeys(asked["lora"], 0.0)}  # type: ignore[call-overload]
    assert not served.lora(asks(served, **without)), "at strength 0 everything goes"


def test_an_unknown_lora_is_refused_with_the_names_there_are(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="unknown LoRA 'tow'; known: one, two"):
        asks(served_with(tmp_path), lora={"tow": 1.0})
    with pytest.raises(UnsupportedRequest, match=r"compiled to take no LoRA; .* --lora-rank"):
        asks(make_model(), lora={"two": 1.0})


@pytest.mark.parametrize(
    ("rank", "says"), [(1, r"rank 2 of 'two', where this bundle takes 1; .*--lora-rank 2"), (None, r"takes no LoRA \(two, one\); compile it")]
)
def test_a_bundle_that_cannot_take_a_file_says_how_to_compile_one_that_can(rank: int | None, says: str, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.safetensors" for name in ("two", "one")}
    served = served_with(tmp_path)
    settings = replace(served.settings, lora=Layout(rank, served.settings.lora.layers) if rank and served.settings.lora else None)
    with pytest.raises(ConfigError, match=says):
        read_loras("toy", settings, files)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
    """A registered model of one block without tasks, of which two layers are adapted."""

    def made() -> MovieGenTransformer:
        torch.manual_seed(0)
        return MovieGenTransformer(CONFIG)

    def programs(module: nn.Module):
        assert isinstance(module, MovieGenTransformer)
        return (denoise_program(module, 4, (Profile("video", {"F": 2, "H": 3, "W": 3}, 4),)),)

    def adaptable(module: nn.Module) -> dict[str, nn.Linear]:
        return {name: layer for name, layer in blocks_of(module).items() if name in SHAPES}

    spec = ModelSpec("tiny", "1", replace(SETTINGS, tasks=(), defaults={}), made, programs, None, adaptable=adaptable)
    monkeypatch.setattr(build, "MODELS", {"tiny": spec})
    return spec


@torch.no_grad()
def test_a_fused_bundle_runs_the_changed_weights_and_says_so(small: ModelSpec, tmp_path: Path) -> None:
    file, told = saved(tmp_path, peft(matrices())), list[str]()
    bundle = build_bundle(
        "tiny", backend="eager", precision=None, out=tmp_path / "fused.reel", cache=None, loras=[(file, 0.5)], progress=lambda stage, *_: told.append(stage)
    )  # fmt: skip
    other = small.build()
    for name, (a, b) in matrices().items():
        weight = other.get_parameter(f"{name}.weight")
        weight.copy_(weight.double() + 0.5 * b.double() @ a.double())
    given = inputs(2)
    found = bundle.program("denoise", "video").module()(*given.values())
    assert torch.allclose(found, other(given["x"], given["modulation"], None, given["context"]), rtol=1e-5, atol=1e-6)
    (fused,) = ModelSettings.from_json(bundle.settings).fused
    assert (fused.name, fused.strength, fused.rank, fused.layers) == ("style", 0.5, 2, 2)
    assert f"- style at strength 0.5, rank 2 in 2 layers, sha256 {fused.digest}" in bundle.model_card
    assert [stage for stage in told if stage.startswith("fused style at strength 0.5")]
    assert not [key for key in bundle.signatures if key[0] != "denoise"]


def test_one_adapter_is_fused_once(small: ModelSpec, tmp_path: Path) -> None:
    files = [saved(tmp_path, peft(matrices()), name=name) for name in ("style", "again")]
    for twice in (files, files[:1] * 2):
        with pytest.raises(ConfigError, match=rf"{twice[1].name} is the one of .*style\.safetensors; give it once, with the sum of both strengths"):
            build_bundle("tiny", backend="eager", precision=None, out=tmp_path / "fused.reel", cache=None, loras=[(file, 0.5) for file in twice])


@torch.no_grad()
def test_a_bundle_of_a_rank_runs_any_adapter_on_the_same_weights(small: ModelSpec, tmp_path: Path, adapters: list[Adapter]) -> None:
    bundle = build_bundle("tiny", backend="eager", precision=None, out=tmp_path / "ranked.reel", cache=None, lora_rank=3)
    stored = [{*bundle.manifest["programs"][program]["video"]["weights"].values()} for program in ("denoise", "denoise_lora")]
    assert stored[0] == stored[1] == bundle.tensors.keys(), "the second program brings no weights"
    layout = ModelSettings.from_json(bundle.settings).lora
    other = small.build()
    assert small.adaptable is not None
    assert layout == Layout(3, layers_of(small.adaptable(other)))
    fuse(blocks_of(other), [(adapters[0], 1.0), (adapters[1], 1.0)])
    given = inputs(2)
    packed = pack(layout, [(adapters[0], 1.0), (adapters[1], 1.0)]).expand(2, -1)
    found = bundle.program("denoise_lora", "video").module()(*given.values(), packed)
    assert torch.allclose(found, other(given["x"], given["modulation"], None, given["context"]), rtol=1e-5, atol=1e-5)


def test_what_a_model_cannot_take_is_refused_before_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec("bare", "1", SETTINGS, lambda: pytest.fail("was built"), lambda _: (), None)
    monkeypatch.setattr(build, "MODELS", {"bare": spec})
    with pytest.raises(ConfigError, match="'bare' names no layers that a LoRA may change"):
        build_bundle("bare", backend="null", precision=None, out=tmp_path / "x.reel", cache=None, lora_rank=4)


def test_loras_belong_to_one_bundle(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"LoRAs \(neon\) belong to one bundle"):
        open_engine([tmp_path / "a.reel", tmp_path / "b.reel"], cache=tmp_path, loras={"neon": tmp_path / "neon.safetensors"})


def test_a_file_of_peft_means_what_peft_computes(tmp_path: Path) -> None:
    library = pytest.importorskip("peft", reason="an independent reference")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    wrapped = library.get_peft_model(model, library.LoraConfig(r=2, lora_alpha=5, target_modules=["0", "1"], use_rslora=True, init_lora_weights=False))
    wrapped.save_pretrained(tmp_path)
    linears = {"0": nn.Linear(6, 8), "1": nn.Linear(8, 4)}
    for name, linear in linears.items():
        linear.load_state_dict(wrapped.base_model.model[int(name)].base_layer.state_dict())
    adapter = read_adapter(tmp_path / "adapter_model.safetensors", "tiny", layers_of(linears))
    fuse(linears, [(adapter, 1.0)])
    x = torch.randn(3, 6)
    with torch.no_grad():
        assert torch.allclose(nn.Sequential(*linears.values())(x), wrapped(x), rtol=1e-5, atol=1e-6)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == {f"base_model.model.{n}.lora_{x}.weight" for n in "01" for x in "AB"}
