"""The recipe of the features: what is asked, what a step sees, that a run is resumed to the same bits, and what the shipped weights can tell."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from reelstep.benchmarks.frechet import WEIGHTS
from reelstep.training import checkpoint
from reelstep.training.zoo import sticker_features, stickers
from reelstep.training.zoo.sticker_features import (
    FEATURES,
    Heads,
    StickerFeatures,
    accuracies,
    export,
    load,
    loss_of,
    standardise,
    train,
    truth_of,
    window,
)
from reelstep.training.zoo.stickers import BACKGROUNDS, FRAMES, MOTIONS, NAMES, Sticker, load_stickers, make_clips


def drawn() -> list[Sticker]:
    """Two everyday stickers, one without a common name, one held out."""
    torch.manual_seed(0)
    red, gray = torch.zeros(4, 48, 48), torch.zeros(4, 48, 48)
    red[0, 16:32, 8:24] = red[3, 16:32, 8:24] = 1
    gray[:, 8:40, 20:28] = 0.7
    return [Sticker(0x2764, "red heart", False, red), Sticker(0x2B50, "yellow star", False, gray), Sticker(1, "bar", False, gray), Sticker(2, "box", True, red)]


def clips(count: int, seed: int = 0):
    return make_clips(drawn(), np.random.default_rng(seed), count)


def test_a_step_sees_all_frames_half_the_time_else_any_fewer_with_the_rest_pose_among_them():
    rng = np.random.default_rng(0)
    seen = [window(rng) for _ in range(2000)]
    assert all(0 <= w.start <= FRAMES // 2 < w.stop <= FRAMES for w in seen)
    counts = np.bincount([w.stop - w.start for w in seen], minlength=FRAMES + 1)[1:]
    assert counts / 2000 == pytest.approx([1 / 14] * 7 + [1 / 2], abs=0.045), "four deviations of a half"


def test_labels_are_those_of_the_clip():
    made = clips(30)
    name, background, motion = truth_of(made, ["red heart", "yellow star"])
    for i in range(30):
        assert made.names[i] == ["red heart", "yellow star", made.names[i]][name[i]] if name[i] >= 0 else made.names[i] in ("bar", "box")
        assert made.backgrounds[i] == list(BACKGROUNDS)[background[i]]
        assert made.motions[i] == list(MOTIONS)[motion[i]]


def test_who_knows_nothing_has_the_loss_of_a_guess():
    truth = [torch.tensor([0, -100, -100, 1]), torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 3])]
    guesses = [torch.zeros(4, 37), torch.zeros(4, 12), torch.zeros(4, 13)]
    assert float(loss_of(guesses, truth, 8)) == pytest.approx(math.log(37) / 2 + math.log(12) + math.log(13), rel=1e-6)
    assert float(loss_of(guesses, truth, 1)) == pytest.approx(math.log(37) / 2 + math.log(12), rel=1e-6), "a picture has no motion"
    truth[0][:] = -100
    assert float(loss_of(guesses, truth, 1)) == pytest.approx(math.log(12), rel=1e-6), "nobody is asked for a name that is not known"


def test_after_standardising_features_have_mean_0_and_deviation_1_and_the_heads_say_the_same():
    model, heads, video = StickerFeatures().eval(), Heads(5), clips(48).video
    with torch.no_grad():
        before = heads(model(video))
        for _ in range(2):  # a second time from there on
            standardise(model, heads, video[:40])
            features = model(video)
            assert torch.allclose(features[:40].mean(0), torch.zeros(FEATURES), atol=1e-4)
            assert torch.allclose(features[:40].std(0), torch.ones(FEATURES), atol=1e-3)
            for one, two in zip(before, heads(features), strict=True):
                assert torch.allclose(one, two, atol=1e-4)


def test_export_keeps_kernels_to_bfloat16_and_statistics_exactly(tmp_path):
    model, heads = StickerFeatures(), Heads(5)
    model(clips(4).video)  # moves the statistics
    export(model, heads, tmp_path / "new" / "features.safetensors")
    again, others = load(tmp_path / "new" / "features.safetensors")
    for one, two in ((model, again), (heads, others)):
        for name, value in one.state_dict().items():
            kept = two.state_dict()[name]
            assert torch.equal(kept, value.bfloat16().float() if value.ndim > 1 else value), name
    assert not again.training


def test_a_run_that_was_cut_off_ends_as_one_that_was_not(tmp_path, monkeypatch):
    monkeypatch.setattr(sticker_features, "load_stickers", drawn)
    monkeypatch.setattr(sticker_features, "SAVE_EVERY", 2)
    monkeypatch.setattr(sticker_features, "SCORED", 8)
    train(4, 4, 0, 1e-3, tmp_path / "whole", tmp_path / "whole.safetensors")
    calls = iter(range(3))

    def cut_off(*args, **kwargs):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return make_clips(*args, **kwargs)

    monkeypatch.setattr(sticker_features, "make_clips", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train(4, 4, 0, 1e-3, tmp_path / "cut", tmp_path / "cut.safetensors")
    saved = checkpoint.load(tmp_path / "cut" / "features.pt")
    assert saved is not None
    assert saved["step"] == 2
    monkeypatch.setattr(sticker_features, "make_clips", make_clips)
    train(4, 4, 0, 1e-3, tmp_path / "cut", tmp_path / "cut.safetensors")
    whole, cut = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert [name for name in whole if not torch.equal(whole[name], cut[name])] == []


def test_every_parameter_learns(tmp_path, monkeypatch):
    monkeypatch.setattr(sticker_features, "load_stickers", drawn)
    monkeypatch.setattr(sticker_features, "SCORED", 8)
    torch.manual_seed(0)
    model, heads = StickerFeatures(), Heads(2)
    train(2, 8, 0, 1e-3, tmp_path, tmp_path / "features.safetensors")
    saved = checkpoint.load(tmp_path / "features.pt")
    assert saved is not None
    for part, module in (("model", model), ("heads", heads)):
        assert [name for name, value in module.named_parameters() if torch.equal(value, saved[part][name])] == []


@pytest.mark.skipif(not stickers.FONT.exists(), reason="needs Debian's package fonts-noto-color-emoji")
def test_the_shipped_weights_tell_names_backgrounds_and_motions():
    pictures, shipped = load_stickers(), load(WEIGHTS)
    everyday, held_out = [s for s in pictures if s.codepoint in NAMES and not s.held_out], [s for s in pictures if s.held_out]
    seen, unseen = (make_clips(things, np.random.default_rng(5), 256, varied=True) for things in (everyday, held_out))
    limits = [0.955, 0.98, 0.885]  # the card's, less four deviations of a share of 256
    assert all(np.array(accuracies(*shipped, seen, sorted(s.name for s in everyday))) > limits)
    assert all(np.array(accuracies(*shipped, unseen, [])[1:]) > limits[1:])
