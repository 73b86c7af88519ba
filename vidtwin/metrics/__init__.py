"""Metrics of reconstructions and latents."""

from importlib import import_module
from typing import Any

# Imported on first use: tables read `registry` without waiting for torch.
_EXPORTS = {
    "ClipMetrics": "collection",
    "FeatureNetwork": "fvd",
    "LatentStatistics": "latents",
    "Measures": "measures",
    "flicker": "temporal",
    "frechet_distance": "fvd",
    "frechet_video_distance": "fvd",
    "ms_ssim": "frames",
    "mse": "frames",
    "psnr": "frames",
    "ssim": "frames",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"vidtwin.metrics.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
