"""The quality harness: what it compares, what it tries, and the page it writes. The whole of it runs by `reelstep bench steps`."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reelstep.benchmarks import steps
from reelstep.benchmarks.page import markdown
from reelstep.benchmarks.steps import candidates, plot, references, ssim
from reelstep.engine.request import Fit
from reelstep.engine.resolve import Ask


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


def test_a_table_and_plots_are_made_of_rows(tmp_path):
    base = {"solver": "euler", "guidance": "cfg", "nfe": 4, "forwards": 8.0, "psnr_db": 20.0, "psnr_sd_db": 1.0, "ssim": 0.9, "ssim_sd": 0.01, "seconds": 0.1}
    rows = [base, {**base, "nfe": 8, "forwards": 16.0, "psnr_db": 26.0}, {**base, "guidance": "adaptive", "forwards": 6.5}]
    assert markdown(rows, list(base)).splitlines()[2].startswith("| euler | cfg | 4 | 8 | 20 |")
    plot(tmp_path / "rows.png", rows, "euler")
    assert (tmp_path / "rows.png").stat().st_size > 5000
