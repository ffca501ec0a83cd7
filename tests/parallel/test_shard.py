"""Whole models on a mesh against the same models on one device in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import on_ranks
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from reelstep.engine.models.byte_text import ByteTextEncoder, tokenize
from reelstep.engine.models.movie_gen import MovieGenTransformer
from reelstep.errors import BundleError, ConfigError, NotFound
from reelstep.parallel.mesh import Mesh, shares
from reelstep.parallel.rules import BYTE_TEXT, MOVIE_GEN, RULES, AttentionRule, Rules
from reelstep.parallel.shard import empty_weights, shard

CLOSE = 1e-5
"""Relative; float32 sums of another order differ by some 1e-7."""

MESHES = {1: [""], 2: ["cp=2", "tp=2", "cp=2,ring=2"], 4: ["cp=4", "tp=4", "cp=2,tp=2", "cp=4,ring=2", "cp=4,ring=4", "cp=2,ring=2,tp=2"]}
EIGHT = ["cp=8,ring=8", "cp=8,ring=2", "cp=4,ring=2,tp=2", "cp=2,ring=2,tp=4"]


def saved(module: nn.Module, folder: Path) -> tuple[nn.Module, Path]:
    """A module with weights that are all of consequence, in a file; and the module in float64."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    file = folder / f"{type(module).__name__}.safetensors"
    save_file(module.state_dict(), file)
    return module.double().eval(), file


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, int]:
    module, file = saved(MovieGenTransformer(on_ranks.DIT), tmp_path_factory.mktemp("dit"))
    with torch.no_grad():
        x, modulation, context = (value.double() for value in on_ranks.dit_inputs(2))
        return file, module(x, modulation, None, context).numpy(), sum(p.numel() for p in module.parameters())


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_transformer_is_the_same_on_every_mesh(world: Any, dit: Any, ranks: int) -> None:
    check(world, dit, ranks, MESHES[ranks])


@pytest.mark.slow
def test_the_transformer_is_the_same_on_eight_ranks(world_of_eight: Any, dit: Any) -> None:
    with pytest.raises(AssertionError, match="5 attention heads cannot be split over 8 ranks"):
        check(world_of_eight, dit, 8, ["cp=8"])
    check(world_of_eight, dit, 8, EIGHT)


def check(world: Any, dit: Any, ranks: int, meshes: list[str]) -> None:
    file, wanted, _ = dit
    cases = [(mesh, text) for mesh in meshes for text in ((None, "cp") if Mesh.parse(mesh).cp > 1 and Mesh.parse(mesh).cp <= on_ranks.TEXT else (None,))]
    for rank, answers in enumerate(world.run(ranks, on_ranks.dit, file, cases)):
        for case, (velocity, _, _) in zip(cases, answers, strict=True):
            assert error(velocity, wanted) < CLOSE, (case, rank)


