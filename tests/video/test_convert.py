"""uint8 values and floats in [-1, 1], against the formulas in NumPy."""

import numpy as np
import torch

from vidtwin.video.convert import from_uint8, round_to_uint8, to_clip, to_uint8


def test_uint8_values_become_the_formulas_floats_and_come_back():
    values = torch.arange(256, dtype=torch.uint8)
    expected = values.numpy().astype(np.float32) / np.float32(127.5) - np.float32(1)
    np.testing.assert_array_equal(from_uint8(values).numpy(), expected)
    np.testing.assert_array_equal(round_to_uint8(from_uint8(values)).numpy(), values.numpy())
    assert values.dtype == torch.uint8


def test_floats_are_clamped_and_rounded_to_the_nearest_value_and_ties_to_even():
    values = torch.cat([torch.linspace(-2, 2, 1001), torch.tensor([0.0, 1 / 255])])
    expected = np.rint((values.numpy().clip(-1, 1) + np.float32(1)) * np.float32(127.5))
    np.testing.assert_array_equal(round_to_uint8(values).numpy(), expected)
    clip = values[:1002].reshape(3, 1, 2, 167)
    np.testing.assert_array_equal(to_uint8(clip), expected[:1002].reshape(3, 1, 2, 167).transpose(1, 2, 3, 0))


def test_a_batch_of_frames_becomes_a_contiguous_clip():
    frames = torch.randint(0, 256, (2, 3, 4, 5, 3), dtype=torch.uint8)
    clip = to_clip(frames)
    assert clip.is_contiguous()
    torch.testing.assert_close(clip, frames.permute(0, 4, 1, 2, 3) / 127.5 - 1, rtol=0, atol=0)


def test_axes_are_time_height_width_colour():
    clip = torch.full((3, 2, 4, 6), -1.0)
    clip[1, 0, 2, 5] = 1.0
    shown = to_uint8(clip)
    assert shown.shape == (2, 4, 6, 3)
    assert np.argwhere(shown).tolist() == [[0, 2, 5, 1]]
