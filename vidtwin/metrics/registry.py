"""The list of metrics: names, units, directions, digits, needs; without torch, as tables and plots read it too."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: Its name in a program.
        label: Its name for readers.
        unit: "dB", "%", or nothing.
        higher: Whether more is better; None if neither is.
        needs: The conditions under which it can be measured.
        words: Whether it holds words, not numbers.
    """

    key: str
    label: str
    unit: str = ""
    higher: bool | None = None
    needs: str = ""
    words: bool = False

    @property
    def title(self) -> str:
        """Label and unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label


@dataclass(frozen=True)
class Metric(Column):
    """A measure of reconstruction quality; its key names it in `clips.csv` and `results.json`.

    Attributes:
        digits: Digits after the point.
        per_clip: Whether each clip has a value; rFVD needs the whole set.
        shown: Whether tables and plots have it as a measure of quality; MSE only serves to compute PSNR, and bpp, of
            codecs alone, is a clip's measured size.
        on_request: Whether it is measured only if an option asks for it; a sweep that can't measure it is then refused,
            and table.csv has its columns only if a row was measured by it.
    """

    higher: bool = True
    digits: int = 4
    per_clip: bool = True
    shown: bool = True
    on_request: bool = False

    def text(self, value: float | None) -> str:
        """Format a value for readers; an absent one is empty."""
        if value is None:
            return ""
        if math.isfinite(value):
            return format_number(value, f".{self.digits}f")
        return "not a number" if math.isnan(value) else "∞"


def format_number(value: float, form: str) -> str:
    """Format a number; one that is rounded to zero has no sign."""
    text = format(value, form)
    return text if text.strip("+-0.,%") else text.lstrip("+-")


METRICS = (
    Metric("mse", "MSE", higher=False, digits=5, shown=False),
    Metric("bpp", "Bits/pixel", higher=False, digits=5, shown=False),
    Metric("psnr", "PSNR", "dB", higher=True, digits=2),
    Metric("ssim", "SSIM", higher=True, needs="11 px a side, `uniform7` 7"),
    Metric("ms_ssim", "MS-SSIM", higher=True, needs="176 px a side"),
    Metric("lpips", "LPIPS", higher=False, needs="the network's file"),
    Metric("lpips_alex", "LPIPS (alex)", higher=False, needs="the network's file"),
    Metric("lpips_vgg", "LPIPS (vgg)", higher=False, needs="the network's file"),
    Metric(
        "st_lpips",
        "ST-LPIPS (vgg)",
        higher=False,
        on_request=True,
        needs="`st_lpips: vgg`, the extra `offline`, 18 px a side",
    ),
    Metric(
        "st_lpips_alex",
        "ST-LPIPS (alex)",
        higher=False,
        on_request=True,
        needs="`st_lpips: alex`, the extra `offline`, 21 px a side",
    ),
    Metric("flicker", "Flicker", higher=False, digits=5, needs="2 frames"),
    Metric(
        "vmaf", "VMAF", higher=True, digits=2, on_request=True, needs="`vmaf: true`, the extra `vmaf`, 32 px a side"
    ),
    Metric(
        "cvvdp",
        "ColorVideoVDP",
        "JOD",
        higher=True,
        digits=3,
        on_request=True,
        needs="`cvvdp: standard_4k` or another display, the extra `cvvdp`, 8 px a side",
    ),
    Metric("rfvd", "rFVD", higher=False, digits=1, needs="an I3D network, 10 frames", per_clip=False),
)
BY_KEY = {metric.key: metric for metric in METRICS}
PER_CLIP = tuple(metric.key for metric in METRICS if metric.per_clip)
SHOWN = tuple(metric for metric in METRICS if metric.shown)
