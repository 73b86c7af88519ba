"""What reconstructions and latents are measured by."""

from vidtwin.metrics.collection import ClipMetrics
from vidtwin.metrics.frames import ms_ssim, mse, psnr, ssim
from vidtwin.metrics.fvd import FeatureNetwork, frechet_distance, frechet_video_distance
from vidtwin.metrics.latents import LatentStatistics
from vidtwin.metrics.measures import Measures
from vidtwin.metrics.temporal import flicker

__all__ = [
    "ClipMetrics",
    "FeatureNetwork",
    "LatentStatistics",
    "Measures",
    "flicker",
    "frechet_distance",
    "frechet_video_distance",
    "ms_ssim",
    "mse",
    "psnr",
    "ssim",
]
