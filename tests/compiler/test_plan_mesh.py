"""What a mesh's plan says of its ranks, against closed forms and against what every rank calls by itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reelstep import __main__ as cli
from reelstep.compiler.backends.tensorrt import NOT_RUN
from reelstep.compiler.compile import capture_all, compile_model, make_plan
from reelstep.compiler.describe import describe, describe_json
from reelstep.compiler.load import check_mesh, load
from reelstep.compiler.part import Part
from reelstep.compiler.plan import Plan, ProgramPlan, RankPlan, Sent, spans
from reelstep.compiler.program import Profile, Program
from reelstep.compiler.sharded import check_even, plan_ranks
from reelstep.compiler.signature import Signature
from reelstep.compiler.skus import SKUS
from reelstep.engine.executors.on_mesh import ranks_of
from reelstep.engine.models.movie_gen import MovieGenConfig, MovieGenTransformer, denoise_program, time_program
from reelstep.engine.models.reel_tiny import WEIGHTS
from reelstep.errors import CompileError, ConfigError
from reelstep.parallel.mesh import Mesh
from reelstep.parallel.pretend import pretended_rank
from reelstep.parallel.rules import MOVIE_GEN
from reelstep.parallel.shard import shard

UNEVEN = MovieGenConfig(
    layers=1, width=40, ffn=22, heads=5, latent_channels=4, condition_channels=0, patch=(1, 2, 2), positions=(4, 4, 4), text_widths=(10,),
    time_frequencies=8, time_scale=1.0, qk_norm=True,
)  # fmt: skip
EVEN = replace(UNEVEN, ffn=24, heads=4)
TEXT = 7


def build_uneven() -> MovieGenTransformer:
    return MovieGenTransformer(UNEVEN)


def build_even() -> MovieGenTransformer:
    return MovieGenTransformer(EVEN)


def build_seven() -> MovieGenTransformer:
    return MovieGenTransformer(replace(EVEN, width=56, heads=7))


def odd_programs(module: MovieGenTransformer) -> tuple[Program, ...]:
    return (denoise_program(module, TEXT, [Profile("p", {"F": 3, "H": 6, "W": 6}, 2)]),)  # 27 tokens, which divide by no number of ranks here


def even_programs(module: MovieGenTransformer) -> tuple[Program, ...]:
    return (denoise_program(module, TEXT, [Profile("p", {"F": 4, "H": 4, "W": 4}, 2)]),)


def with_time(module: MovieGenTransformer) -> tuple[Program, ...]:
    (program,) = even_programs(module)
    return replace(program, profiles=(*program.profiles, Profile("q", {"F": 2, "H": 4, "W": 4}, 2))), time_program(module, 8)


ODD_PART = Part(f"{__name__}:build_uneven", f"{__name__}:odd_programs", rules="movie-gen", prefix="")
EVEN_PART = Part(f"{__name__}:build_even", f"{__name__}:even_programs", rules="movie-gen", prefix="")


def denoise(group: RankPlan) -> ProgramPlan:
    assert group.programs[0].program == "denoise"
    return group.programs[0]


class Calls(TorchDispatchMode):
    """Every operator that is called, with the sizes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[tuple[int, ...], ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, out))
        self.seen.append((str(func), tuple(tuple(x.shape) for x in leaves if isinstance(x, Tensor))))
        return out


def calls_of(shared: Part, mesh: Mesh, rank: int) -> tuple[Any, ...]:
    """What a rank calls and sends in one forward without values."""
    with pretended_rank(mesh, rank) as comm, torch.device("meta"), torch.no_grad():
        (program,) = shared.programs_of(shard(shared.empty(), MOVIE_GEN, comm, None))
        inputs = [edge.zeros(1, "meta") for edge in Signature.of(program, program.profiles[0]).inputs]
        with Calls() as calls:
            program.module(*inputs)
        return tuple(calls.seen), tuple(sorted(comm.sent.items()))


@pytest.mark.parametrize("mesh", ["cp=2,tp=2", "cfg=2,cp=3"])
def test_ranks_are_alike_where_they_call_the_same_operators_on_the_same_sizes(mesh: str) -> None:
    on = Mesh.parse(mesh)
    alike: dict[Any, list[int]] = {}
    for rank in range(on.world):
        alike.setdefault(calls_of(ODD_PART, on, rank), []).append(rank)
    assert sorted(group.ranks for group in plan_ranks([ODD_PART], on, "float32")) == sorted(map(tuple, alike.values()))


