"""VMAF, by the `vmaf-torch` package (BSD 3-clause; the SVM of Netflix' vmaf_v0.6.1 comes with it)."""

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vidtwin.errors import UserError
from vidtwin.metrics.frames import unit_range

_SMALLEST = 32  # its coarsest scale is an eighth, 4 pixels; below 17 the window of its VIF does not fit


def vmaf(prediction: Tensor, target: Tensor) -> Tensor:
    """Compute Netflix' Video Multimethod Assessment Fusion, from 0 to 100, mean over the frames of a clip.

    It is taken on 8-bit luma, BT.601 in limited range, as FFmpeg converts untagged RGB. The model was
    trained for 1080p on a television: on small frames it ranks, but its values are not those of the screen.

    Args:
        prediction: (B, 3, T, H, W) in [-1, 1], clamped here.
        target: Same shape.

    Returns:
        (B,).
    """
    reason = vmaf_unavailable(prediction.shape[-2], prediction.shape[-1])
    if reason:
        raise UserError(reason)
    network = _network().to(prediction.device)
    pairs = zip(*(_luma(clip) for clip in unit_range(prediction, target)), strict=True)
    return torch.stack([network(there, here).mean() for here, there in pairs])


def vmaf_unavailable(height: int, width: int) -> str | None:
    """Return the reason why VMAF is unavailable, here or for frames of this size, or None."""
    try:
        importlib.import_module("vmaf_torch")
    except ImportError as error:
        return f"pip install 'vidtwin[vmaf]' ({error})"
    if min(height, width) < _SMALLEST:
        return f"Expected frames of at least {_SMALLEST}x{_SMALLEST} pixels for VMAF, got {(height, width)}."
    return None


def _luma(clips: Tensor) -> Tensor:
    """Convert (B, 3, T, H, W) in [0, 1] → (B, T, 1, H, W), whole numbers from 16 to 235."""
    red, green, blue = clips.float().unbind(1)
    return (16.0 + 65.481 * red + 128.553 * green + 24.966 * blue).round().unsqueeze(2)


@cache
def _network() -> Any:
    # The package has no types, and may be missing unless VMAF is requested.
    return importlib.import_module("vmaf_torch").VMAF(clip_score=True).eval().requires_grad_(False)
