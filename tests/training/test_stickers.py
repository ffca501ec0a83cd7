"""The data of reel-tiny: motions against their geometry, captions, the split. Most need no font: a drawn texture does."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from reelstep.training.zoo import stickers
from reelstep.training.zoo.stickers import (
    BACKGROUNDS,
    FRAMES,
    MOTIONS,
    NAMES,
    SIDE,
    Sticker,
    caption,
    is_held_out,
    load_stickers,
    make_clips,
    pose_of,
    render,
    words,
)

MIDDLE = FRAMES // 2


def square() -> torch.Tensor:
    """A red square in the left half of a clear texture."""
    texture = torch.zeros(4, 48, 48)
    texture[0, 16:32, 8:24] = texture[3, 16:32, 8:24] = 1
    return texture


def clip(motion: str, amount: int = 1) -> torch.Tensor:
    return render(square()[None], [pose_of(motion, amount)], torch.zeros(1, 3))[0]


def centre(frame: torch.Tensor) -> tuple[float, float]:
    """Centre of mass of red, in pixels from the middle: (x, y)."""
    mass = frame[0] + 1
    axis = torch.arange(SIDE) - (SIDE - 1) / 2
    return float((mass.sum(0) * axis).sum() / mass.sum()), float((mass.sum(1) * axis).sum() / mass.sum())


@pytest.mark.parametrize("motion", list(MOTIONS))
def test_the_middle_frame_is_the_rest_pose(motion):
    assert torch.allclose(clip(motion)[:, MIDDLE], clip("still")[:, MIDDLE], atol=1e-5)


@pytest.mark.parametrize(("motion", "x", "y"), [("slide_left", -1, 0), ("slide_right", 1, 0), ("slide_up", 0, -1), ("slide_down", 0, 1)])
def test_slides_go_where_they_say_by_their_amplitude(motion, x, y):
    video = clip(motion, amount=0)
    amplitude = MOTIONS[motion].amplitudes[0]
    first, rest = centre(video[:, 0]), centre(video[:, MIDDLE])
    assert first[0] - rest[0] == pytest.approx(-x * amplitude, abs=0.2)
    assert first[1] - rest[1] == pytest.approx(-y * amplitude, abs=0.2)


@pytest.mark.parametrize(("motion", "sign"), [("spin_clockwise", 1), ("spin_counterclockwise", -1)])
def test_spins_turn_the_way_a_clock_does_or_does_not(motion, sign):
    video = clip(motion, amount=0)
    angles = [math.atan2(*reversed(centre(video[:, i]))) for i in (MIDDLE, MIDDLE + 1)]
    turned = (angles[1] - angles[0] + math.pi) % (2 * math.pi) - math.pi  # y points down, so clockwise is positive
    assert turned == pytest.approx(sign * MOTIONS[motion].amplitudes[0] / 4, abs=0.05)


@pytest.mark.parametrize(("motion", "sign"), [("grow", 1), ("shrink", -1)])
def test_scaling_changes_the_area_by_the_square(motion, sign):
    mass = [(frame + 1).sum() for frame in clip(motion).unbind(1)]
    u = -0.25
    assert float(mass[MIDDLE - 1] / mass[MIDDLE]) == pytest.approx((1 + sign * 0.35 * u) ** 2, rel=0.02)


def test_fading_scales_the_opacity():
    video = clip("fade", amount=2)
    peaks = [float(frame[0].max() + 1) / 2 for frame in video.unbind(1)]
    assert peaks == pytest.approx([0, 0.25, 0.5, 0.75, 1, 0.75, 0.5, 0.25], abs=0.02)


def test_a_coin_flip_mirrors_the_picture():
    video = clip("flip", amount=2)
    assert torch.allclose(video[:, 0], video[:, MIDDLE].flip(-1), atol=1e-4)


def test_clear_places_show_the_background():
    video = render(torch.zeros(1, 4, 48, 48), [pose_of("spin_clockwise", 2)], torch.tensor([[0.2, 0.4, 0.6]]))
    assert torch.allclose(video[0, :, :, 0, 0].T, torch.tensor([0.2, 0.4, 0.6]) * 2 - 1)


def test_captions_name_the_thing_the_background_and_the_motion():
    rng = np.random.default_rng(0)
    for motion in MOTIONS:
        for background in BACKGROUNDS:
            text = caption(rng, "red heart", motion, 2, background)
            assert "red heart" in text
            assert background in text
            assert any(phrase in text for phrase in MOTIONS[motion].phrases)


def test_a_batch_is_a_function_of_its_seed():
    things = [Sticker(1, "square", False, square())]
    one, two, other = (make_clips(things, np.random.default_rng(s), 3) for s in (0, 0, 1))
    assert torch.equal(one.video, two.video)
    assert one.captions == two.captions
    assert not torch.equal(one.video, other.video)
    assert torch.equal(one.picture[:, :, 0], one.video[:, :, MIDDLE])


def test_varied_clips_are_mirrored_half_the_time_and_larger_or_smaller_half_the_time():
    clips = make_clips([Sticker(1, "square", False, square())], np.random.default_rng(0), 200, ["still"], varied=True)
    there = (clips.picture[:, :, 0] - clips.picture[:, :, 0, :1, :1]).abs().sum(1) > 0.05
    left, right = there[:, :, :32].flatten(1).sum(1), there[:, :, 32:].flatten(1).sum(1)
    assert 0.35 < float((right > left).float().mean()) < 0.65
    area = there.flatten(1).sum(1).float()
    plain = area.median()
    assert 0.35 < float(((area / plain - 1).abs() > 0.05).float().mean()) < 0.6
    assert float(area.max() / plain) > 1.4**2 * 0.9
    assert float(area.min() / plain) < 0.9**2


def test_one_in_ten_is_held_out_by_its_code_point_alone():
    share = sum(map(is_held_out, range(0x1F300, 0x1FB00))) / (0x1FB00 - 0x1F300)
    assert 0.08 < share < 0.12
    assert [is_held_out(c) for c in (0x1F600, 0x1F680, 0x2764)] == [False, False, False]


def test_names_lose_the_words_of_typography():
    assert words("HEAVY BLACK HEART") == "heart"
    assert words("BLACK SIGN") == "black sign"


@pytest.mark.skipif(not stickers.FONT.exists(), reason="needs Debian's package fonts-noto-color-emoji")
def test_the_font_gives_over_a_thousand_pictures():
    pytest.importorskip("fontTools", reason="needs the training extra")
    found = load_stickers()
    assert len(found) > 1000
    assert {"red heart", "cat", "pizza"} <= {s.name for s in found}
    assert all(s.texture.shape == (4, 48, 48) and float(s.texture.max()) <= 1 for s in found)
    assert len({s.codepoint for s in found}) == len(found)


def test_the_docs_list_the_names_that_were_trained_on() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    listed = page.split("by an everyday name: ")[1].split(". ")[0].replace("\n", " ").split(", ")
    assert listed == [name for codepoint, name in NAMES.items() if not is_held_out(codepoint)]