def test_a_ring_rank_differs_by_its_part_and_by_the_one_that_it_never_sends() -> None:
    groups = plan_ranks([ODD_PART], Mesh.parse("cp=4,ring=4"), "float32")  # 7, 7, 7 and 6 tokens
    assert [group.ranks for group in groups] == [(0, 1), (2,), (3,)]
    token = 2 * UNEVEN.width * 4  # keys and values
    ring = [next(each.bytes for each in denoise(group).sent if each.axis == "ring") for group in groups]
    assert ring == [token * (27 - 7), token * (27 - 6), token * (27 - 7)]


def expected(mesh: Mesh, tokens: int) -> tuple[int, int, dict[tuple[str, str], int]]:
    """Parameters that `denoise` reads on one rank, its FLOPs and the bytes that it sends, where all divides."""
    d, f, n, cp, tp, u = EVEN.width, EVEN.ffn, EVEN.layers, mesh.cp, mesh.tp, mesh.ulysses
    edge = EVEN.latent_channels * 4  # values of a token
    matrices = n * (8 * d * d + 3 * d * f)
    whole = sum(p.numel() for p in MovieGenTransformer(EVEN).parameters()) - outside(MovieGenTransformer(EVEN))
    products = n * (6 * d * d + 3 * d * f) * tokens // (cp * tp) + n * 2 * d * d * TEXT // tp + 2 * tokens // cp * edge * d
    attention = n * 2 * tokens * (tokens + TEXT) * d // (cp * tp)
    mine = tokens // cp * d * 4  # bytes of this rank's tokens
    sent = {
        ("all_reduce", "tp"): 3 * n * 2 * mine * (tp - 1) // tp,
        ("all_to_all_single", "ulysses"): n * 4 * mine // tp * (u - 1) // u,
        ("ring_attention", "ring"): n * 2 * mine // (tp * u) * u * (mesh.ring - 1),
        ("all_gather_into_tensor", "cp"): (cp - 1) * tokens // cp * edge * 4,
    }
    return whole - matrices + matrices // tp, 2 * (products + attention), {key: count for key, count in sent.items() if count}


def outside(module: MovieGenTransformer) -> int:
    """Parameters of the programs for time and text."""
    return sum(p.numel() for p in (*module.time.parameters(), *module.text.parameters()))


@pytest.mark.parametrize("mesh", ["cp=4", "tp=2", "cp=2,tp=2", "cp=4,ring=4", "cfg=2,cp=4,ring=2"])
def test_what_divides_is_divided_and_what_is_sent_is_what_the_formulas_say(mesh: str) -> None:
    on = Mesh.parse(mesh)
    (group,) = plan_ranks([EVEN_PART], on, "bfloat16")
    assert group.ranks == tuple(range(on.world))
    program = denoise(group)
    assert program.max_batch == (1 if on.cp > 1 else 2), "rows stay dynamic where no exchange packs them"
    parameters, flops, sent = expected(on, tokens=16)
    assert (program.parameters, program.flops) == (parameters, flops)
    assert {(each.op, each.axis): each.bytes for each in program.sent} == sent
    assert group.weight_bytes == 2 * parameters


def test_what_stays_in_float32_weighs_twice_and_what_two_profiles_share_once() -> None:
    (group,) = plan_ranks([replace(EVEN_PART, programs=f"{__name__}:with_time")], Mesh.parse("cp=2"), "bfloat16")
    assert [(p.program, p.profile, p.precision) for p in group.programs] == [
        ("denoise", "p", "bfloat16"), ("denoise", "q", "bfloat16"), ("embed_time", "any", "float32"),
    ]  # fmt: skip
    model = MovieGenTransformer(EVEN)
    time = sum(x.numel() for x in (*model.time.parameters(), *model.time.buffers()))
    read = sum(p.numel() for p in model.parameters()) - outside(model)
    assert group.weight_bytes == 2 * read + 4 * time


