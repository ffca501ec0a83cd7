"""What OpenVINO's frontend is given is what it would make of a graph itself, without the trace."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
import torch.nn.functional as F
from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from reelstep.compiler.backends.openvino.decoder import REWRITES, decoder_of
from reelstep.compiler.capture import capture, quiet_torch
from reelstep.compiler.graphs import dump_graph, load_graph, weights_of
from reelstep.compiler.passes import apply_passes
from reelstep.compiler.passes.mixed_precision import mixed_precision
from reelstep.compiler.program import Profile, Program, TensorSpec
from reelstep.compiler.signature import Signature

aten = torch.ops.aten


class All(nn.Module):
    """Every operator that is rewritten, but the changes of dtype, which the pass of mixed precision makes. x: [B, 4, 6, 8], y: [B, 4, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Conv1d(4, 4, 3, padding=1), nn.Conv2d(4, 4, (1, 3), stride=2, bias=False), nn.Conv3d(4, 2, 1, groups=2)
        self.group, self.layer, self.plain = nn.GroupNorm(2, 4), nn.LayerNorm(8), nn.LayerNorm(8, elementwise_affine=False)
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        first, *_, last = self.layer(x).unbind(-2)
        joined = first + self.one(last) + self.last(self.plain(y))
        wide = F.pad(self.group(x), (0, 1, 0, 1)).transpose(1, -1)  # [B, 9, 7, 4]
        rows = wide.transpose(2, 3).flatten(0, 1)[:, :, None]  # [9 B, 4, 1, 7]: as many rows as x has, times another number
        deep = self.three(self.group(rows)[:, :, None])[:, :, 0].unflatten(0, (-1, 9))
        return joined.sum((1, 2)) + self.two(x).sum((1, 2, 3)) + deep.sum((1, 2, 3, 4))


class Reflecting(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.pad(x, (1, 1, 1, 1), mode="reflect").transpose(2, 3).sum((1, 2, 3)) + y.mean((1, 2))


def exported(module: nn.Module, most: int, precision: str = "float32") -> ExportedProgram:
    """most: rows. Through a file, which leaves out what a trace knows of its nodes."""
    profile = Profile("p", {}, most)
    inputs = (TensorSpec("x", "float32", ("B", 4, 6, 8)), TensorSpec("y", "float32", ("B", 4, 8)))
    program = Program("all", module.eval(), inputs, (TensorSpec("out", "float32", ("B",)),), (profile,))
    graph, _ = apply_passes(capture(program, profile))
    signature = Signature.of(program, profile)
    graph = load_graph(dump_graph(graph), weights_of(graph), signature, "graph.json")
    return mixed_precision(graph, signature) if precision == "bfloat16" else graph


def read(decoder: TorchFXPythonDecoder) -> list[Any]:
    """All that an output depends on, in the order in which it is met from there, whatever the nodes are called."""
    module, met, found = decoder.pt_module, {}, []
    assert isinstance(module, GraphModule)

    def told(value: Any) -> Any:
        return visit(value) if isinstance(value, Node) else [told(each) for each in value] if isinstance(value, list | tuple) else repr(value)

    def visit(node: Node) -> int:
        if node.target is aten.clone.default:  # a copy is nothing to OpenVINO
            return visit(node.all_input_nodes[0])
        if node not in met:
            operands = told(node.args), {name: told(value) for name, value in node.kwargs.items()}
            known = node.meta.get("tensor_meta")
            kind = [str(known.shape), str(known.dtype)] if hasattr(known, "dtype") and node.op != "get_attr" else []
            met[node] = len(found)
            found.append([node.op, str(node.target), operands, kind])
        return met[node]

    visit(module.graph.output_node())
    return found


@pytest.mark.parametrize(("most", "precision"), [(8, "float32"), (8, "bfloat16"), (1, "float32")])
def test_what_is_rewritten_is_what_a_trace_makes_of_it(most: int, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = exported(All(), most, precision)
    left_out = {aten._unsafe_view.default} if most == 1 else set()
    left_out |= {aten.to.dtype} if precision == "float32" else set()
    assert set(REWRITES) - left_out <= {node.target for node in graph.graph.nodes}
    before = str(graph.graph)
    with quiet_torch():
        traced = read(TorchFXPythonDecoder.from_exported_program(graph))
        monkeypatch.setattr(TorchFXPythonDecoder, "from_exported_program", lambda *_: pytest.fail("it was traced"))
        assert read(decoder_of(graph)) == traced
    assert str(graph.graph) == before


@pytest.mark.parametrize("module", [All(), Reflecting()], ids=["rewritten", "traced"])
def test_openvino_computes_what_the_module_does(module: nn.Module) -> None:
    with quiet_torch():
        model = ov.convert_model(decoder_of(exported(module, 8)))
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for rows in (1, 3):
        x, y = torch.randn(rows, 4, 6, 8), torch.randn(rows, 4, 8)
        with torch.no_grad():
            wanted = module(x, y)
        np.testing.assert_allclose(compiled([x.numpy(), y.numpy()])[0], wanted.numpy(), rtol=1e-4, atol=1e-4)
