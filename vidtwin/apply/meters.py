"""How like another view a view of a video is, and how much it changes from frame to frame; in constant memory."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vidtwin.clips import as_clip
from vidtwin.metrics import frames as metrics
from vidtwin.video import Frames

_NUMBERS_AT_ONCE = 2**24  # pixels' channels of one view: a metric holds a few copies of 4 bytes each


class Mean:
    """Of numbers that come a few at a time; None where none came."""

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0

    def add(self, values: NDArray[np.float64]) -> None:
        self.total += float(values.sum())
        self.count += values.size

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


class Likeness:
    """PSNR in dB and SSIM of a view against another one: means over all frames, of 8-bit pictures."""

    def __init__(self) -> None:
        self.psnr, self.ssim = Mean(), Mean()

    def add(self, view: Frames, target: Frames) -> None:
        """The next frames (T, H, W, 3) of both. Frames below SSIM's window of 11 pixels have no SSIM."""
        has_ssim = metrics.ssim_allowed(*view.shape[1:3]) is None
        step = max(1, _NUMBERS_AT_ONCE // view[0].size)
        for start in range(0, len(view), step):
            shown, wanted = (as_clip([frames[start : start + step]]) for frames in (view, target))
            self.psnr.add(metrics.psnr(shown, wanted).double().numpy())
            if has_ssim:
                self.ssim.add(metrics.ssim(shown, wanted).double().numpy())


class Change:
    """Mean absolute difference of each frame to the one before it, in 8-bit steps (0 to 255).

    Frames are compared within a window, since a latent says nothing about the next one.
    """

    def __init__(self) -> None:
        self.mean = Mean()

    def add(self, window: Frames) -> None:
        """The frames (T, H, W, 3) of the next window."""
        for before, after in pairwise(window):
            self.mean.add(np.abs(after.astype(np.int16) - before).mean(dtype=np.float64, keepdims=True))

    @property
    def value(self) -> float | None:
        """None of windows of one frame."""
        return self.mean.value
