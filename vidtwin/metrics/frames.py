"""PSNR and SSIM of frames, as the released evaluation computes them: per frame, in floats, without 8-bit rounding."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from vidtwin.errors import UserError

SSIM_WINDOW = 11


def psnr(prediction: Tensor, target: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, −10 log10(MSE + 1e-8) on values clamped to [-1, 1] and mapped to [0, 1].

    The 1e-8 caps it at 80 dB. A mean over frames is at least the PSNR of the mean MSE (Jensen), which other
    protocols report.

    Args:
        prediction: (B, 3, T, H, W) in [-1, 1], clamped here.
        target: Same shape.

    Returns:
        (B, T).
    """
    prediction, target = _unit_range(prediction, target)
    return -10.0 * torch.log10((prediction - target).square().mean(dim=(1, 3, 4)) + 1e-8)


def ssim(prediction: Tensor, target: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004): 11x11 Gaussian window, σ 1.5, windows within the frame, mean over RGB.

    Frames are first average-pooled by max(1, round(min(H, W) / 256)), as the authors of SSIM advise for large ones.

    Args:
        prediction: (B, 3, T, H, W) in [-1, 1], clamped here.
        target: Same shape.

    Returns:
        (B, T), 1 for equal frames.
    """
    batch = prediction.shape[0]
    if min(prediction.shape[3:]) < SSIM_WINDOW:
        raise UserError(f"Expected frames of at least 11x11 pixels for SSIM, got {tuple(prediction.shape[3:])}.")
    factor = max(1, round(min(prediction.shape[3:]) / 256))
    prediction, target = (
        F.avg_pool2d(rearrange(clip, "b c t h w -> (b t) c h w"), factor) for clip in _unit_range(prediction, target)
    )
    # torchmetrics pads the frame by reflection; the map without its border holds the windows that need no padding.
    _, similarity = structural_similarity_index_measure(prediction, target, data_range=1.0, return_full_image=True)
    border = SSIM_WINDOW // 2
    similarity = similarity[..., border:-border, border:-border].mean(dim=(1, 2, 3))
    return rearrange(similarity, "(b t) -> b t", b=batch)


def _unit_range(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if prediction.shape != target.shape or prediction.ndim != 5:
        raise UserError(
            f"Expected two clips (B, 3, T, H, W) of one shape, got {tuple(prediction.shape)} and {tuple(target.shape)}."
        )
    if prediction.dtype != torch.float64:
        prediction, target = prediction.float(), target.float()
    return (prediction.clamp(-1.0, 1.0) + 1.0) / 2.0, (target.clamp(-1.0, 1.0) + 1.0) / 2.0