def test_tensor_parallel_ranks_hold_their_part_and_send_what_the_formula_says(world: Any, dit: Any) -> None:
    file, _, total = dit
    config, tokens, rows = on_ranks.DIT, 27, 2
    width, k = config.width, config.width // config.heads
    for rank, [(_, sent, held)] in enumerate(world.run(4, on_ranks.dit, file, [("tp=4", None)])):
        heads, ffn = shares(config.heads, 4, "")[rank], shares(config.ffn, 4, "")[rank]
        split = config.layers * (8 * width * k * (config.heads - heads) + 3 * width * (config.ffn - ffn))
        assert held == total - split
        reduces = 3 * config.layers  # behind two attentions and the FFN of each layer
        assert sent == {("all_reduce", "tp"): reduces * (2 * 3 * rows * tokens * width * 4 // 4)}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_text_encoder_is_the_same(world: Any, tmp_path: Path, ranks: int) -> None:
    module, file = saved(ByteTextEncoder(on_ranks.BYTES), tmp_path)
    tokens = [tokenize(text, on_ranks.BYTES.length) for text in ("a heart", "")]
    with torch.no_grad():
        wanted = module(torch.tensor(tokens)).numpy()
    for found in world.run(ranks, on_ranks.text_encoder, file, f"tp={ranks}", tokens):
        assert error(found, wanted) < CLOSE


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_joint_of_text_and_image_with_norms_over_the_width_and_biases(world: Any, tmp_path: Path, ranks: int) -> None:
    module, file = saved(on_ranks.Joint(), tmp_path)
    random = np.random.default_rng(0)
    image, text = (random.standard_normal((2, n, 24)).astype(np.float32) for n in (11, 5))
    with torch.no_grad():
        wanted = module(torch.from_numpy(image).double(), torch.from_numpy(text).double())
    meshes = {2: ["cp=2", "cp=2,ring=2", "tp=2"], 4: ["cp=4", "cp=2,tp=2", "tp=4"]}[ranks]
    for answers in world.run(ranks, on_ranks.joint, file, meshes, image, text):
        for mesh, outputs in zip(meshes, answers, strict=True):
            for found, truth in zip(outputs, wanted, strict=True):
                assert error(found, truth.numpy()) < CLOSE, mesh


class OneRank:
    """A communicator of no process group, for what is refused before any link is used."""

    def __init__(self, mesh: str) -> None:
        self.mesh, self.rank = Mesh.parse(mesh), 0
        self.at = self.mesh.coordinates(0)

    def size(self, axis: Any) -> int:
        return self.mesh.size(axis)


def empty(build: type[nn.Module], *args: Any) -> nn.Module:
    with empty_weights():
        return build(*args)


def test_weights_built_empty_cost_nothing_and_keep_their_buffers() -> None:
    module = empty(MovieGenTransformer, on_ranks.DIT)
    assert all(p.is_meta for p in module.parameters())
    assert torch.equal(module.time.frequencies, MovieGenTransformer(on_ranks.DIT).time.frequencies)
    assert not any(p.is_meta for p in nn.Linear(2, 2).parameters()), "only inside"


def test_a_mesh_that_is_too_large_and_a_file_of_another_model_are_named(dit: Any, tmp_path: Path) -> None:
    file, *_ = dit
    with pytest.raises(ConfigError, match="5 heads cannot be split over 8 ranks, at least 1 for each; use at most 5"):
        shard(empty(MovieGenTransformer, on_ranks.DIT), MOVIE_GEN, OneRank("tp=8"), file)
    with pytest.raises(ConfigError, match="another family's table"):
        shard(empty(ByteTextEncoder, on_ranks.BYTES), MOVIE_GEN, OneRank(""), file)
    with pytest.raises(BundleError, match=r"has no position, embedding\.weight"):
        shard(empty(ByteTextEncoder, on_ranks.BYTES), BYTE_TEXT, OneRank(""), file)
    save_file({name: torch.zeros(3) for name in ByteTextEncoder(on_ranks.BYTES).state_dict()}, tmp_path / "small.safetensors")
    with pytest.raises(BundleError, match=r"position has shape \[3\]; the module's is \[12, 40\]"):
        shard(empty(ByteTextEncoder, on_ranks.BYTES), BYTE_TEXT, OneRank(""), tmp_path / "small.safetensors")
    with torch.device("meta"):
        bare = MovieGenTransformer(on_ranks.DIT)
    with pytest.raises(ConfigError, match=r"'time\.frequencies' is on the meta device"):
        shard(bare, MOVIE_GEN, OneRank(""), file)


def rules(**changes: Any) -> Rules:
    nothing: dict[str, Any] = {"attributes": {}, "inputs": {}, "made": {}, "outputs": {}, "attention": {}}
    return Rules(**{"axes": {"out": "tp", "in": "tp"}, "parameters": {"**": ()}, **nothing, **changes})


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (rules(parameters={"weight": ()}), "'bias' is named by no pattern"),
        (rules(parameters={"**": (), "weight": ()}), r"'weight' is named by 2 patterns"),
        (rules(parameters={"weight": ("out",), "bias": ()}), "one axis per dim"),
        (rules(parameters={"weight": ("out", "in"), "bias": ()}), "by column or by row, not both"),
        (rules(parameters={"weight": ("out", ""), "bias": ()}), "give both the same axis"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(tmp_path: Path, table: Rules, words: str) -> None:
    save_file({"0.weight": torch.zeros(4, 4), "0.bias": torch.zeros(4)}, tmp_path / "w.safetensors")
    prefixed = {f"0.{pattern}" if pattern != "**" else pattern: axes for pattern, axes in table.parameters.items()}
    with pytest.raises(ConfigError, match=words.replace("'bias'", "'0.bias'").replace("'weight'", "'0.weight'")):
        shard(empty(nn.Sequential, nn.Linear(4, 4)), rules(parameters=prefixed), OneRank("tp=2"), tmp_path / "w.safetensors")


def test_logical_axes_are_checked_where_they_are_written() -> None:
    with pytest.raises(NotFound, match="unknown logical axis 'width'; known: in, out"):
        rules(parameters={"**": ("width",)})
    with pytest.raises(NotFound, match="known: ffn, heads, sequence, text"):
        MOVIE_GEN.on(width="tp")
    assert [name for name in RULES if not isinstance(RULES[name], Rules)] == []


def test_a_joined_sequence_is_split_as_a_whole(dit: Any) -> None:
    table = Rules(**{**vars(MOVIE_GEN), "attention": {"blocks.*.self_attention": AttentionRule(("sequence", "text"), ("sequence", "text"), "context")}})
    with pytest.raises(ConfigError, match="joins sequence and text, of which only some are split"):
        shard(empty(MovieGenTransformer, on_ranks.DIT), table, OneRank("cp=2"), dit[0])
