"""Measure views of a video in constant memory: quality against another view, and change from frame to frame."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vidtwin.clips import as_clip
from vidtwin.metrics import frames as metrics
from vidtwin.video import Frames

_NUMBERS_AT_ONCE = 2**24  # values of one view; a metric holds a few copies of 4 bytes each


class RunningMean:
    """Mean of numbers that are added a few at a time."""

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0

    def add(self, values: NDArray[np.float64]) -> None:
        self.total += float(values.sum())
        self.count += values.size

    @property
    def value(self) -> float | None:
        """Return the mean; None before any number."""
        return self.total / self.count if self.count else None


class Quality:
    """PSNR (dB) and SSIM of a view against a target: means over all frames, as 8-bit pictures."""

    def __init__(self) -> None:
        self.psnr, self.ssim = RunningMean(), RunningMean()

    def add(self, view: Frames, target: Frames) -> None:
        """Add the next frames (T, H, W, 3) of both. Frames smaller than SSIM's window of 11 pixels have no SSIM."""
        has_ssim = metrics.ssim_unavailable(*view.shape[1:3]) is None
        step = max(1, _NUMBERS_AT_ONCE // view[0].size)
        for start in range(0, len(view), step):
            shown, wanted = (as_clip([frames[start : start + step]]) for frames in (view, target))
            self.psnr.add(metrics.psnr(shown, wanted).double().numpy())
            if has_ssim:
                self.ssim.add(metrics.ssim(shown, wanted).double().numpy())

    def values(self) -> dict[str, float | None]:
        """Return `psnr` and `ssim`; None if frames have no such value."""
        return {"psnr": self.psnr.value, "ssim": self.ssim.value}


class FrameChange(RunningMean):
    """Mean absolute difference of consecutive frames, in 8-bit steps (0 to 255); None for windows of one frame.

    Frames are compared within a window, since a latent does not determine the next one.
    """

    def add(self, window: Frames) -> None:  # type: ignore[override]
        """Add the frames (T, H, W, 3) of the next window."""
        for before, after in pairwise(window):
            super().add(np.abs(after.astype(np.int16) - before).mean(dtype=np.float64, keepdims=True))
