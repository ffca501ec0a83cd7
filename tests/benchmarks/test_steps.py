"""The quality harness: what it compares, what it tries, and the page it writes. The whole of it runs by `reelstep bench steps`."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reelstep.benchmarks import steps
from reelstep.benchmarks.page import markdown
from reelstep.benchmarks.steps import candidates, joined, plot, references, ssim
from reelstep.engine.request import Fit
from reelstep.engine.resolve import Ask
from reelstep.errors import ConfigError


def clip(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)


def test_ssim_is_one_for_equal_clips_and_near_zero_for_noise():
    assert ssim(clip(0), clip(0)) == pytest.approx(1.0)
    assert abs(ssim(clip(0), clip(1))) < 0.1


def test_exact_videos_are_kept_and_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch):
    solved = []

    def solve(field, noise, tolerance):
        solved.append(len(noise))
        if len(solved) == 2:
            raise KeyboardInterrupt
        return noise[None]

    monkeypatch.setattr(steps, "solve", solve)

    class Fields:
        def __init__(self):
            self.programs = {"decode": SimpleNamespace(module=lambda z: z)}

        def __call__(self, index):
            return None

    noise, path = torch.linspace(-1, 1, 10 * 3 * 2 * 4 * 4).reshape(10, 3, 2, 4, 4), tmp_path / "exact.npy"
    with pytest.raises(KeyboardInterrupt):
        references(Fields(), noise, 1, 1e-4, path)
    found = references(Fields(), noise, 1, 1e-4, path)
    assert solved == [8, 2, 2]
    assert np.array_equal(np.stack(found), np.round((noise.numpy().transpose(0, 2, 3, 4, 1)[:, :1] + 1) * 127.5).astype(np.uint8)), "one frame of two"
    assert len(references(Fields(), noise, 1, 1e-4, path)) == 10
    assert solved == [8, 2, 2], "all of it was there"


SERVED = SimpleNamespace(
    solvers=("euler", "midpoint", "rk4", "lcm", "bns_6"),
    fits={"bns_6": Fit(("text_to_video",), "bns_6", "", 6, "cfg", {}, 3.0)},
    guidance_rules={"none": {}, "cfg": {}, "delta_hold": {"stop": 0.5}},
)


def test_every_solver_spends_exactly_the_nfe_that_it_is_compared_at_and_stochastic_ones_only_the_least_and_the_greatest():
    tried = [(ask.solver, ask.guidance, ask.steps) for ask in candidates(SimpleNamespace(models={"toy": SERVED}), Ask(""), [4, 6, 8])]
    assert tried == [
        ("euler", "", 4), ("euler", "", 6), ("euler", "", 8), ("midpoint", "", 2), ("midpoint", "", 3), ("midpoint", "", 4), ("rk4", "", 1), ("rk4", "", 2),
        ("lcm", "", 4), ("lcm", "", 8), ("bns_6", "", None), ("", "delta_hold", 4), ("", "delta_hold", 6), ("", "delta_hold", 8),
        *[("", "delta_hold", None)] * 3,
    ]  # fmt: skip


def test_a_rule_that_ends_at_a_time_is_tried_with_several_at_the_tasks_own_steps():
    tried = candidates(SimpleNamespace(models={"toy": SERVED}), Ask(""), [4])
    assert [ask.guidance_options for ask in tried if ask.guidance and ask.steps is None] == [{"stop": 0.25}, {"stop": 0.375}, {"stop": 0.75}]


def test_stops_and_their_steps_can_be_chosen_and_a_schedule_is_everyones():
    tried = candidates(SimpleNamespace(models={"toy": SERVED}), Ask("", schedule="karras"), [4], [0.6, 0.7], 20)
    assert [(ask.guidance_options, ask.steps) for ask in tried if ask.guidance][1:] == [({"stop": 0.6}, 20), ({"stop": 0.7}, 20)]
    assert {ask.schedule for ask in tried} == {"karras"}


def test_one_nfe_is_one_row_of_a_stochastic_solver():
    tried = candidates(SimpleNamespace(models={"toy": SERVED}), Ask(""), [16])
    assert [ask.steps for ask in tried if ask.solver == "lcm"] == [16]


@pytest.mark.parametrize("full", [Ask("", scale=1.0), Ask("", scale=3.0, guidance="picture_and_text", guidance_options={"picture": 1.5})])
def test_where_cfg_is_not_full_guidance_solvers_alone_are_compared(full):
    tried = candidates(SimpleNamespace(models={"toy": SERVED}), full, [4])
    assert {ask.solver for ask in tried} == set(SERVED.solvers)
    assert {ask.guidance for ask in tried} == {full.guidance}


def row(solver: str, nfe: int, psnr_db: float, guidance: str = "cfg", stop: float | None = None) -> dict[str, object]:
    return {"solver": solver, "guidance": guidance, "stop": stop, "nfe": nfe, "psnr_db": psnr_db}


@pytest.fixture
def earlier(tmp_path):
    """A file of an earlier run, as `report` writes it."""
    about = {"command": "reelstep bench steps --nfe 4 12", "commit": "abc", "load_1min": 2.0, "time": "now"}
    rows = [row("heun", 4, 1.0), row("heun", 12, 2.0), row("ab2", 12, 3.0), row("ab2", 12, 4.0, "interval", 0.5), row("ab2", 12, 5.0, "interval", 0.25)]
    (tmp_path / "a.json").write_text(json.dumps({"benchmark": "steps", "conditions": about, "task": "text_to_video", "samples": 64, "rows": rows}))
    return tmp_path / "a.json"


def test_rows_join_those_of_an_earlier_run_and_replace_what_was_measured_again(earlier):
    rows, about = joined([row("heun", 6, 1.5), row("ab2", 12, 3.5), row("deis", 6, 9.0)], earlier, {"task": "text_to_video", "samples": 64})
    assert [(r["solver"], r["guidance"], r["nfe"], r["stop"], r["psnr_db"]) for r in rows] == [
        ("heun", "cfg", 4, None, 1.0), ("heun", "cfg", 6, None, 1.5), ("heun", "cfg", 12, None, 2.0), ("ab2", "cfg", 12, None, 3.5),
        ("ab2", "interval", 12, 0.5, 4.0), ("ab2", "interval", 12, 0.25, 5.0), ("deis", "cfg", 6, None, 9.0),
    ]  # fmt: skip
    assert about == {"task": "text_to_video", "samples": 64, "before": "reelstep bench steps --nfe 4 12, commit abc, load 2.0, now;"}
    earlier.write_text(json.dumps({**json.loads(earlier.read_text()), "before": "the first;"}))
    assert joined((), earlier, {})[1]["before"].startswith("the first; reelstep bench steps --nfe 4 12,")


def test_rows_of_another_comparison_are_not_joined(earlier, tmp_path):
    with pytest.raises(ConfigError, match="samples 64 instead of 8"):
        joined((), earlier, {"samples": 8})
    (tmp_path / "bad.json").write_text("[]")
    for file in ("bad.json", "none.json"):
        with pytest.raises(ConfigError, match="cannot add to"):
            joined((), tmp_path / file, {})


def test_a_table_and_plots_are_made_of_rows(tmp_path):
    base = {"solver": "euler", "guidance": "cfg", "nfe": 4, "forwards": 8.0, "psnr_db": 20.0, "psnr_sd_db": 1.0, "ssim": 0.9, "ssim_sd": 0.01, "seconds": 0.1}
    rows = [base, {**base, "nfe": 8, "forwards": 16.0, "psnr_db": 26.0}, {**base, "guidance": "adaptive", "forwards": 6.5}]
    assert markdown(rows, list(base)).splitlines()[2].startswith("| euler | cfg | 4 | 8 | 20 |")
    plot(tmp_path / "rows.png", rows, "euler")
    assert (tmp_path / "rows.png").stat().st_size > 5000
