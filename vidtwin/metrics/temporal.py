"""The fidelity of changes from frame to frame."""

from torch import Tensor

from vidtwin.errors import UserError
from vidtwin.metrics.frames import unit_range


def flicker(prediction: Tensor, target: Tensor) -> Tensor:
    """Compute the mean absolute error of the differences of neighbouring frames, x[t+1] − x[t], of values in [0, 1].

    VBench's temporal flickering is the mean absolute difference of neighbouring frames in steps of 255 (Huang et al.
    2024, 4.1), without a target, so that motion counts as flicker. Here the target's differences are taken off,
    which leaves those that the reconstruction adds or loses; times 255 it is in VBench's steps.

    Args:
        prediction: (B, 3, T, H, W) in [-1, 1], clamped here.
        target: Same shape.

    Returns:
        (B,), 0 for a reconstruction that is off by the same in all frames.
    """
    reason = flicker_unavailable(prediction.shape[2]) if prediction.ndim == 5 else None
    if reason:
        raise UserError(reason)
    prediction, target = unit_range(prediction, target)
    return (prediction - target).diff(dim=2).abs().mean(dim=(1, 2, 3, 4))


def flicker_unavailable(num_frames: int) -> str | None:
    """Return the reason why flicker is unavailable for clips of this length, or None."""
    return None if num_frames > 1 else f"Expected clips of at least 2 frames for flicker, got {num_frames}."
