"""The planner's calibration on made-up times, and its comparison with published ones. Nothing is timed."""

import math
from dataclasses import replace

import pytest

from reelstep.benchmarks import planner
from reelstep.benchmarks.planner import FITTED, HELD_OUT, NETWORKS, STARTS, Timed, compare, errors_of, fastest, fit, predict
from reelstep.compiler.cost import Transformer
from reelstep.compiler.planner import ASSUMED, Device, Figure
from reelstep.compiler.skus import SKUS
from reelstep.errors import ConfigError

CPU = Device(replace(SKUS["cpu"], peak_flops={"float32": 2e11}, bandwidth_bytes_per_s=2e10), {})


def network(shape):
    config, text = NETWORKS[shape.network]
    values = config.latent_channels * math.prod(config.patch)
    return Transformer(
        config.layers, config.width, config.heads, config.ffn, True, config.tokens(*shape.latent), text, values, values, config.qk_norm
    )  # fmt: skip


def test_held_out_shapes_are_none_that_were_fitted_and_one_network_is_new():
    assert not set(FITTED) & set(HELD_OUT)
    assert {shape.network for shape in HELD_OUT} - {shape.network for shape in FITTED} == {"wide"}


def test_a_fit_to_times_of_known_rates_predicts_shapes_that_it_has_not_seen():
    true = {"product": 0.85, "attention": 0.3, "bandwidth": 0.6, "op_s": 2e-5, "call_s": 3e-4}
    known = Device(CPU.sku, {"float32": replace(ASSUMED, **{name: Figure(value, "made up") for name, value in true.items()})})
    timed = [Timed(shape, network(shape), predict(Timed(shape, network(shape), 0.0), known, "float32")) for shape in (*FITTED, *HELD_OUT)]
    found = fit(timed[: len(FITTED)], CPU, "float32", "measured: here")
    fitted = Device(CPU.sku, {"float32": found})
    assert [predict(one, fitted, "float32") for one in timed] == pytest.approx([one.seconds for one in timed], rel=0.02)
    assert found.product.value == pytest.approx(0.85, rel=0.05)
    assert {getattr(found, name).source for name in STARTS} == {"measured: here"}
    assert found.link == ASSUMED.link


def test_a_published_time_beyond_the_peak_counts_in_no_error():
    rows = compare()
    beyond = [row for row in rows if row["implied_share_of_peak"] > 1]
    assert {row["error"] for row in beyond} == {None}
    for row in rows:
        if row["error"] is not None:
            assert row["error"] == pytest.approx(row["predicted_s"] / row["published_s"] - 1)
    assert len(fastest(rows)) < len(rows) - len(beyond)
    median, worst = errors_of([{"error": -0.5}, {"error": 0.1}, {"error": None}, {"error": 0.2}])
    assert (median, worst) == (0.2, 0.5)


def test_wan_14b_costs_what_its_formula_gives():
    d, f, tokens, text = 5120, 13824, 32_760, 769
    block = 8 * d * d * tokens + 4 * tokens**2 * d + 4 * d * d * (tokens + text) + 4 * tokens * text * d + 4 * d * f * tokens
    assert planner.WAN_14B.flops() == 40 * block + 2 * tokens * (144 + 64) * d


def test_nothing_measured_is_nothing_written(tmp_path):
    with pytest.raises(ConfigError, match="measures nothing"):
        planner.main(["--published-only", "--corrections", str(tmp_path / "cpu.json")])
