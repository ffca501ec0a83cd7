"""Adapters on a mesh: every row is what the network with its own changed weights gives on one device in float64, and nothing more is sent."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import on_ranks
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reelstep.compiler.lora import Layout, layers_of
from reelstep.compiler.part import Part
from reelstep.compiler.program import Program
from reelstep.compiler.sharded import plan_ranks
from reelstep.engine.lora import pack, read_adapter
from reelstep.engine.models.movie_gen import MovieGenConfig, MovieGenTransformer
from reelstep.parallel.mesh import Mesh

CLOSE = 1e-5
"""Relative; float32 sums of another order differ by some 1e-7."""
MESHES = {1: [""], 2: ["tp=2", "cp=2", "cp=2,ring=2", "cfg=2"], 4: ["tp=4", "cp=2,tp=2", "cp=2,ring=2,tp=2", "cp=4,ring=2", "cfg=2,tp=2"]}
ALPHA, RANKS = 3.0, (2, 1)
"""Of two adapters."""
BLENDS = (((0, 0.5),), ((0, -0.7), (1, 1.2)), ())
"""Of each row: adapters and their strengths. The last has none."""

Matrices = dict[str, tuple[Tensor, Tensor]]
"""A [r, inputs] and B [outputs, r] by layer."""


@dataclass(frozen=True)
class Case:
    """A module in float64 with its weights in a file, and adapters of it, packed for the rows of `BLENDS`."""

    module: nn.Module
    file: Path
    matrices: tuple[Matrices, ...]
    layout: Layout
    packed: np.ndarray

    def row(self, blend: tuple[tuple[int, float], ...]) -> nn.Module:
        """The module with W + s (alpha / r) B A for each of the adapters."""
        made = copy.deepcopy(self.module)
        for number, strength in blend:
            for name, (a, b) in self.matrices[number].items():
                made.get_submodule(name).weight.data += strength * ALPHA / RANKS[number] * b.double() @ a.double()  # type: ignore[operator, union-attr]  # a layer
        return made

    @torch.no_grad()
    def wanted(self, *inputs: Tensor | None) -> list[np.ndarray]:
        """Each output of the module for inputs [B, ...], row by row; the first is of B rows. Every adapter changes what it is added to."""
        assert inputs[0] is not None
        rows = []
        for number, blend in enumerate(BLENDS[: len(inputs[0])]):
            given = [None if x is None else x[number, None].double() for x in inputs]
            outputs, base = (y if isinstance(y, tuple) else (y,) for y in (self.row(blend)(*given), self.module(*given)))
            assert bool(blend) == all((y - z).norm() > 0.05 * z.norm() for y, z in zip(outputs, base, strict=True))
            rows.append(outputs)
        return [torch.cat(output).numpy() for output in zip(*rows, strict=True)]


def blocks_of(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and name.startswith("blocks.")}


def made(module: nn.Module, linears: Mapping[str, nn.Linear], folder: Path) -> Case:
    """linears: those that are adapted. The second adapter leaves out every other of them."""
    g = torch.Generator().manual_seed(0)
    layers, matrices = layers_of(linears), list[Matrices]()
    save_file(module.state_dict(), folder / "module.safetensors")
    for number, rank in enumerate(RANKS):
        adapted = layers[:: number + 1]
        matrices.append(
            {each.name: (0.3 * torch.randn(rank, each.inputs, generator=g), 0.3 * torch.randn(each.outputs, rank, generator=g)) for each in adapted}
        )
        tensors = {f"{name}.lora_{letter}.weight": m for name, pair in matrices[-1].items() for letter, m in zip("AB", pair, strict=True)}
        save_file(tensors | {f"{name}.alpha": torch.tensor(ALPHA) for name in matrices[-1]}, folder / f"{number}.safetensors")
    adapters = [read_adapter(folder / f"{number}.safetensors", "toy", layers) for number in range(len(RANKS))]
    layout = Layout(sum(RANKS), layers)
    packed = torch.cat([pack(layout, [(adapters[number], strength) for number, strength in blend]) for blend in BLENDS])
    return Case(module.double().eval(), folder / "module.safetensors", tuple(matrices), layout, packed.numpy())


def made_dit(config: MovieGenConfig, folder: Path) -> Case:
    torch.manual_seed(0)
    module = MovieGenTransformer(config)
    return made(module, blocks_of(module), folder)


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return made_dit(on_ranks.DIT, tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return made_dit(on_ranks.SHALLOW, tmp_path_factory.mktemp("shallow"))


def velocities(case: Case, rows: int = len(BLENDS)) -> np.ndarray:
    x, modulation, context = on_ranks.dit_inputs(rows)
    return case.wanted(x, modulation, None, context)[0]


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Of the row that is farthest off."""
    return max(float(np.linalg.norm(y - z) / np.linalg.norm(z)) for y, z in zip(found, wanted, strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rows_of_different_adapters_are_the_same_on_every_mesh_and_nothing_more_is_sent(world: Any, dit: Case, ranks: int) -> None:
    wanted = velocities(dit)
    for rank, answers in enumerate(world.run(ranks, on_ranks.adapted_dit, dit.file, MESHES[ranks], dit.layout, dit.packed)):
        for mesh, (velocity, sent, without) in zip(MESHES[ranks], answers, strict=True):
            assert error(velocity, wanted) < CLOSE, (mesh, rank)
            assert sent == without, (mesh, rank)


@pytest.mark.parametrize("ranks", [2, 4])
def test_fused_projections_and_biases_are_met_as_the_weights_are(world: Any, tmp_path: Path, ranks: int) -> None:
    torch.manual_seed(0)
    module = on_ranks.Joint()
    case = made(module, {name: layer for name, layer in module.named_children() if isinstance(layer, nn.Linear)}, tmp_path)
    image, text = (torch.randn(len(BLENDS), length, 24) for length in (11, 5))
    wanted = case.wanted(image, text)
    meshes = {2: ["tp=2", "cp=2", "cp=2,ring=2"], 4: ["tp=4", "cp=2,tp=2"]}[ranks]
    for answers in world.run(ranks, on_ranks.adapted_joint, case.file, meshes, image.numpy(), text.numpy(), case.layout, case.packed):
        for mesh, outputs in zip(meshes, answers, strict=True):
            assert max(map(error, outputs, wanted)) < CLOSE, mesh


@pytest.mark.parametrize(
    ("mesh", "backend", "rows", "collectives", "pieces"),
    [
        ("tp=2", "openvino", 3, ["all_reduce"] * 3, 1),
        ("tp=2", "eager", 3, ["all_reduce"] * 3, 4),
        ("cp=2,ring=2", "eager", 1, ["ring_attention", "all_gather_into_tensor"], 3),
    ],
)
def test_a_ranks_graph_with_adapters_has_the_collectives_of_a_layer_without_and_gives_the_same(
    world: Any, shallow: Case, mesh: str, backend: str, rows: int, collectives: list[str], pieces: int
) -> None:
    wanted = velocities(shallow, rows)
    for velocity, *found in world.run(2, on_ranks.adapted_graph, shallow.file, mesh, backend, shallow.layout, shallow.packed[:rows]):
        assert found == [collectives, pieces]
        assert error(velocity, wanted) < CLOSE


def thin_products(layout: Layout, tp: int, tokens: int) -> int:
    """FLOPs of one row's adapters where a rank of tp has so many tokens of the latent: x down and (x down) up, of which it has a part of one."""
    total = 0
    for name, inputs, outputs in layout.layers:
        is_row = name.endswith((".out", ".w2"))
        length = on_ranks.TEXT if name.endswith(("cross_attention.k", "cross_attention.v")) else tokens
        total += 2 * length * layout.rank * (inputs // (tp if is_row else 1) + outputs // (1 if is_row else tp))
    return total


def build_even() -> MovieGenTransformer:
    """What tp divides: its ranks are alike."""
    return MovieGenTransformer(replace(on_ranks.SHALLOW, heads=4, ffn=24))


def of_two_rows(module: MovieGenTransformer) -> tuple[Program, ...]:
    return (on_ranks.dit_program(module, 2)[0],)


@pytest.mark.parametrize(("mesh", "tokens"), [("tp=2", [27]), ("cp=2", [14, 13])])
def test_a_plan_of_ranks_has_both_programs_on_the_same_weights(mesh: str, tokens: list[int]) -> None:
    on, layout = Mesh.parse(mesh), Layout(2, layers_of(blocks_of(build_even())))
    part = Part(f"{__name__}:build_even", f"{__name__}:of_two_rows", rules="movie-gen", prefix="")
    for group, length in zip(plan_ranks([part], on, "float32", lora=layout), tokens, strict=True):
        plain, adapted = group.programs
        assert (plain.program, adapted.program) == ("denoise", "denoise_lora")
        assert (adapted.sent, adapted.max_batch, adapted.parameters) == (plain.sent, plain.max_batch, plain.parameters)
        assert group.weight_bytes == 4 * plain.parameters
        assert adapted.flops - plain.flops == thin_products(layout, on.tp, length)
