"""Metrics of validation, and their means over the clips of all ranks."""

from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torchmetrics import MeanMetric

from vidtwin.errors import UserError
from vidtwin.losses.perceptual import LPIPS
from vidtwin.metrics.frames import psnr, ssim
from vidtwin.precision import full_precision


class ClipMetrics(nn.Module):
    """PSNR (dB), SSIM and LPIPS (VGG, version 0.1) of clips: each a mean over the frames of a clip.

    LPIPS needs the VGG-16 backbone's file. Without it the metric is left out and `unavailable` says why: it is
    never 0 and never that of a random network. The file is not downloaded for a measurement.

        metrics = ClipMetrics()
        metrics.update(metrics(prediction, target))   # (B,) by name
        metrics.compute()                             # means over clips

    Args:
        perceptual_backbone: File with VGG-16 weights; None is torch hub's cache, see `LPIPS`.
    """

    all_names = ("psnr", "ssim", "lpips")

    def __init__(self, perceptual_backbone: str | None = None) -> None:
        super().__init__()
        self.lpips = LPIPS(perceptual_backbone)
        self.unavailable: dict[str, str] = {}
        # "disable": by default torchmetrics leaves NaNs out of the mean, and a broken clip would go unseen.
        self.means = nn.ModuleList(MeanMetric(nan_strategy="disable") for _ in self.all_names)

    def setup(self) -> None:
        """Find out which metrics are available; called on the first clip at the latest."""
        if self.lpips.network is None and not self.unavailable:
            try:
                self.lpips.load(download=False)
            except UserError as error:
                self.unavailable = {"lpips": str(error)}

    @property
    def names(self) -> tuple[str, ...]:
        """List the metrics that are available here."""
        self.setup()
        return tuple(name for name in self.all_names if name not in self.unavailable)

    @torch.no_grad()
    def forward(self, prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Measure clips (B, 3, T, H, W) in [-1, 1], clamped to it → (B,) by the name of each available metric."""
        with full_precision(prediction.device):
            values = {"psnr": psnr(prediction, target).mean(1), "ssim": ssim(prediction, target).mean(1)}
            if "lpips" in self.names:
                distances = self.lpips(prediction.float().clamp(-1.0, 1.0), target.float().clamp(-1.0, 1.0))
                values["lpips"] = rearrange(distances, "(b t) -> b t", b=prediction.shape[0]).mean(1)
        return values

    def update(self, values: dict[str, Tensor]) -> None:
        """Add the clips that `forward` measured, (B,) by name, to the running mean; each clip counts once."""
        # A rank without the backbone makes the mean of LPIPS NaN, rather than that of the other ranks' clips.
        absent = torch.full_like(values["psnr"], torch.nan)
        for name, mean in self._running_means():
            mean.update(values.get(name, absent))

    def compute(self) -> dict[str, Tensor]:
        """Average over all clips of all ranks since `reset`, by name; all ranks have to call it together."""
        means = {name: mean.compute() for name, mean in self._running_means()}
        return {name: means[name] for name in self.names}

    def reset(self) -> None:
        """Forget all clips."""
        for _, mean in self._running_means():
            mean.reset()

    def _running_means(self) -> list[tuple[str, MeanMetric]]:
        return [(name, cast(MeanMetric, mean)) for name, mean in zip(self.all_names, self.means, strict=True)]
