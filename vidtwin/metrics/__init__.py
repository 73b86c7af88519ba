"""What reconstructions are measured by."""

from vidtwin.metrics.collection import ClipMetrics
from vidtwin.metrics.frames import psnr, ssim

__all__ = ["ClipMetrics", "psnr", "ssim"]