def test_a_rank_with_weights_would_capture_the_same(tmp_path: Path) -> None:
    module, mesh = MovieGenTransformer(EVEN), Mesh.parse("cp=2,tp=2")
    save_file(module.state_dict(), tmp_path / "w.safetensors")
    (group,) = plan_ranks([EVEN_PART], mesh, "float32")
    with pretended_rank(mesh, 0) as comm:
        (program,) = EVEN_PART.programs_of(shard(EVEN_PART.empty(), MOVIE_GEN, comm, tmp_path / "w.safetensors"))
        _, (draft,) = capture_all([replace(program, profiles=(replace(program.profiles[0], max_batch=1),))])
    planned = denoise(group)
    assert (planned.flops, planned.parameters, planned.max_batch) == (draft.flops, draft.parameters, draft.max_batch)
    # Where it moves what: torch's attention lays its output out otherwise on a CPU than without a device.
    moves = ("view", "clone", "permute", "transpose", "reshape")
    different = {op for op in {*planned.ops, *draft.ops} if planned.ops.get(op) != draft.ops.get(op)}
    assert [op for op in different if not any(move in op for move in moves)] == []


def test_a_mesh_that_is_too_large_and_a_process_that_is_a_rank_are_refused() -> None:
    with pytest.raises(ConfigError, match="5 heads cannot be split over 8 ranks"):
        plan_ranks([ODD_PART], Mesh.parse("tp=8"), "float32")
    with pretended_rank(Mesh.parse("tp=2"), 0), pytest.raises(ConfigError, match="this process is a rank of a replica"):
        plan_ranks([ODD_PART], Mesh.parse("tp=2"), "float32")
    assert not dist.is_initialized()


def test_shares_are_even_or_refused_before_any_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("reelstep.compiler.sharded.capture_all")
    uneven = r"program 'denoise' at profile 'p' on mesh cp=2: .* uneven shares, of 1,008 and 936 and 672 values, and backend 'tensorrt' exchanges even ones"
    with pytest.raises(ConfigError, match=uneven):
        check_even([ODD_PART], Mesh.parse("cp=2"), "tensorrt")  # 14 and 13 tokens by 3 and 2 heads of 8, for q, k and v
    with pytest.raises(ConfigError, match="uneven shares"):
        check_even([replace(EVEN_PART, build=f"{__name__}:build_seven")], Mesh.parse("cp=2,tp=2"), "tensorrt")  # rank 0 has 4 of 7 heads, the last 3
    for mesh in ("cp=2", "cp=4", "tp=3", "cp=2,tp=2"):
        check_even([EVEN_PART], Mesh.parse(mesh), "tensorrt")


