"""States to go on from: what is damaged, of other options, or does not fit on the disk is told in a line, and nothing is lost."""

import os

import pytest
import torch

from reelstep.errors import ConfigError, StorageError
from reelstep.training import checkpoint


@pytest.mark.parametrize("keeps", [0, 1, 300])
def test_a_file_that_was_cut_off_is_named_with_what_to_do(keeps, tmp_path):
    file = tmp_path / "student.pt"
    checkpoint.save(file, {"weights": torch.zeros(100)})
    os.truncate(file, keeps)
    with pytest.raises(ConfigError, match=r"student\.pt cannot be read as what was saved there \(.+\); remove it to begin again") as caught:
        checkpoint.load(file)
    assert "\n" not in str(caught.value)


def test_only_the_options_that_differ_are_named(tmp_path):
    file = tmp_path / "lora.pt"
    checkpoint.save(file, {"asked": {"seed": 0, "clips": 100, "rank": 4}})
    assert checkpoint.load(file, asked={"seed": 0, "clips": 100, "rank": 4}) is not None
    with pytest.raises(ConfigError, match=r"lora\.pt was saved with clips 100, asked for 300; rank 4, asked for 8\. Go on"):
        checkpoint.load(file, asked={"seed": 0, "clips": 300, "rank": 8})
    checkpoint.save(file, {"step": 3})
    with pytest.raises(ConfigError, match="saved with seed unknown, asked for 0"):
        checkpoint.load(file, asked={"seed": 0})


def test_a_full_disk_keeps_the_old_state_and_no_half_of_the_new_one(tmp_path, monkeypatch):
    file = tmp_path / "student.pt"
    checkpoint.save(file, {"step": 1})

    def full(state, path):
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nframe #0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(StorageError, match=r"cannot write .*student\.pt: \[enforce .* vs 0; what was saved before is unchanged\. Free some space"):
        checkpoint.save(file, {"step": 2})
    assert os.listdir(tmp_path) == ["student.pt"]
    assert checkpoint.load(file) == {"step": 1}
