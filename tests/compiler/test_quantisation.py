"""Which layers are quantised, and what a bundle must reach to be written: with a network whose one bad layer is known."""

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from reelstep.compiler import quantisation
from reelstep.compiler.bundle import Bundle
from reelstep.compiler.capture import capture
from reelstep.compiler.compile import compile_model
from reelstep.compiler.describe import describe, describe_json
from reelstep.compiler.graphs import dump_graph
from reelstep.compiler.load import load
from reelstep.compiler.passes.quantise import ATTENTION, Quantising, Reading, Watching, linears, part_of, quantise, quantise_weight
from reelstep.compiler.plan import Plan
from reelstep.compiler.program import Profile, Program, TensorSpec
from reelstep.compiler.quantisation import RANGED, Bench, Quantisation, choose_layers, fits
from reelstep.compiler.signature import Signature
from reelstep.compiler.skus import SKUS
from reelstep.compiler.write_bundle import Captured
from reelstep.errors import CompileError, ConfigError

WIDTH = 32


class Network(nn.Module):
    """Three branches, added. What goes into `spread` has one channel a thousand times the others, which its weight does not read."""

    def __init__(self):
        super().__init__()
        self.plain, self.spread, self.other = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.gain = nn.Parameter(torch.ones(WIDTH))
        with torch.no_grad():
            self.gain[7] = 1000.0
            self.spread.weight[:, 7] = 0.0

    def forward(self, x):
        return self.plain(x) + self.spread(x * self.gain) + self.other(x.tanh())


class Requests:
    """Random calls at two profiles. Results are the outputs themselves; `psnr` is against their own largest magnitude."""

    def __init__(self):
        self.compared = 0

    def inputs(self, seed, count):
        generator = torch.Generator().manual_seed(seed)
        return {("denoise", f"l{n}"): [{"x": torch.randn(2, n, WIDTH, generator=generator)} for _ in range(count)] for n in (4, 6)}

    def calls(self, engines):
        assert set(engines) == {("denoise", "l4"), ("denoise", "l6"), ("other", "l4")}
        return self.inputs(0, 9)

    def compare(self, reference, quantised):
        self.compared += 1
        squares = []
        for key, calls in self.inputs(1, 2).items():
            for call in calls:
                exact, y = reference[key](call)["y"], quantised[key](call)["y"]
                squares.append(float((y - exact).square().mean() / exact.abs().max() ** 2))
        mean = sum(squares) / len(squares)
        return float(-10 * torch.log10(torch.tensor(mean))), 0.99, len(squares)


def programs(device="cpu"):
    torch.manual_seed(0)
    module = Network().to(device)
    x, y = TensorSpec("x", "float32", ("B", "L", WIDTH)), TensorSpec("y", "float32", ("B", "L", WIDTH))
    profiles = tuple(Profile(f"l{n}", {"L": n}, 4) for n in (4, 6))
    return Program("denoise", module, (x,), (y,), profiles), Program("other", nn.Linear(WIDTH, WIDTH).to(device), (x,), (y,), profiles[:1])


