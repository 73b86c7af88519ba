"""Motion, change, texture and cuts of made-up clips whose values are known."""

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from vidtwin.benchmark.clip_content import measure_content


def moved(step: tuple[int, int], side: int = 96, frames: int = 5) -> NDArray[np.uint8]:
    """A part of smooth noise that moves by `step` pixels a frame, down and to the right."""
    noise = np.random.default_rng(0).normal(size=(200, 200))
    for axis in (0, 1):
        noise = sum(np.roll(noise, shift, axis) for shift in range(-4, 5))
    picture = ((noise - noise.min()) / np.ptp(noise) * 255).astype(np.uint8)
    shifted = [np.roll(picture, (time * step[0], time * step[1]), (0, 1))[50 : 50 + side, 50 : 50 + side]
               for time in range(frames)]  # fmt: skip
    return np.repeat(np.stack(shifted)[..., None], 3, 3)


@pytest.mark.parametrize("step", [(0, 0), (2, 0), (3, 4)])
def test_motion_is_the_length_of_the_movement_in_pixels(step):
    assert measure_content(moved(step))["motion"] == pytest.approx(np.hypot(*step), rel=0.15)


def test_sides_that_are_no_multiple_of_a_block_and_tiny_pictures_are_measured():
    assert measure_content(moved((2, 0), side=93))["motion"] == pytest.approx(2, rel=0.15)
    assert measure_content(moved((0, 0), side=5))["motion"] == 0


def test_change_and_texture_are_mean_differences_in_time_and_space():
    clip = moved((2, 1))
    steps = [np.abs(after.astype(float) - before).mean() for before, after in pairwise(clip)]
    assert measure_content(clip)["change"] == pytest.approx(np.mean(steps))
    ramp = np.broadcast_to(np.arange(0, 60, 2, dtype=np.uint8)[None, None, :, None], (3, 30, 30, 3)).copy()
    assert measure_content(ramp)["texture"] == pytest.approx(2)  # steps a pixel, along the rows


def test_a_cut_is_a_change_far_above_its_neighbours():
    clip = np.zeros((9, 16, 16, 3), np.uint8)
    clip[3:6] = 100
    assert measure_content(clip)["cuts"] == 2
    fade = np.arange(0, 250, 30, dtype=np.uint8)[:, None, None, None]  # by 12% of the range in each frame
    assert measure_content(np.broadcast_to(fade, (9, 16, 16, 3)).copy())["cuts"] == 0
    assert measure_content(clip[:1]) == {"motion": 0, "change": 0, "texture": 0, "cuts": 0}
