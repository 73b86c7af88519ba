"""What reconstructions and latents are measured by."""

from vidtwin.metrics.collection import ClipMetrics
from vidtwin.metrics.frames import ms_ssim, mse, psnr, ssim
from vidtwin.metrics.fvd import FeatureNetwork, FrechetVideoDistance, frechet_distance
from vidtwin.metrics.latents import LatentStatistics
from vidtwin.metrics.measures import Measures
from vidtwin.metrics.temporal import flicker

__all__ = [
    "ClipMetrics",
    "FeatureNetwork",
    "FrechetVideoDistance",
    "LatentStatistics",
    "Measures",
    "flicker",
    "frechet_distance",
    "ms_ssim",
    "mse",
    "psnr",
    "ssim",
]