def compiled(out: Path, scheme="int8", max_error=0.02, min_psnr=20.0, backend="eager", sku="cpu", device="cpu", requests=None) -> Bundle:
    asked = None if scheme is None else Quantisation(scheme, max_error, min_psnr, requests or Requests())
    return compile_model(
        model="toy", version="1", settings={}, programs=programs(device), backend=backend, sku=sku, out=out, solvers={}, card="# Toy\n", quantisation=asked
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compiled(tmp_path_factory.mktemp("bundle") / "toy.reel")


def test_the_layer_with_an_outlier_is_kept_and_no_other(bundle):
    for profile in ("l4", "l6"):
        record = bundle.plan.program("denoise", profile).quantised
        assert [each.layer for each in record.kept] == ["spread.weight"]
        assert (record.layers, record.calls) == (2, 18)
        assert record.error <= 0.02 < record.kept[0].error
    assert bundle.plan.program("other", "l4").quantised is None, "no request called it"


def test_the_error_of_a_layer_alone_is_that_of_the_whole_output(bundle):
    """Against the formula in float64: with steps of 1/127.5 of a range of thousands, what the other channels hold is rounded away."""
    plain = programs()[0].module.requires_grad_(False)
    kept = bundle.plan.program("denoise", "l4").quantised.kept[0]
    error = total = 0.0
    calls = Requests().inputs(0, 9)
    wide = [call["x"] * plain.gain for each in calls.values() for call in each]
    low, high = min(float(x.min()) for x in wide), max(float(x.max()) for x in wide)
    step = (high - low) / 255
    zero = round(-128 - low / step)
    q, row = quantise_weight(plain.spread.weight, "int8")
    for each in calls.values():
        for call in [each[round(k * 8 / 5)] for k in range(6)]:
            x = (call["x"] * plain.gain).double()
            grid = ((x / step).round().clamp(-128 - zero, 127 - zero)) * step
            change = grid @ (q.double() * row.double()).T - x @ plain.spread.weight.double().T
            error += float(change.square().sum())
            total += float(plain(call["x"]).double().square().sum())
    assert kept.error == pytest.approx((error / total) ** 0.5, rel=1e-3)


def test_a_tighter_limit_keeps_more_and_an_impossible_one_is_refused(tmp_path):
    tight = compiled(tmp_path / "tight.reel", max_error=0.004).plan.program("denoise", "l4").quantised
    assert tight.kept[0].layer == "spread.weight"
    assert len(tight.kept) == 2
    assert tight.error <= 0.004
    with pytest.raises(CompileError, match=r"no layer that int8 leaves within an error of 1e-06: 0.* with (other|plain).weight alone; allow a larger"):
        compiled(tmp_path / "none.reel", max_error=1e-6)
    assert not (tmp_path / "none.reel").exists()


def test_all_layers_are_quantised_where_the_limit_allows_it(tmp_path):
    record = compiled(tmp_path / "loose.reel", max_error=0.9, min_psnr=1.0).plan.program("denoise", "l4").quantised
    assert record.kept == ()
    assert record.layers == 3


def test_weights_alone_do_not_mind_the_outlier(tmp_path):
    record = compiled(tmp_path / "weights.reel", "int8-weights").plan.program("denoise", "l4").quantised
    assert record.kept == ()
    assert record.error < 0.01


def test_results_below_the_limit_are_not_written_and_the_error_says_what_to_do(tmp_path):
    requests = Requests()
    with pytest.raises(CompileError, match=r"reaches \d\d\.\d\d dB .* at least 90 dB .*2 layers in int8, kept spread.weight.*--max-error 0\.00\d.*--min-psnr"):
        compiled(tmp_path / "poor.reel", min_psnr=90.0, requests=requests)
    assert requests.compared == 1
    assert list(tmp_path.iterdir()) == []


def test_quality_is_measured_on_the_bundles_own_engines_and_shown(bundle):
    again = Requests().compare(load(Bundle.open(compiled_float(bundle)), None), load(bundle, None))
    assert bundle.plan.quality.psnr_db == pytest.approx(again[0], abs=1e-3)
    assert bundle.plan.quality.psnr_db > 35
    assert bundle.plan.quality.results == 4
    line = f"{bundle.plan.quality.psnr_db:.2f} dB, SSIM 0.9900 to float32, mean of 4 results by eager; at least 20 dB asked"
    assert f"quantised: {line}" in describe(bundle)
    assert json.loads(json.dumps(describe_json(bundle)))["quality"]["min_psnr_db"] == 20.0
    text = bundle.plan.explain()
    assert f"quality of the quantised model {line}" in text
    assert "quantised int8: 2 of 3 layers; error 0.0" in text
    assert "    kept spread.weight: alone an error of 0." in text


def compiled_float(bundle: Bundle) -> Path:
    return compiled(bundle.path.with_name("float.reel"), None).path


def test_a_plan_survives_json_and_one_without_quantisation_has_no_word_of_it(bundle):
    assert Plan.from_json(json.loads(json.dumps(bundle.plan.to_json()))) == bundle.plan
    plain = Bundle.open(compiled_float(bundle)).plan
    assert "quality" not in plain.to_json()
    assert "quantised" not in plain.to_json()["programs"][0]
    assert Plan.from_json(plain.to_json()) == plain


def test_the_same_input_gives_the_same_bytes(bundle, tmp_path):
    again = compiled(tmp_path / "toy.reel")
    assert again.manifest == bundle.manifest


def test_the_bundle_is_smaller_and_profiles_share_their_weights(bundle):
    int8 = [name for name, tensor in bundle.tensors.items() if tensor.dtype is torch.int8]
    assert len(int8) == 2, "of two profiles"
    floats = WIDTH * WIDTH + (2 + 3 + 1) * WIDTH  # the kept weight; steps, biases and gain
    assert bundle.weights_bytes("denoise", "l4", 2) == 2 * WIDTH * WIDTH + 2 * floats


def test_another_backend_runs_it(bundle):
    call = Requests().inputs(5, 1)["denoise", "l4"][0]
    exact, y = (load(bundle, None, backend=name, precision="float32")["denoise", "l4"](call)["y"] for name in ("eager", "openvino"))
    assert float((y - exact).norm() / exact.norm()) < 0.01, "a value near the middle of a step may go either way"


def test_fp8_is_planned_for_a_gpu_and_measured_here(tmp_path):
    plan = compiled(tmp_path / "fp8.reel", "fp8", max_error=0.05, backend="null", sku="h100-sxm").plan
    record = plan.program("denoise", "l4").quantised
    assert (record.scheme, record.layers, record.kept) == ("fp8", 3, ()), "rows have steps of their own, and E4M3 a wide range"
    assert plan.program("denoise", "l4").ops["aten._scaled_mm.default"] == 3
    assert plan.quality.backend == "eager"


def test_nvfp4_is_planned_for_a_gpu_that_multiplies_it_and_measured_here(tmp_path):
    bundle = compiled(tmp_path / "nvfp4.reel", "nvfp4", max_error=0.2, min_psnr=10.0, backend="null", sku="b200")
    record = bundle.plan.program("denoise", "l4").quantised
    assert (record.scheme, record.layers) == ("nvfp4", 2)
    assert [each.layer for each in record.kept] == ["spread.weight"], "the outlier's block has one scale, and rounds its other 15 numbers away"
    assert 0.05 < record.error < 0.2, "E2M1 has one bit behind the leading one"
    assert 10 < bundle.plan.quality.psnr_db < 40
    stored = sorted((str(tensor.dtype), tuple(tensor.shape)) for tensor in bundle.tensors.values())
    packed, scales = ("torch.uint8", (WIDTH, WIDTH // 2)), ("torch.float8_e4m3fn", (WIDTH, WIDTH // 16))
    assert [each for each in stored if each[0] != "torch.float32"] == [scales] * 2 + [packed] * 2, "of two profiles"


@pytest.mark.parametrize(
    ("scheme", "backend", "sku", "text"),
    [
        ("fp8", "eager", "cpu", r"fp8 on cpu .*multiplies no E4M3; use int8 \(openvino, eager\) or int8-weights \(.*\) there, or one of: l40s, h100-sxm"),
        ("fp8", "null", "a100-80g", r"fp8 on a100-80g \(sm80\), which multiplies no E4M3; use int8-weights \(inductor\) there"),
        ("int8", "inductor", "a100-80g", r"'inductor' on a100-80g.*use null, which only plans it, or int8-weights \(inductor\)$"),
        ("int8", "tensorrt", "h100-sxm", r"'tensorrt' on h100.*use null, which only plans it, or int8-weights \(inductor\) or fp8 \(inductor\)$"),
        ("nvfp4", "null", "h100-sxm", r"nvfp4 on h100-sxm \(sm90\), which multiplies no E2M1; use int8-weights \(inductor\) or fp8 \(inductor\) there, or"),
        ("nvfp4", "tensorrt", "b200", r"nvfp4 with backend 'tensorrt'.*use null, which only plans it, or int8-weights \(inductor\) or fp8 \(inductor\)$"),
        ("fp8", "tensorrt", "h100-sxm", r"fp8 with backend 'tensorrt'.*use inductor$"),
        ("int8", "inductor", "cpu", r"int8 with backend 'inductor' on cpu.*use openvino or eager$"),
    ],
)
def test_what_cannot_take_effect_is_refused_before_the_work(tmp_path, scheme, backend, sku, text):
    with pytest.raises(ConfigError, match=text):
        compiled(tmp_path / "x.reel", scheme, backend=backend, sku=sku)
    assert not list(tmp_path.iterdir())


def test_every_sku_says_whether_it_multiplies_e2m1():
    assert {name for name, sku in SKUS.items() if "float4" in sku.peak_flops} == {"b200", "rtx-5090"}


def test_layers_whose_widths_a_gpus_product_does_not_take_are_left_out():
    shapes = ((16, 32), (16, 16), (8, 32))
    assert [fits(torch.empty(shape), "fp8") for shape in shapes] == [True, True, False]
    assert [fits(torch.empty(shape), "nvfp4") for shape in shapes] == [True, False, False]
    assert fits(torch.empty(5, 3), "int8")


def test_every_sku_says_whether_it_multiplies_e4m3():
    assert {name for name, sku in SKUS.items() if "float8" in sku.peak_flops} == {"l40s", "h100-sxm", "h200-sxm", "b200", "rtx-4090", "rtx-5090"}


@pytest.mark.parametrize(
    ("arguments", "text"), [(("int4", 0.1, 30.0), "int4.*one of: int8"), (("int8", 0.0, 30.0), "error of 0"), (("int8", 0.1, 0.0), "0 dB")]
)
def test_bad_limits_are_refused(arguments, text):
    with pytest.raises(ConfigError, match=text):
        Quantisation(*arguments, Requests())


def test_a_model_without_weights_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no weights to measure"):
        compiled(tmp_path / "x.reel", backend="null", device="meta")


def test_errors_are_measured_on_calls_from_all_over(bundle):
    program = programs()[0]
    exported = capture(program, program.profiles[0])
    item = Captured(Signature.of(program, program.profiles[0]), exported, b"")
    calls = [{"x": torch.full((1, 4, WIDTH), float(k))} for k in range(48)]
    bench = Bench(item, "int8", calls)
    assert [int(call[0][0, 0, 0]) for call in bench.compared] == [0, 9, 19, 28, 38, 47]
    assert bench.ranges()["plain.weight"] == (0.0, 47.0), "ranges are of all calls"
    assert set(linears(exported).values()) == {"plain.weight", "spread.weight", "other.weight"}
    assert isinstance(Quantising(bench.body, "int8", bench.layers, {}, {}).run(*bench.calls[0]), torch.Tensor)


@pytest.mark.parametrize("scheme", ["int8", "int8-weights"])
@pytest.mark.parametrize(("value", "words"), [(0.0, "nothing but zeros"), (float("nan"), "NaN or infinity")])
def test_calls_that_leave_no_error_to_measure_are_refused(scheme, value, words):
    x, y = ((TensorSpec(name, "float32", ("B", WIDTH)),) for name in "xy")
    program = Program("denoise", nn.Linear(WIDTH, WIDTH, bias=False), x, y, (Profile("any", {}, 4),))
    item = Captured(Signature.of(program, program.profiles[0]), capture(program, program.profiles[0]), b"")
    bench = Bench(item, scheme, [{"x": torch.full((2, WIDTH), value)}])
    with pytest.raises(CompileError, match=f"program 'denoise' cannot be quantised: in float32 it gives {words} for the requests' own calls"):
        choose_layers("denoise", [bench], Quantisation(scheme, 0.2, 10.0, Requests()), lambda done, total: None)


@pytest.mark.parametrize("scheme", ["int8-weights", "fp8"])
def test_a_scheme_without_grids_looks_into_no_call_and_its_graph_is_the_same(monkeypatch, scheme):
    looks, run = Counter(), Reading.run
    monkeypatch.setattr(Reading, "run", lambda self, *call: (looks.update([type(self)]), run(self, *call))[1])
    program = programs()[0]
    item = Captured(Signature.of(program, program.profiles[0]), capture(program, program.profiles[0]), b"")
    bench = Bench(item, scheme, Requests().inputs(0, 9)["denoise", "l4"])
    choices = []
    for ranged, seen in ((RANGED, {}), ((scheme,), {Watching: 9})):
        monkeypatch.setattr(quantisation, "RANGED", ranged)
        choices.append(choose_layers("denoise", [bench], Quantisation(scheme, 0.2, 10.0, Requests()), lambda done, total: None))
        assert looks == seen
    lean, thorough = choices
    assert (lean.layers, lean.kept, lean.error) == (thorough.layers, thorough.kept, thorough.error)
    graphs = [dump_graph(quantise(item.exported, item.signature, scheme, each.layers, each.grids)) for each in choices]
    assert graphs[0] == graphs[1]


def test_a_quantised_bundle_is_finalized_by_a_process_that_never_quantised(bundle, tmp_path):
    """Fresh, as a target is: what quantises is not imported where engines are built."""
    command = [sys.executable, "-P", "-m", "reelstep", "finalize", str(bundle.path), "--backend", "openvino", "--cache", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "built in" in done.stdout


@pytest.mark.parametrize("limit", [math.nan, math.inf, 100.5, 0.0])
def test_a_psnr_that_no_result_can_have_is_refused(limit):
    with pytest.raises(ConfigError, match="above 0, and at most 100"):
        Quantisation("int8", 0.02, limit, Requests())


def test_keys_that_are_values_are_heard_apart_and_what_is_not_finite_is_refused():
    class Shared(nn.Module):
        def forward(self, q, k):
            return nn.functional.scaled_dot_product_attention(q, k, k)

    edges = tuple(TensorSpec(name, "float32", ("B", 2, 4, 8)) for name in "qk")
    program = Program("p", Shared(), edges, (TensorSpec("y", "float32", ("B", 2, 4, 8)),), (Profile("any", {}, 1),))
    exported = capture(program, program.profiles[0])
    (node,) = [node for node in exported.graph.nodes if node.target is ATTENTION]
    watching = Watching(exported.module(), {node.name: "attention"})
    watching.run(torch.ones(1, 2, 4, 8), 2 * torch.ones(1, 2, 4, 8))
    assert [watching.ranges[part_of("attention", part)][1] for part in "qkv"] == [1, 2, 2]
    with pytest.raises(CompileError, match="nothing can be calibrated on that"):
        watching.run(torch.ones(1, 2, 4, 8), torch.full((1, 2, 4, 8), math.nan))


@pytest.mark.parametrize(("features", "warned"), [({"avx2"}, True), ({"avx2", "avx_vnni"}, False)])
def test_a_cpu_without_products_of_8_bits_is_warned_of(features, warned, caplog):
    Quantisation("int8", 0.2, 10.0, Requests()).check("openvino", replace(SKUS["cpu"], features=frozenset(features)))
    assert ("has no VNNI and no AMX: what is quantised to int8 runs there in float32" in caplog.text) is warned
