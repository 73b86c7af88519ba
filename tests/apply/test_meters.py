"""Measures of views against a naive computation over the whole video, and against scikit-image."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from vidtwin.apply.meters import FrameChange, Quality
from vidtwin.metrics import frames as metrics


def video(length=23, height=20, width=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (length, height, width, 3), dtype=np.uint8)


def windows(frames, length):
    return [frames[start : start + length] for start in range(0, len(frames), length)]


def test_psnr_is_the_mean_over_frames_of_that_of_8_bit_pictures():
    view, target = video(seed=1), video(seed=2)
    meter = Quality()
    for pair in zip(windows(view, 5), windows(target, 5), strict=True):
        meter.add(*pair)
    each = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(target, view, strict=True)]
    assert meter.psnr.value == pytest.approx(np.mean(each), abs=1e-4)
    assert meter.psnr.count == 23


def test_few_frames_at_a_time_give_the_same_values_as_all_at_once(monkeypatch):
    view, target = video(seed=1), video(seed=2)
    whole, parts = Quality(), Quality()
    whole.add(view, target)
    monkeypatch.setattr("vidtwin.apply.meters._NUMBERS_AT_ONCE", 2 * view[0].size)
    parts.add(view, target)
    for name in ("psnr", "ssim"):
        assert getattr(parts, name).value == pytest.approx(getattr(whole, name).value, rel=1e-6)
        assert getattr(parts, name).count == 23


def test_a_view_is_like_itself_and_one_too_small_for_ssim_has_none():
    meter = Quality()
    meter.add(video(), video())
    assert meter.ssim.value == pytest.approx(1)
    assert meter.psnr.value == pytest.approx(80)  # where metrics.psnr ends
    small = Quality()
    small.add(video(height=10), video(height=10))
    assert small.ssim.value is None
    assert metrics.ssim_unavailable(10, 24)
    assert Quality().psnr.value is None


def test_change_is_the_mean_absolute_difference_of_consecutive_frames_within_windows():
    frames = video()
    whole, parts = FrameChange(), FrameChange()
    whole.add(frames)
    steps = np.abs(np.diff(frames.astype(int), axis=0)).mean(axis=(1, 2, 3))
    assert whole.value == pytest.approx(steps.mean())
    for window in windows(frames, 8):
        parts.add(window)
    within = [step for place, step in enumerate(steps, start=1) if place % 8]
    assert len(within) == 20
    assert parts.value == pytest.approx(np.mean(within))
    still = FrameChange()
    still.add(np.repeat(frames[:1], 4, axis=0))
    assert still.value == 0
    single = FrameChange()
    single.add(frames[:1])
    assert single.value is None
