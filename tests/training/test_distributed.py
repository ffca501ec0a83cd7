"""Training in two processes under DeepSpeed gives the numbers of one, whose own are held to closed forms elsewhere."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from reelstep.__main__ import main
from reelstep.errors import ConfigError
from reelstep.training.distributed import start
from reelstep.training.trainer import ALONE

sys.path.append(str(Path(__file__).parent))  # what runs in processes is imported there by name
import on_processes

TASK_S = 200
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # of float32 sums in another order, over several steps
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install 'reelstep[deepspeed]'")


class Two:
    """Two processes that wait for tasks: functions of on_processes.py."""

    def __init__(self) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=TASK_S))
        context = get_context("forkserver")
        context.set_forkserver_preload(["on_processes", "deepspeed"])
        self.links, self.children = [], []
        for rank in range(2):
            ours, theirs = context.Pipe()
            child = context.Process(target=on_processes.serve, args=(rank, 2, self.store.port, theirs), daemon=True)
            child.start()
            self.links.append(ours)
            self.children.append(child)

    def run(self, task: Callable[..., Any], *args: Any) -> list[Any]:
        """What `task(*args)` gives in each process."""
        for link in self.links:
            link.send((task.__name__, args))
        answers = []
        for rank, link in enumerate(self.links):
            assert link.poll(TASK_S), f"process {rank} did not answer within {TASK_S} s"
            answers.append(link.recv())
        failed = [f"process {rank}: {text}" for rank, (fine, text) in enumerate(answers) if not fine]
        assert not failed, "\n".join(failed)
        return [value for _, value in answers]


@pytest.fixture(scope="module")
def two() -> Iterator[Two]:
    made = Two()
    yield made
    for child in made.children:
        child.kill()
        child.join()


def assert_same_weights(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, err_msg=name, **CLOSE)


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_steps_of_two_processes_are_those_of_one(two: Two, stage: int, clip: float | None) -> None:
    losses, weights = on_processes.steps(None, clip)
    (first_losses, first_weights), (second_losses, second_weights) = two.run(on_processes.steps, stage, clip)
    np.testing.assert_allclose(first_losses, losses, **CLOSE)
    assert second_losses == first_losses
    assert_same_weights(first_weights, weights)
    assert not second_weights, "weights come whole on the first process alone"


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("adversarial", [0.0, 0.3])
def test_imagine_flash_in_two_processes_gives_the_student_of_one(two: Two, stage: int, adversarial: float) -> None:
    losses, result, student = on_processes.flash(None, 6, None, adversarial)
    found = two.run(on_processes.flash, stage, 6, None, adversarial)
    for each in found:
        np.testing.assert_allclose(each[0], losses, **CLOSE)
        np.testing.assert_allclose(each[1].history, result.history, **CLOSE)
    assert_same_weights(found[0][2], student)


@needs_deepspeed
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_distillation_that_was_interrupted_goes_on_to_the_same_student(two: Two, stage: int, tmp_path: Path) -> None:
    file = tmp_path / "student.pt"
    losses, _, student = on_processes.flash(None, 6, None, 0.3)
    two.run(on_processes.flash, stage, 6, file, 0.3, 5)
    found = two.run(on_processes.flash, stage, 6, file, 0.3)[0]
    np.testing.assert_allclose(found[0], losses[4:], **CLOSE)
    assert_same_weights(found[2], student)
    assert [each.name for each in file.with_suffix(".parts").iterdir()] == ["6"], "only the parts of the last save are kept"
    with pytest.raises(ConfigError, match="this is 1 process; continue"):
        on_processes.flash(None, 6, file, 0.3)


@needs_deepspeed
def test_a_bns_fit_in_two_processes_is_that_of_one_also_when_interrupted(two: Two, tmp_path: Path) -> None:
    losses, table, history, ends = on_processes.bns_fit(None)
    two.run(on_processes.bns_fit, 0, tmp_path / "fit.pt", 5)
    for found, from_there in ((two.run(on_processes.bns_fit, 0), 0), (two.run(on_processes.bns_fit, 0, tmp_path / "fit.pt"), 4)):
        for each in found:
            np.testing.assert_allclose(each[0], losses[from_there:], **CLOSE)
            np.testing.assert_allclose(each[2], history, **CLOSE)
            np.testing.assert_allclose(each[1]["times"], table["times"], **CLOSE)
            # Not the coefficients: noise and the first velocity are collinear in this field, so that many rows make the same states.
            np.testing.assert_allclose(each[3], ends, **CLOSE)


def assert_same_tables(found: Any, wanted: Any) -> None:
    for part in ("times", "a"):
        np.testing.assert_allclose(found[part], wanted[part], **CLOSE)
    for row, want in zip(found["b"], wanted["b"], strict=True):
        np.testing.assert_allclose(row, want, **CLOSE)


@needs_deepspeed
def test_stage_three_trains_a_movie_gen_of_which_each_process_holds_its_part(two: Two) -> None:
    losses, weights, held = on_processes.dit(None)
    found = two.run(on_processes.dit, 3)
    np.testing.assert_allclose(found[0][0], losses, **CLOSE)
    assert_same_weights(found[0][1], weights)
    assert sum(held) > 10_000
    assert [sum(each[2]) for each in found] == [0, 0], "between steps there is nothing but parts"


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_in_half_precision_losses_keep_three_digits(two: Two, stage: int) -> None:
    losses, _, _ = on_processes.dit(None)
    for each in two.run(on_processes.dit, stage, True):
        np.testing.assert_allclose(each[0], losses, rtol=5e-3)  # bfloat16 has 8 bits, and a mean over 1,728 numbers of them is better than one


@needs_deepspeed
@pytest.mark.parametrize("mesh", ["tp=2", "cp=2"])
def test_gradients_of_a_fit_go_through_a_model_that_two_processes_share(two: Two, mesh: str) -> None:
    losses, table, gradient, whole = on_processes.sharded_bns(None)
    assert np.abs(gradient).max() > 0.1
    for each in two.run(on_processes.sharded_bns, mesh):
        np.testing.assert_allclose(each[0], losses, **CLOSE)
        assert_same_tables(each[1], table)
        np.testing.assert_allclose(each[2], gradient, **CLOSE)
        assert each[3] < whole if mesh == "tp=2" else each[3] == whole


@needs_deepspeed
def test_a_loss_or_a_gradient_that_is_not_finite_ends_the_training_in_all_processes(two: Two) -> None:
    for stage in (0, 2, 3):
        assert two.run(on_processes.broken, stage) == [(True, True, True)] * 2


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "mesh", "half", "words"),
    [
        (0, "tp=3", False, "3 ranks, of which 2 processes"),
        (0, "cp=2,ring=2", False, "ring attention has no gradient"),
        (4, "", False, "ZeRO stage 4; one of 0, 1, 2, 3"),
        (0, "", True, "half precision at ZeRO stage 0"),
    ],
)
def test_processes_that_do_not_fit_together_are_refused(two: Two, stage: int, mesh: str, half: bool, words: str) -> None:
    for refusal in two.run(on_processes.refusal, stage, mesh, half):
        assert words in refusal


@needs_deepspeed
def test_a_batch_that_processes_cannot_share_is_refused_before_any_work(two: Two) -> None:
    for refusal in two.run(on_processes.odd_batch):
        assert "7 pairs of a batch do not divide into 2 equal shares; take 6 or 8" in refusal


@needs_deepspeed
def test_references_are_the_same_whoever_solves_them(two: Two, tmp_path: Path) -> None:
    alone = on_processes.references(None, tmp_path / "alone.pt")
    for found in two.run(on_processes.references, 0, tmp_path / "pairs.pt"):
        np.testing.assert_array_equal(found, alone)
    assert {each.name for each in tmp_path.glob("pairs*")} == {"pairs_0_of_2.pt", "pairs_1_of_2.pt"}


@pytest.mark.parametrize(("stage", "mesh", "asked"), [(2, "", "ZeRO stage 2"), (0, "tp=2", "mesh tp=2")])
def test_what_takes_several_processes_is_refused_in_one(stage: int, mesh: str, asked: str) -> None:
    with pytest.raises(ConfigError, match=f"{asked} needs several processes, and this is one; start them with: torchrun"), start(stage, mesh):
        pass


def test_one_process_needs_no_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with start() as processes:
        assert processes is ALONE
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")  # as torchrun sets it
    with pytest.raises(ConfigError, match=r"pip install 'reelstep\[deepspeed\]'"), start():
        pass


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["", "tp=2"])
def test_a_fit_that_torchrun_starts_writes_the_artifact_of_one_process(mesh: str, tmp_path: Path) -> None:
    options = ["reel-tiny", "--pairs", "8", "--scale", "2", "--task", "text_to_image", "--nfe", "2", "--tolerance", "0.1", "--iterations", "4"]
    assert main(["fit", "bns", *options, "-o", str(tmp_path / "one.json"), "--cache", str(tmp_path / "one")]) == 0
    start_two = [sys.executable, "-P", "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "reelstep", "fit", "bns", *options, "--mesh", mesh]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([*start_two, "-o", str(tmp_path / "two.json"), "--cache", str(tmp_path / "two")], check=True, timeout=TASK_S, env=environment, cwd=tmp_path)
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one["model_hash"] == two["model_hash"]
    assert two["scores_db"]["two"] == pytest.approx(one["scores_db"]["one"], abs=0.05)  # products in bfloat16, of other sizes
    assert two["conditions"]["processes"].startswith("2 processes")
