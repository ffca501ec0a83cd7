"""Rows side by side on parts of the threads, and attention that reads keys where they lie."""

import itertools
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from functools import partial

import numpy as np
import openvino as ov
import openvino.opset13 as op
import pytest
import torch
from openvino.tools.ovc import convert_impl
from torch import nn

from reelstep.compiler.backends import BACKENDS, openvino
from reelstep.compiler.backends.openvino import ALONE, LANES, SMALL, Variant
from reelstep.compiler.backends.openvino.attention import read_keys_in_place
from reelstep.compiler.capture import capture
from reelstep.compiler.passes import apply_passes
from reelstep.compiler.program import Profile, Program, TensorSpec
from reelstep.compiler.signature import Signature
from reelstep.compiler.storage import seal
from reelstep.errors import CompileError, StorageError
from reelstep.kernels import OPS
from reelstep.kernels.attention import attention

BACKEND = BACKENDS["openvino"]
MAX_BATCH = 7


class Block(nn.Module):
    """Attention over x [B, L, 64] with what follows it. mask: so that a token attends to what is before it."""

    def __init__(self, mask=False):
        super().__init__()
        self.qkv, self.out = nn.ModuleList(nn.Linear(64, 64) for _ in range(3)), nn.Linear(64, 64)
        self.mask = mask

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in self.qkv)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.mask)
        return x + self.out(y.transpose(1, 2).flatten(2))


def exported_of(module, tokens, max_batch):
    """The graph, its signature, and the module in float64."""
    torch.manual_seed(0)
    made = module().eval()
    edge = ("B", tokens, 64)
    program = Program("p", made, (TensorSpec("x", "float32", edge),), (TensorSpec("y", "float32", edge),), (Profile("q", {}, max_batch),))
    exported, _ = apply_passes(capture(program, program.profiles[0]))
    return exported, Signature.of(program, program.profiles[0]), deepcopy(made).double()


