"""The list of metrics: names, units, directions and digits. It needs no torch, so tables and plots read it too."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A measure of reconstruction quality.

    Attributes:
        key: Its name in `clips.csv` and `results.json`.
        label: Its name for readers.
        unit: "dB", or nothing.
        higher: Whether more is better.
        digits: Digits after the point.
        needs: The conditions under which it can be measured.
        per_clip: Whether each clip has a value; rFVD needs the whole set.
        shown: Whether tables and plots have it; MSE only serves to compute PSNR.
    """

    key: str
    label: str
    unit: str
    higher: bool
    digits: int
    needs: str = ""
    per_clip: bool = True
    shown: bool = True

    @property
    def title(self) -> str:
        """Label and unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def text(self, value: float | None) -> str:
        """Format a value for readers; an absent one is empty."""
        if value is None:
            return ""
        return "not a number" if math.isnan(value) else "∞" if math.isinf(value) else f"{value:.{self.digits}f}"


METRICS = (
    Metric("mse", "MSE", "", False, 5, shown=False),
    Metric("psnr", "PSNR", "dB", True, 2),
    Metric("ssim", "SSIM", "", True, 4, "11 px a side, `uniform7` 7"),
    Metric("ms_ssim", "MS-SSIM", "", True, 4, "176 px a side"),
    Metric("lpips", "LPIPS", "", False, 4, "the network's file"),
    Metric("lpips_alex", "LPIPS (alex)", "", False, 4, "the network's file"),
    Metric("lpips_vgg", "LPIPS (vgg)", "", False, 4, "the network's file"),
    Metric("flicker", "Flicker", "", False, 5, "2 frames"),
    Metric("vmaf", "VMAF", "", True, 2, "`vmaf: true`, the extra `vmaf`, 32 px a side"),
    Metric("rfvd", "rFVD", "", False, 1, "an I3D network, 10 frames", per_clip=False),
)
BY_KEY = {metric.key: metric for metric in METRICS}
PER_CLIP = tuple(metric.key for metric in METRICS if metric.per_clip)
SHOWN = tuple(metric for metric in METRICS if metric.shown)
