"""Flicker: what a reconstruction adds to the change from frame to frame."""

import pytest
import torch

from vidtwin.errors import UserError
from vidtwin.metrics import flicker


def test_it_is_the_mean_error_of_frame_differences_in_the_unit_range() -> None:
    torch.manual_seed(0)
    target, prediction = (torch.rand(2, 3, 5, 4, 6, dtype=torch.float64) * 2 - 1 for _ in range(2))
    expected = []
    for x, y in zip(prediction.numpy() / 2, target.numpy() / 2, strict=True):
        steps = [abs((x[:, t + 1] - x[:, t]) - (y[:, t + 1] - y[:, t])) for t in range(4)]
        expected.append(sum(step.mean() for step in steps) / 4)
    torch.testing.assert_close(flicker(prediction, target), torch.tensor(expected, dtype=torch.float64))


def test_a_constant_error_does_not_flicker_and_one_of_every_other_frame_does() -> None:
    target = torch.linspace(-0.5, 0.5, 6).view(1, 1, 6, 1, 1).expand(1, 3, 6, 8, 8)
    assert flicker(target + 0.1, target).item() == pytest.approx(0.0, abs=1e-7)
    blinking = target + 0.2 * (torch.arange(6) % 2).view(1, 1, 6, 1, 1)
    assert flicker(blinking, target).item() == pytest.approx(0.1)


def test_values_beyond_the_range_are_clamped() -> None:
    target = torch.ones(1, 3, 3, 8, 8)
    assert flicker(target + torch.rand(1, 3, 3, 8, 8), target) == 0


def test_one_frame_has_none() -> None:
    frame = torch.zeros(1, 3, 1, 8, 8)
    with pytest.raises(UserError, match="at least 2 frames for flicker, got 1"):
        flicker(frame, frame)