@pytest.fixture(scope="module")
def subject():
    return exported_of(Block, SMALL // 64, MAX_BATCH)


@pytest.fixture(scope="module")
def engine(subject):
    exported, signature, _ = subject
    return BACKEND.build(lambda: exported, signature, "float32", None, "")


def x_of(rows, tokens=SMALL // 64):
    return torch.randn(rows, tokens, 64, generator=torch.Generator().manual_seed(rows))


def test_a_conversion_that_fails_leaves_the_processs_logging_as_it_was(subject, monkeypatch):
    exported, signature, _ = subject
    monkeypatch.setattr(convert_impl, "prepare_ir", {}.__getitem__)
    before = logging.root.level, logging.root.filters[:], logging.root.handlers[:]
    with pytest.raises(CompileError, match=r"program 'p' at profile 'q' cannot be converted to OpenVINO: "):
        BACKEND.build(lambda: exported, signature, "float32", None, "")
    assert (logging.root.level, logging.root.filters, logging.root.handlers) == before


@pytest.mark.parametrize("rows", range(1, MAX_BATCH + 1))
def test_rows_beside_each_other_are_what_each_is_alone(engine, subject, rows):
    x = x_of(rows)
    y = engine({"x": x})["y"]
    with torch.no_grad():
        exact = subject[2](x.double())
    assert float((y - exact).norm() / exact.norm()) < 1e-6
    for k in range(rows):
        other = torch.full_like(x, 0.5)
        other[k] = x[k]
        assert torch.equal(engine({"x": other})["y"][k], y[k]), "a row does not depend on what its neighbours hold"


def test_results_and_inputs_of_many_calls_are_not_mixed_up(engine):
    calls = [x_of(rows) + k for k, rows in enumerate((2, 7, 1, 4, 3, 2, 6))]
    kept = [engine({"x": x})["y"] for x in calls]
    first = [y.clone() for y in kept]
    assert all(torch.equal(engine({"x": x})["y"], y) for x, y in zip(reversed(calls), reversed(first), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, first, strict=True))


def test_how_a_program_is_compiled_follows_from_its_edges_and_the_cores(subject, monkeypatch):
    signature = subject[1]
    small = exported_of(Block, SMALL // 64 // 2 - 1, MAX_BATCH)[1]
    monkeypatch.setattr(openvino, "SKU", replace(openvino.SKU, units=LANES))
    assert openvino.variants_of(signature, meets=False) == (ALONE, Variant(1, LANES))
    assert openvino.variants_of(signature, meets=True) == (ALONE, Variant(MAX_BATCH, 1)), "ranks' rows go through collectives together"
    assert openvino.variants_of(small, meets=False) == (ALONE, Variant(MAX_BATCH, 1))
    assert openvino.variants_of(replace(signature, max_batch=1), meets=False) == (ALONE,)
    monkeypatch.setattr(openvino, "SKU", replace(openvino.SKU, units=1))
    assert openvino.variants_of(signature, meets=False) == (ALONE, Variant(MAX_BATCH, 1))


def test_a_program_of_one_row_has_one_variant_and_runs():
    exported, signature, module = exported_of(Block, 16, 1)
    x = x_of(1, 16)
    y = BACKEND.build(lambda: exported, signature, "float32", None, "")({"x": x})["y"]
    with torch.no_grad():
        exact = module(x.double())
    assert float((y - exact).norm() / exact.norm()) < 1e-6


def test_engines_from_the_cache_run_rows_beside_each_other_too(subject, engine, tmp_path):
    exported, signature, _ = subject
    BACKEND.build(lambda: exported, signature, "float32", tmp_path, "key")
    again = BACKEND.build(None, signature, "float32", tmp_path, "key")  # its graph is not asked for
    assert list(again.variants) == list(engine.variants)
    for rows in (1, 5):
        assert torch.equal(again({"x": x_of(rows)})["y"], engine({"x": x_of(rows)})["y"])


def test_an_engine_is_opened_once_whether_ahead_or_by_a_call(subject, tmp_path):
    exported, signature, _ = subject
    BACKEND.build(lambda: exported, signature, "float32", tmp_path, "key")
    again, opened = BACKEND.build(None, signature, "float32", tmp_path, "key"), []

    def counted(variant, make):
        opened.append(variant)
        return make()

    again.variants = {variant: partial(counted, variant, make) for variant, make in again.variants.items()}
    with ThreadPoolExecutor(4) as pool:
        for rows in (3, 2, 3, 2):
            pool.submit(again.open, rows)
        again({"x": x_of(3)})
    assert sorted(opened) == sorted([ALONE] + [again.many] * again.many.lanes)


QUIET = """
import socket, sys
sys.addaudithook(lambda event, given: sys.exit(f"{event} {given}") if event in ("socket.connect", "socket.getaddrinfo") else None)
import torch
from pathlib import Path
from reelstep.compiler.backends import BACKENDS
from reelstep.compiler.capture import capture
from reelstep.compiler.program import Profile, Program, TensorSpec
from reelstep.compiler.signature import Signature
edges = (TensorSpec("x", "float32", ("B", 4)),), (TensorSpec("y", "float32", ("B", 4)),)
program = Program("p", torch.nn.Linear(4, 4), *edges, (Profile("any", {}, 3),))
exported = capture(program, program.profiles[0])
engine = BACKENDS["openvino"].build(lambda: exported, Signature.of(program, program.profiles[0]), "float32", Path(sys.argv[1]), "key")
print(list(engine({"x": torch.zeros(1, 4)})["y"].shape))
"""


def test_nobody_is_told_that_an_engine_is_built(tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-P", "-c", QUIET, str(tmp_path / "cache")], capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout == "[1, 4]\n", done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["cache"], "nor is anything kept in the user's folder"


def test_a_cache_that_cannot_be_written_is_found_before_the_work(subject, tmp_path):
    _, signature, _ = subject
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write into"):
        BACKEND.build(lambda: pytest.fail("a graph was read"), signature, "float32", tmp_path / "file" / "cache", "key")


@pytest.mark.parametrize("precision", BACKEND.precisions)
def test_attention_to_so_many_keys_is_the_formula_also_for_none(precision):
    class Counted(nn.Module):
        def forward(self, q, k, v, n):
            return attention(q, k, v, n.to(torch.int32))

    heads, keys, lse = ("B", 2, 5, 16), ("B", 2, 7, 16), ("B", 2, 5)
    inputs = (TensorSpec("q", "float32", heads), TensorSpec("k", "float32", keys), TensorSpec("v", "float32", keys), TensorSpec("n", "int64", ("B",)))
    program = Program("p", Counted(), inputs, (TensorSpec("out", "float32", heads), TensorSpec("lse", "float32", lse)), (Profile("any", {}, 3),))
    exported, _ = apply_passes(capture(program, program.profiles[0]))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, length, 16, generator=generator) for length in (5, 7, 7))
    lengths = torch.tensor([7, 3, 0])
    found = BACKEND.build(lambda: exported, Signature.of(program, program.profiles[0]), precision, None, "")({"q": q, "k": k, "v": v, "n": lengths})
    out, lse = OPS["attention"].reference(q.double(), k.double(), v.double(), lengths.int(), 0.25, "auto")
    tolerance = 1e-5 if precision == "float32" else 2e-2
    torch.testing.assert_close(found["out"].double(), out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found["lse"].double(), lse, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("harm", "says"), [(lambda path: path.write_bytes(b"\0" * 99), "exchanged"), (lambda path: path.unlink(), "removed from the cache")])
def test_a_blob_that_was_found_and_is_another_when_it_is_opened_is_not_run(subject, tmp_path, harm, says):
    exported, signature, _ = subject
    found = BACKEND.build(lambda: exported, signature, "float32", tmp_path, "key")
    for blob in tmp_path.glob("*.blob"):
        harm(blob)
    with pytest.raises(StorageError, match=rf"\.blob was {says}.*open the bundle again"):
        found({"x": x_of(1)})


def test_a_blob_that_another_process_made_meanwhile_is_opened(subject, engine, tmp_path):
    exported, signature, _ = subject
    found = BACKEND.build(lambda: exported, signature, "float32", tmp_path, "key")
    for blob in [*tmp_path.glob("*.blob")]:
        data = blob.read_bytes()
        seal(blob, lambda path, data=data: path.write_bytes(data))
    assert torch.equal(found({"x": x_of(1)})["y"], engine({"x": x_of(1)})["y"])


@pytest.mark.parametrize("precision", BACKEND.precisions)
@pytest.mark.parametrize("mask", [False, True])
def test_attention_agrees_with_float64_and_moves_no_keys(precision, mask):
    exported, signature, module = exported_of(lambda: Block(mask), 48, 1)
    engine = BACKEND.build(lambda: exported, signature, precision, None, "")
    x = x_of(1, 48)
    with torch.no_grad():
        exact = module(x.double())
    assert float((engine({"x": x})["y"] - exact).norm() / exact.norm()) < (1e-6 if precision == "float32" else 5e-3)
    nodes = engine.variants[ALONE]().get_runtime_model().get_ops()
    shapes = [node.get_output_shape(0) for node in nodes if node.get_rt_info()["layerType"].astype(str) == "Transpose"]
    assert mask or not [shape for shape in shapes if list(shape)[-2:] == [16, 48]], "keys [heads, K, L]"


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
@pytest.mark.parametrize("flags", [(False, False), (False, True), (True, False)])
def test_a_product_of_what_was_moved_gives_the_same_numbers(order, flags):
    generator = np.random.default_rng(0)
    sizes = dict(enumerate((2, 3, 5, 4)))
    moved = [sizes[axis] for axis in order]
    inner = moved[-1] if flags[1] else moved[-2]
    left = (moved[0], moved[1], *((inner, 6) if flags[0] else (6, inner)))
    a, b = op.parameter(left, np.float32), op.parameter((2, 3, 5, 4), np.float32)
    model = ov.Model([op.matmul(a, op.transpose(b, op.constant(list(order), ov.Type.i64)), *flags)], [a, b])
    x, y = generator.standard_normal(left, np.float32), generator.standard_normal((2, 3, 5, 4), np.float32)
    read_keys_in_place(model)
    kinds = [node.get_type_name() for node in model.get_ops()]
    assert ("Transpose" in kinds) == (order not in ((0, 1, 2, 3), (0, 1, 3, 2)))
    turned = np.transpose(y, order)
    exact = np.matmul(np.swapaxes(x, -1, -2) if flags[0] else x, np.swapaxes(turned, -1, -2) if flags[1] else turned)
    assert np.allclose(ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([x, y])[0], exact, atol=1e-5)
