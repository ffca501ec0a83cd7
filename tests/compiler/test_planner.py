"""Predictions against hand calculation, and what a plan says of what it leaves out. Nothing here is compared with a real device."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields, replace
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest
import torch

from reelstep.compiler.cost import Axis, Op, Transformer
from reelstep.compiler.planner import (
    ASSUMED,
    Corrections,
    Device,
    Figure,
    Sampling,
    Spent,
    Workload,
    device_of,
    explain,
    link_of,
    meshes,
    plot,
    rank,
    read_device,
    run_by,
    spent_on,
    spent_on_call,
    to_json,
    workload_of,
)
from reelstep.compiler.skus import SKUS
from reelstep.engine.models.movie_gen import MovieGenConfig, MovieGenTransformer, denoise_program, time_program
from reelstep.errors import ConfigError, StorageError
from reelstep.parallel.mesh import Mesh

BIG = Transformer(48, 6144, 48, 16384, gated=True, tokens=73_728, text_tokens=1024, values_in=64, values_out=64, qk_norm=False)
MOVIE_GEN = Workload("movie-gen-30b", "256 frames of 768x768", BIG, 29_303_494_656, ())
FIFTY, EIGHT = Sampling("euler", 50, 100, "not measured"), Sampling("euler", 8, 16, "not measured")
H200 = device_of(SKUS["h200-sxm"])

IDEAL = Corrections(*(Figure(1.0, "assumed") for _ in range(5)), *(Figure(0.0, "assumed") for _ in range(4)))
"""Reaches the datasheet, starts at once."""


def ideal(name: str) -> Device:
    return Device(SKUS[name], {"bfloat16": IDEAL})


def test_an_operator_takes_the_longer_of_its_flops_and_its_bytes() -> None:
    device = ideal("a100-80g")  # 312 TFLOP/s, 2.039 TB/s
    large, small = Op("product", 2 * 4096**3, 3 * 4096**2), Op("product", 2 * 4096**2, 4096**2 + 2 * 4096, 3)
    assert spent_on([large], device, "bfloat16") == Spent(compute=2 * 4096**3 / 312e12)
    assert spent_on([small], device, "bfloat16") == Spent(bandwidth=pytest.approx(3 * 2 * (4096**2 + 2 * 4096) / 2.039e12))
    halved = replace(IDEAL, product=Figure(0.5, "assumed"), op_s=Figure(1e-6, "assumed"))
    slower = spent_on([large], Device(device.sku, {"bfloat16": halved}), "bfloat16")
    assert (slower.compute, slower.start, slower.bound) == (2 * 2 * 4096**3 / 312e12, 1e-6, "compute")


def test_fifty_steps_of_movie_gen_on_eight_h100_at_forty_percent_take_324_seconds() -> None:
    at_forty = replace(IDEAL, product=Figure(0.4, "assumed"), attention=Figure(0.4, "assumed"), bandwidth=Figure(1e6, "assumed"), link=Figure(1e6, "assumed"))
    ranking = rank(MOVIE_GEN, Device(SKUS["h100-sxm"], {"bfloat16": at_forty}), devices=8, samplings=[FIFTY], precisions=["bfloat16"])
    by_mesh = {str(choice.mesh): choice.latency_s for choice in ranking.choices}
    text = 48 * 4 * 6144**2 * 1024  # keys and values, which three more ranks compute too
    assert by_mesh["cfg=2,cp=4"] == pytest.approx(100 * (1.0249e16 + 3 * text) / (8 * 989.5e12 * 0.4), rel=1e-4)


def test_transfers_take_their_bytes_at_the_rate_of_the_link_they_cross() -> None:
    device = ideal("h100-sxm")
    within = spent_on_call(BIG, 1, Mesh.parse("cp=8"), device, "bfloat16").link
    state = 4 * 73_728 * 128 / 450e9
    assert within - state == pytest.approx(48 * 4 * 73_728 * 6144 * 2 * 7 / 64 / 450e9)
    across = spent_on_call(BIG, 1, Mesh.parse("cp=16"), device, "bfloat16").link
    assert across - state * 9 == pytest.approx(48 * 4 * 73_728 * 6144 * 2 * 15 / 256 / 50e9)
    inside = spent_on_call(BIG, 1, Mesh.parse("cfg=2,cp=8"), device, "bfloat16").link  # only the pair's velocities cross
    assert inside == pytest.approx(within - state + state * 9)


def test_a_ring_hides_behind_its_attention_and_shows_where_that_is_short() -> None:
    assert spent_on_call(BIG, 1, Mesh.parse("cp=2,ring=2"), ideal("h100-sxm"), "bfloat16").link == pytest.approx(4 * 73_728 * 128 / 450e9)  # the state alone
    short = replace(BIG, tokens=512)
    slow = Device(replace(SKUS["h100-sxm"], link=replace(SKUS["h100-sxm"].link, bytes_per_s=1e9)), {"bfloat16": IDEAL})
    attention = 48 * 4 * 256 * 256 * 6144 / 989.5e12  # while a block of keys is on its way, this rank's queries meet the other
    moved = 48 * 2 * 256 * 6144 * 2 / 1e9
    assert spent_on_call(short, 1, Mesh.parse("cp=2,ring=2"), slow, "bfloat16").link == pytest.approx(moved - attention + 4 * 512 * 128 / 1e9, rel=2e-3)


def test_what_does_not_fit_is_dropped_with_its_sizes() -> None:
    ranking = rank(MOVIE_GEN, device_of(SKUS["a100-80g"]), devices=4, samplings=[FIFTY], precisions=["float32", "bfloat16"])
    reasons = {one.what: one.reason for one in ranking.dropped}
    alone = reasons["50 NFE in float32 on one device"]
    assert alone.startswith("1")
    assert "GB do not fit 80 GB: weights 117.2, activations" in alone  # 29.3e9 x 4
    assert all(choice.memory.total <= 80e9 for choice in ranking.choices)
    assert all(choice.mesh.tp > 1 for choice in ranking.choices if choice.precision == "float32")


def test_a_guidance_pair_that_does_not_fit_in_one_call_runs_in_two() -> None:
    ranking = rank(MOVIE_GEN, device_of(SKUS["h100-sxm"]), devices=1, samplings=[FIFTY], precisions=["bfloat16"])
    (choice,) = ranking.choices
    assert choice.rows == 1
    assert "(a pair in two calls)" in explain(ranking, 1)


def test_weights_are_divided_by_tp_and_activations_by_all() -> None:
    ranking = rank(MOVIE_GEN, H200, devices=8, samplings=[FIFTY], precisions=["bfloat16"])
    memory = {str(choice.mesh): choice.memory for choice in ranking.choices}
    assert memory["tp=8"].weights == 2 * (BIG.block_parameters / 8 + 29_303_494_656 - BIG.block_parameters)
    assert memory["cp=8"].weights == 2 * 29_303_494_656
    assert memory["cp=8"].activations < memory["tp=8"].activations < memory["one device"].activations
    assert memory["tp=8"].checkpoints == 52 * 4 * 16 * 32 * 96 * 96  # x[0], x and 50 velocities of latents [16, 32, 96, 96]


def test_meshes_that_do_not_divide_the_model_are_dropped() -> None:
    network = Transformer(2, 64, 4, 160, gated=True, tokens=60, text_tokens=8, values_in=32, values_out=32, qk_norm=True)
    small = Workload("small", "no video", network, 200_000, ())
    reasons = {one.what: one.reason for one in rank(small, H200, devices=8, samplings=[FIFTY], precisions=["bfloat16"]).dropped}
    assert reasons["50 NFE in bfloat16 on cp=8"] == "ulysses x tp = 8 is more than the 4 heads; use ring for the rest"
    assert reasons["50 NFE in bfloat16 on cp=8,ring=8"].startswith("60 tokens do not divide by cp=8")
    three = {one.what: one.reason for one in rank(small, H200, devices=3, samplings=[FIFTY], precisions=["bfloat16"]).dropped}
    assert three["50 NFE in bfloat16 on tp=3"].startswith("4 heads do not divide by ulysses x tp = 3")


def test_without_a_pair_cfg_has_nothing_to_share() -> None:
    ranking = rank(MOVIE_GEN, H200, devices=2, samplings=[Sampling("euler", 8, 8, "not measured")], precisions=["bfloat16"])
    assert all(choice.mesh.cfg == 1 for choice in ranking.choices)
    assert "no guidance pair" in next(one.reason for one in ranking.dropped if "cfg=2" in one.what)


def test_machines_without_a_known_network_are_not_joined() -> None:
    lone = replace(H200, sku=replace(H200.sku, network=None))
    ranking = rank(MOVIE_GEN, lone, devices=16, samplings=[EIGHT], precisions=["bfloat16"])
    assert max(choice.mesh.world for choice in ranking.choices) == 8
    assert any("needs a link between machines of 8, and none is known of h200-sxm" in one.reason for one in ranking.dropped)


@pytest.mark.parametrize(
    ("mesh", "axis", "where"),
    [
        ("cp=6,ring=3,tp=2", "tp", "within"),  # 12 ranks: 0-7 and 8-11; pairs lie in one machine
        ("cp=6,ring=3,tp=2", "ulysses", "within"),
        ("cp=6,ring=3,tp=2", "ring", "between"),
        ("cfg=2,cp=6", "ulysses", "between"),  # 0-5, and 6-11 in both
        ("cfg=2,cp=2,tp=3", "tp", "between"),  # 6-8
        ("cp=4,tp=3", "tp", "between"),
        ("cfg=2,cp=3", "ulysses", "within"),  # 6 ranks are in one machine
        ("cfg=2,cp=8", "ulysses", "within"),
    ],
)
def test_a_group_that_lies_across_the_end_of_a_machine_goes_over_the_network(mesh: str, axis: Axis, where: str) -> None:
    sku = SKUS["h200-sxm"]  # 8 of a machine
    assert link_of(axis, Mesh.parse(mesh), sku) is (sku.link if where == "within" else sku.network)


def test_every_mesh_of_a_number_that_divides_the_devices_is_tried() -> None:
    tried = meshes(8)
    assert len(tried) == len(set(tried))
    assert {mesh.world for mesh in tried} == {1, 2, 4, 8}
    assert len([mesh for mesh in tried if mesh.world == 8]) == 10 + 6  # ways to write 8, and 4, as ulysses x ring x tp
    assert Mesh.parse("cfg=2,cp=4,ring=2") in tried


def test_the_best_comes_first_and_with_a_deadline_the_cheapest_of_the_most_forwards() -> None:
    free = rank(MOVIE_GEN, H200, devices=8, samplings=[EIGHT, FIFTY], precisions=["bfloat16"])
    keys = [(-choice.sampling.forwards, choice.latency_s) for choice in free.choices]
    assert keys == sorted(keys)
    timely = rank(MOVIE_GEN, H200, devices=8, samplings=[EIGHT, FIFTY], precisions=["bfloat16"], deadline_s=150)
    assert {choice.sampling.nfe for choice in timely.choices} == {8}
    assert all(choice.latency_s <= 150 for choice in timely.choices)
    paid = [choice.device_s for choice in timely.choices]
    assert paid == sorted(paid)
    assert len(timely.choices) + len(timely.dropped) == len(free.choices) + len(free.dropped)


def test_an_impossible_deadline_says_the_best_possible() -> None:
    best = min(rank(MOVIE_GEN, H200, devices=8, samplings=[EIGHT], precisions=["bfloat16"]).choices, key=lambda choice: choice.latency_s)
    with pytest.raises(ConfigError, match=rf"cannot be made in 1 s on 8 x h200-sxm; the best possible is {best.latency_s:.3g} s, with euler of 8 NFE"):
        rank(MOVIE_GEN, H200, devices=8, samplings=[EIGHT, FIFTY], precisions=["bfloat16"], deadline_s=1)


def test_a_model_that_fits_nowhere_says_why() -> None:
    with pytest.raises(ConfigError, match=r"movie-gen-30b fits 1 x rtx-4090 in no way .* GB do not fit 24 GB: weights 58.6"):
        rank(MOVIE_GEN, device_of(SKUS["rtx-4090"]), devices=1, samplings=[FIFTY], precisions=["bfloat16"])


def test_every_number_that_is_not_measured_is_printed_as_such() -> None:
    ranking = rank(MOVIE_GEN, H200, devices=8, samplings=[FIFTY], precisions=["bfloat16"])
    text = explain(ranking, 3, price=2.5)
    for field in fields(Corrections):
        figure: Figure = getattr(H200.corrections["bfloat16"], field.name)
        assert f"{field.name} {figure.value:.4g}  {figure.source}" in text
        assert figure.source.startswith(("assumed", "measured"))
    assert H200.sku.source in text
    best = ranking.choices[0]
    assert f"{best.mesh.world * best.latency_s / 3600 * 2.5:.4g}" in text
    assert "price" not in explain(ranking, 3)
    assert "not in this model, so not counted: encode_text, decode" in text


def test_a_plan_says_the_video_and_which_backends_run_each_mesh_as_the_command_line_writes_it() -> None:
    ranking = rank(MOVIE_GEN, H200, devices=8, samplings=[FIFTY], precisions=["bfloat16"])
    text, data = explain(ranking, 100), to_json(ranking)
    assert "\na video of 256 frames of 768x768\n" in text
    able = {choice["mesh"]["ring"]: choice["run_by"] for choice in data["choices"] if choice["mesh"]["cp"] == 8}
    assert able == {1: ["tensorrt"], 2: [], 4: [], 8: []}, "TensorRT has no layer for a ring"
    assert next(choice["run_by"] for choice in data["choices"] if choice["mesh"] == asdict(Mesh(1, 1, 1, 1))) == ["inductor", "tensorrt"]
    lines = {line.split("bfloat16  ")[1].split()[0]: line for line in text.splitlines() if "bfloat16  " in line}
    assert "  none yet  " in lines["cp=8,ring=4"]
    assert "  tensorrt  " in lines["cfg=2,cp=4"]
    for choice in ranking.choices:
        assert str(choice.mesh) == "one device" or Mesh.parse(str(choice.mesh)) == choice.mesh
    alone = explain(rank(MOVIE_GEN, H200, devices=1, samplings=[FIFTY], precisions=["bfloat16"]), 3)
    assert "none yet" in text
    assert "none yet" not in alone
    assert run_by(Mesh.parse("cp=2,ring=2"), "avx512") == ["openvino", "inductor", "eager"]


def test_json_holds_all_choices_and_all_that_was_dropped() -> None:
    ranking = rank(MOVIE_GEN, device_of(SKUS["a100-80g"]), devices=4, samplings=[FIFTY], precisions=["float32", "bfloat16"])
    data = json.loads(json.dumps(to_json(ranking, price=2.0)))
    assert (len(data["choices"]), len(data["dropped"])) == (len(ranking.choices), len(ranking.dropped))
    first = data["choices"][0]
    assert first["latency_s"] == pytest.approx(sum(first["spent"].values()))
    assert first["price"] == pytest.approx(2.0 * first["device_s"] / 3600)


def test_a_plot_is_written_or_says_why_not(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    ranking = rank(MOVIE_GEN, H200, devices=2, samplings=[EIGHT], precisions=["bfloat16"])
    plot(ranking, 4, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(StorageError, match="cannot write"):
        plot(ranking, 4, tmp_path / "plan.nonsense")


def test_measured_rates_are_read_back_and_belong_to_their_sku(tmp_path: Path) -> None:
    sku = replace(SKUS["cpu"], peak_flops={"float32": 1e11}, bandwidth_bytes_per_s=2e10)
    measured = Device(sku, {"float32": replace(ASSUMED, product=Figure(0.9, "measured: here"))})
    file = tmp_path / "cpu.json"
    file.write_text(json.dumps(measured.to_json()))
    read = read_device(file, SKUS["cpu"])
    assert read.corrections == measured.corrections
    assert (read.sku.peak_flops, read.sku.bandwidth_bytes_per_s) == ({"float32": 1e11}, 2e10)
    with pytest.raises(ConfigError, match="was measured on 'cpu' and the plan is for 'b200'"):
        read_device(file, SKUS["b200"])
    file.write_text("{}")
    with pytest.raises(ConfigError, match="does not hold corrections"):
        read_device(file, SKUS["cpu"])


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("peak_flops", "float32"), 0, "the peak in float32 is 0.0; a finite number above 0"),
        (("peak_flops", "float32"), math.nan, "the peak in float32 is nan"),
        pytest.param(("peak_flops", "float32"), 10**400, "the peak in float32 is inf", id="more-than-a-float-holds"),
        (("peak_flops", "float32"), True, "the peak in float32 is True"),
        (("peak_flops",), {}, "no peak in float32, of which there are corrections"),
        (("peak_flops",), [1e11], "AttributeError"),
        (("bandwidth_bytes_per_s",), -2e10, "bandwidth_bytes_per_s is -20000000000.0; a finite number above 0"),
        (("bandwidth_bytes_per_s",), "2e10", "bandwidth_bytes_per_s is '2e10'"),
        (("corrections",), ["float32"], "TypeError"),
        (("corrections", "float32", "product", "value"), 0, "the share of product is 0.0; a finite number above 0"),
        (("corrections", "float32", "product", "source"), ["measured"], r"a figure's source is \['measured'\]; a text"),
        (("corrections", "float32", "call_s", "value"), -1e-6, "a figure is -1e-06; a finite number of at least 0"),
        (("corrections", "float32", "op_s", "value"), None, "a figure is None"),
    ],
)
def test_rates_that_no_device_has_are_refused(place: tuple[str, ...], value: object, message: str, tmp_path: Path) -> None:
    sku = replace(SKUS["cpu"], peak_flops={"float32": 1e11}, bandwidth_bytes_per_s=2e10)
    data = json.loads(json.dumps(Device(sku, {"float32": ASSUMED}).to_json()))
    *outer, last = place
    reduce(getitem, outer, data)[last] = value
    file = tmp_path / "cpu.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match=rf"cpu\.json does not hold corrections \(.*{message}.*\); `reelstep bench planner"):
        read_device(file, SKUS["cpu"])


@pytest.mark.parametrize("data", [b"GIF89a" + bytes(range(128, 256)) * 1000, b"a cat", b"[" * 200_000])
def test_a_file_that_is_no_json_is_refused_in_a_line_without_what_is_in_it(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "cat.gif"
    file.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        read_device(file, SKUS["cpu"])
    assert str(caught.value) == f"{file} is not a JSON file of corrections; `reelstep bench planner --corrections NEWFILE` writes one"


def test_a_file_of_corrections_that_is_not_there_is_named_with_what_writes_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*cpu\.json: No such file or directory; `reelstep bench planner --corrections .*cpu\.json` writes it"):
        read_device(tmp_path / "cpu.json", SKUS["cpu"])


def test_a_cpu_has_to_be_measured_first() -> None:
    with pytest.raises(ConfigError, match=r"reelstep bench planner --corrections cpu\.json"):
        device_of(SKUS["cpu"])


def test_a_sampling_takes_one_or_two_forwards_a_velocity() -> None:
    for nfe, forwards in ((0, 0), (4, 3), (4, 9)):
        with pytest.raises(ConfigError, match="one or two forwards"):
            Sampling("euler", nfe, forwards, "")


def test_a_workload_is_read_from_a_models_programs() -> None:
    config = MovieGenConfig(
        layers=2, width=64, ffn=160, heads=4, latent_channels=8, condition_channels=0, patch=(1, 2, 2), positions=(4, 8, 8), text_widths=(32,),
        time_frequencies=16, time_scale=1000.0, qk_norm=False,
    )  # fmt: skip
    with torch.device("meta"):
        network = MovieGenTransformer(config)
    programs = (time_program(network, 4), denoise_program(network, 24, ()))
    workload = workload_of("small", "no video", programs, {"embed_time": {}, "denoise": {"F": 4, "H": 8, "W": 16}}, {"embed_time": 1, "decode": 3})
    assert asdict(workload.denoiser) | {"tokens": 128, "text_tokens": 24, "layers": 2, "width": 64} == asdict(workload.denoiser)
    (stage,) = workload.stages
    assert (stage.name, stage.calls, stage.keep_f32, stage.parameters) == ("embed_time", 1, True, 16 * 64 + 64 * 64 + 6 * 64**2)
    shared = sum(p.numel() for name, p in network.named_parameters() if not name.startswith(("time.", "text.")))
    assert workload.parameters == shared