@pytest.mark.parametrize(
    ("mesh", "backend", "text"),
    [
        ("cp=3", "tensorrt", "'denoise' at profile 'video' on mesh cp=3: ranks would exchange uneven shares"),
        ("cp=2,tp=3", "null", "mesh cp=2,tp=3 leaves 1 of the 4 heads of 'reel-tiny' to 2 ranks of cp, which need at least 1 each; use ring=2"),
    ],
)
def test_the_command_line_refuses_a_mesh_that_no_rank_could_run_before_the_work(
    mesh: str, backend: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reelstep.engine.build.hash_weights", lambda _: pytest.fail("work began"))
    assert cli.main(["compile", "reel-tiny", "--sku", "h100-sxm", "--backend", backend, "--mesh", mesh, "-o", str(tmp_path / "x.reel")]) == 2
    assert text in capsys.readouterr().err


def test_a_plan_of_a_mesh_survives_json_and_names_every_rank() -> None:
    groups = plan_ranks([ODD_PART], Mesh.parse("cp=2"), "float32")  # 14 and 13 tokens
    plan = replace(make_plan("m", "1", "null", SKUS["h200-sxm"], "float32", "asked for", ()), mesh=Mesh.parse("cp=2").axes, ranks=groups)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    text = plan.explain()
    assert "\nmesh cp=2\n" in text
    assert sorted(rank for group in plan.ranks for rank in group.ranks) == [0, 1]
    assert text.count("graph sha256") == 1, "the graph of rank 0 alone"
    for group in groups:
        assert f"ranks {spans(group.ranks)}" in text
        assert f"{group.weight_bytes:,} bytes" in text
        assert all(str(each) in text for each in denoise(group).sent)


def test_what_a_plan_does_not_have_is_not_in_its_json() -> None:
    plan = make_plan("m", "1", "null", SKUS["h200-sxm"], "float32", "asked for", ())
    assert not {"ranks", "kernels", "kernels_by"} & {*plan.to_json()}
    assert replace(plan, ranks=(RankPlan((0, 1), 8, ()),)).hash != plan.hash


def test_runs_of_ranks_are_written_short() -> None:
    assert spans((0, 1, 2, 5, 7, 8)) == "0-2, 5, 7-8"
    assert str(Sent("all_reduce", "tp", 3, 4096)) == "4,096 bytes by 3 all_reduce over tp"


def test_a_bundle_is_opened_on_its_mesh_and_on_no_other(tmp_path: Path, programs: tuple[Program, ...]) -> None:
    def compiled(mesh: str, backend: str) -> Any:
        return compile_model(
            model="toy", version="1", settings={}, programs=programs[1:], backend=backend, out=tmp_path / f"{mesh}{backend}.reel", solvers={}, card="",
            mesh=Mesh.parse(mesh) if mesh else None,
        )  # fmt: skip

    split, whole = compiled("cp=2,tp=2", "eager"), compiled("", "eager")
    assert (split.plan.precision, split.plan.precision_reason) == ("float32", "ranks on a CPU run it")
    assert split.plan.mesh == {"cp": 2, "tp": 2}
    check_mesh(split, Mesh.parse("tp=2,cp=2"))
    check_mesh(whole, Mesh.parse("cp=2"))
    here = r"was planned for mesh cp=2,tp=2, and is to be opened on {}\. Open it with `--mesh cp=2,tp=2`, or compile one for here: `reelstep compile toy{}`"
    with pytest.raises(CompileError, match=here.format("cp=4", " --mesh cp=4")):
        check_mesh(split, Mesh.parse("cp=4"))
    with pytest.raises(CompileError, match=here.format("cp=4", " --mesh cp=4")):
        ranks_of(split, Mesh.parse("cp=4"), tmp_path)
    for mesh in (None, Mesh.parse("")):
        with pytest.raises(CompileError, match=here.format("one device", "")):
            check_mesh(split, mesh)
    with pytest.raises(CompileError, match=here.format("one device", "")):
        load(split, None)
    assert load(split, None, backend="null")["lookup", "l4"].signature.program == "lookup", "nothing runs there"


def test_inspect_shows_the_ranks_and_what_nobody_has_run_on_hardware(tmp_path: Path, programs: tuple[Program, ...]) -> None:
    bundle = compile_model(
        model="toy", version="1", settings={}, programs=programs[1:], backend="tensorrt", sku="h200-sxm", out=tmp_path / "toy.reel", solvers={}, card="",
        mesh=Mesh.parse("cp=2"), ranks=(RankPlan((0, 1), 1234, ()),),
    )  # fmt: skip
    text, data = describe(bundle), json.loads(json.dumps(describe_json(bundle)))
    assert "planned for tensorrt on h200-sxm (sm90), bfloat16 (h200-sxm has native bfloat16), mesh cp=2\n" in text
    assert f"\n{NOT_RUN}\n" in text
    assert "\nranks 0-1, alike but for where their slices begin" in text
    assert (data["mesh"], data["ranks"], data["not_run"]) == ({"cp": 2}, [{"ranks": [0, 1], "weight_bytes": 1234, "programs": []}], NOT_RUN)


def test_the_command_line_refuses_a_model_that_does_not_say_how_it_is_sharded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compile", "dit-mid", "--mesh", "cp=2", "-o", str(tmp_path / "x.reel")]) == 2
    assert "model 'dit-mid' does not say how it is sharded; those that do: reel-tiny, movie-gen-30b" in capsys.readouterr().err
    assert cli.main(["compile", "reel-tiny", "--mesh", "cp=2", "--step-cache", "-o", str(tmp_path / "x.reel")]) == 2
    assert "--mesh cp=2 with --step-cache, whose programs no rank can share" in capsys.readouterr().err
    grey = str(WEIGHTS / "reel-tiny-grey-lora.safetensors")
    assert cli.main(["compile", "reel-tiny", "--mesh", "cp=2", "--lora", grey, "-o", str(tmp_path / "x.reel")]) == 2
    assert "--mesh cp=2 with --lora, which ranks know nothing of" in capsys.readouterr().err
    assert cli.main(["compile", "reel-tiny", "--mesh", "cp=2", "--precision", "bf16", "-o", str(tmp_path / "x.reel")]) != 0
    assert "bfloat16 on mesh cp=2 of cpu: ranks on a CPU run float32" in capsys.readouterr().err
