"""What reconstructions and latents are measured by."""

from vidtwin.metrics.collection import ClipMetrics
from vidtwin.metrics.frames import psnr, ssim
from vidtwin.metrics.latents import LatentStatistics

__all__ = ["ClipMetrics", "LatentStatistics", "psnr", "ssim"]
