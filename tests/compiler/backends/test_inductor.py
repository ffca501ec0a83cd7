"""AOTInductor for a GPU, as far as a CPU shows it: what it accepts, and the graph that it is handed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reelstep.compiler.backends.inductor import InductorBackend
from reelstep.compiler.capture import capture
from reelstep.compiler.passes import apply_passes
from reelstep.compiler.passes.mixed_precision import mixed_precision
from reelstep.compiler.program import Profile
from reelstep.compiler.signature import Signature
from reelstep.engine.models.movie_gen import CONFIG_30B, MovieGenTransformer, denoise_program
from reelstep.errors import CompileError

CONFIG = replace(CONFIG_30B, layers=1, width=64, ffn=96, heads=4, latent_channels=3, positions=(4, 4, 4), text_widths=(5,), time_frequencies=16, qk_norm=True)


def test_bfloat16_is_for_a_gpu() -> None:
    assert InductorBackend().precisions == ("float32",)
    assert InductorBackend(device="cuda:0").precisions == ("float32", "bfloat16")
    assert InductorBackend(device="cuda:0").default_precision()[0] == "bfloat16"


def test_a_precision_that_it_does_not_build_is_refused_before_the_graph_is_read() -> None:
    def never() -> torch.export.ExportedProgram:
        pytest.fail("the graph was read")

    program = denoise_program(MovieGenTransformer(CONFIG), 8, (Profile("video", {"F": 2, "H": 4, "W": 4}, 2),))
    with pytest.raises(CompileError, match="builds float32 for cpu, not bfloat16; use precision float32 or backend 'openvino'"):
        InductorBackend().build(never, Signature.of(program, program.profiles[0]), "bfloat16", None, "key")


def test_kept_ops_stay_in_a_graph_of_bfloat16_and_take_what_comes() -> None:
    torch.manual_seed(0)
    model = MovieGenTransformer(CONFIG).eval()
    program = denoise_program(model, 8, (Profile("video", {"F": 2, "H": 4, "W": 4}, 2),))
    exported, _ = apply_passes(capture(program, program.profiles[0]), keep=InductorBackend(device="cuda:0").keeps("sm90"))
    mixed = mixed_precision(exported, Signature.of(program, program.profiles[0]))
    dtypes: dict[str, set[tuple[torch.dtype, ...]]] = {}
    for node in mixed.graph.nodes:
        if str(node.target).startswith("reelstep."):
            given = tuple(arg.meta["val"].dtype for arg in node.args if isinstance(arg, torch.fx.Node))
            dtypes.setdefault(str(node.target).split(".")[1], set()).add(given)
    f32, bf16 = torch.float32, torch.bfloat16
    assert dtypes == {
        "patchify": {(f32,)},
        "rms_modulate": {(f32, f32, f32, f32)},
        "gated_residual": {(f32, f32, bf16)},
        "swiglu": {(bf16, bf16)},
        "unpatchify": {(f32,)},
    }, "the residual stream stays float32, and what a product gave is read as it is"
    x, modulation, context = torch.randn(2, 3, 2, 4, 4), torch.randn(2, 7, 64), torch.randn(2, 8, 64)
    with torch.no_grad():
        exact = MovieGenTransformer(CONFIG).double()
        exact.load_state_dict(model.state_dict())
        truth = exact(x.double(), modulation.double(), None, context.double())
        found = mixed.module()(x, modulation, context).double()
    assert (found - truth).norm() / truth.norm() < 2**-7, "two roundings of bfloat16"
