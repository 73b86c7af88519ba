"""PSNR, SSIM and MS-SSIM, each in the variants that evaluations of video autoencoders use, by name."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from vidtwin.errors import UserError

Over = Literal["frame", "clip"]
SSIMVariant = Literal["gaussian_pooled", "gaussian", "uniform7"]

SSIM_WINDOW = 11
SMALLEST_MSE = 1e-10
"""PSNR ends at 100 dB, as in Open-Sora-Plan and LeanVAE for equal pictures, whose PSNR is infinite."""

_SIGMA = 1.5
_WINDOWS = {"gaussian_pooled": SSIM_WINDOW, "gaussian": SSIM_WINDOW, "uniform7": 7}
_C1, _C2 = 0.01**2, 0.03**2
_MS_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_MS_SMALLEST = 16 * SSIM_WINDOW
_NUMBERS_AT_ONCE = 2**22  # of one map: 16 MB; an SSIM holds about ten of them


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Compute the mean squared error of whole clips, on values clamped to [-1, 1] and mapped to [0, 1].

    Args:
        prediction: (B, 3, T, H, W) in [-1, 1], clamped here.
        target: Same shape.

    Returns:
        (B,); times 255² it is that of 8-bit values.
    """
    return _frame_mse(prediction, target).mean(1)


def psnr(prediction: Tensor, target: Tensor, over: Over = "frame", epsilon: float = 1e-8) -> Tensor:
    """Compute PSNR in dB, −10 log10(MSE + epsilon) on values clamped to [-1, 1] and mapped to [0, 1].

    A mean over frames is at least the PSNR of the mean MSE (Jensen), so the two are different metrics.

    Args:
        prediction: (B, 3, T, H, W) in [-1, 1], clamped here.
        target: Same shape.
        over: Take the MSE of each frame, or one of the whole clip.
        epsilon: 1e-8 (VidTok, VidTwin) ends at 80 dB. Evaluations without one end here at 100 dB.

    Returns:
        (B, T) of frames, (B,) of clips.
    """
    if over not in get_args(Over):
        raise UserError(f"Expected over to be one of {', '.join(get_args(Over))}, got {over!r}.")
    errors = _frame_mse(prediction, target)
    return decibels(errors if over == "frame" else errors.mean(1), epsilon)


def decibels(mse: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Compute the PSNR of MSEs of values in [0, 1]; equal pictures have the 100 dB of `SMALLEST_MSE` at most.

    TokenBench adds 1.2e-7 to the root of the MSE of values up to 255, so that equal videos have 186.6 dB there and all
    others what they have here with epsilon 0.
    """
    if not 0 <= epsilon < math.inf:
        raise UserError(f"Expected an epsilon of at least 0 for PSNR, got {epsilon}.")
    return -10.0 * torch.log10((mse + epsilon).clamp_min(SMALLEST_MSE))


def ssim(prediction: Tensor, target: Tensor, variant: SSIMVariant = "gaussian_pooled") -> Tensor:
    """Compute the structural similarity (Wang et al. 2004) over the windows that lie within the frame, mean over RGB.

    - "gaussian_pooled" (VidTok, VidTwin): 11x11 Gaussian window, σ 1.5. Frames are first average-pooled by
      max(1, round(min(H, W) / 256)), as the authors of SSIM advise for large ones.
    - "gaussian" (Open-Sora-Plan): the same without pooling.
    - "uniform7" (TokenBench): scikit-image's default, a 7x7 mean and the covariance of a sample (÷ 48, not 49).

    Args:
        prediction: (B, 3, T, H, W) in [-1, 1], clamped here.
        target: Same shape.
        variant: See above.

    Returns:
        (B, T), 1 for equal frames.
    """
    reason = ssim_unavailable(prediction.shape[-2], prediction.shape[-1], variant)
    if reason:
        raise UserError(reason)
    pool = max(1, round(min(prediction.shape[3:]) / 256)) if variant == "gaussian_pooled" else 1

    def of_frames(prediction: Tensor, target: Tensor) -> Tensor:
        if pool > 1:
            prediction, target = F.avg_pool2d(prediction, pool), F.avg_pool2d(target, pool)
        return _similarity(prediction, target, variant)[0].mean((1, 2, 3))

    return _by_frames(of_frames, prediction, target)


def ssim_unavailable(height: int, width: int, variant: SSIMVariant = "gaussian_pooled") -> str | None:
    """Return the reason why SSIM is unavailable for frames of this size, or None."""
    if variant not in _WINDOWS:
        raise UserError(f"Expected the variant of SSIM to be one of {', '.join(_WINDOWS)}, got {variant!r}.")
    window = _WINDOWS[variant]
    if min(height, width) >= window:
        return None
    return f"Expected frames of at least {window}x{window} pixels for SSIM, got {(height, width)}."


def ms_ssim(prediction: Tensor, target: Tensor) -> Tensor:
    """Compute the multi-scale structural similarity (Wang et al. 2003): five scales, their published weights.

    The same numbers as torchmetrics', its reflected border at the smallest scale included. 16 frames of 224 px take
    0.07 s on one core, and 0.74 s there.

    Args:
        prediction: (B, 3, T, H, W) in [-1, 1], clamped here.
        target: Same shape.

    Returns:
        (B, T), 1 for equal frames.
    """
    reason = ms_ssim_unavailable(*prediction.shape[-2:])
    if reason:
        raise UserError(reason)
    return _by_frames(_ms_ssim, prediction, target)


def ms_ssim_unavailable(height: int, width: int) -> str | None:
    """Return the reason why MS-SSIM is unavailable for frames of this size, or None."""
    if min(height, width) >= _MS_SMALLEST:
        return None
    return (
        f"Expected frames of at least {_MS_SMALLEST}x{_MS_SMALLEST} pixels for MS-SSIM, whose 11x11 window has to fit "
        f"at a sixteenth of the size, got {(height, width)}."
    )


def unit_range(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Clamp clips (B, 3, T, H, W) to [-1, 1] and map them to [0, 1], in single precision at least."""
    if prediction.shape != target.shape or prediction.ndim != 5:
        raise UserError(
            f"Expected two clips (B, 3, T, H, W) of one shape, got {tuple(prediction.shape)} and {tuple(target.shape)}."
        )
    if prediction.dtype != torch.float64:
        prediction, target = prediction.float(), target.float()
    return (prediction.clamp(-1.0, 1.0) + 1.0) / 2.0, (target.clamp(-1.0, 1.0) + 1.0) / 2.0


def _frame_mse(prediction: Tensor, target: Tensor) -> Tensor:
    prediction, target = unit_range(prediction, target)
    return (prediction - target).square().mean(dim=(1, 3, 4))


def _by_frames(function: Callable[[Tensor, Tensor], Tensor], prediction: Tensor, target: Tensor) -> Tensor:
    """Apply a function of frames (N, 3, H, W) → (N,) to clips → (B, T); few frames at once if they are large."""
    batch = prediction.shape[0]
    values = [function(*frames) for frames in _few_frames(*unit_range(prediction, target))]
    return rearrange(torch.cat(values), "(b t) -> b t", b=batch)


def _few_frames(*clips: Tensor) -> Iterator[tuple[Tensor, ...]]:
    frames = [rearrange(clip, "b c t h w -> (b t) c h w") for clip in clips]
    number = max(1, _NUMBERS_AT_ONCE // frames[0][0].numel())
    return zip(*(each.split(number) for each in frames), strict=True)


def _ms_ssim(prediction: Tensor, target: Tensor) -> Tensor:
    value: Tensor | float = 1.0
    for scale, weight in enumerate(_MS_WEIGHTS):
        if scale < len(_MS_WEIGHTS) - 1:
            _, part = _similarity(prediction, target, "gaussian")
            prediction, target = F.avg_pool2d(prediction, 2), F.avg_pool2d(target, 2)
        else:
            border = [SSIM_WINDOW // 2] * 4
            prediction, target = (F.pad(frames, border, mode="reflect") for frames in (prediction, target))
            part, _ = _similarity(prediction, target, "gaussian")
        value = value * part.mean((1, 2, 3)).clamp_min(0.0) ** weight  # a negative one has no root
    assert isinstance(value, Tensor)
    return value


def _similarity(prediction: Tensor, target: Tensor, variant: SSIMVariant) -> tuple[Tensor, Tensor]:
    """Compute the maps of SSIM and of its contrast and structure, (N, C, H', W'), of frames (N, C, H, W) in [0, 1]."""
    uniform = variant == "uniform7"
    window = _WINDOWS[variant]
    blur = partial(F.avg_pool2d, kernel_size=window, stride=1) if uniform else _gaussian
    sample = window**2 / (window**2 - 1) if uniform else 1.0
    # Around 0 the squares are smaller, and less is lost of a variance, which is the difference of two of them.
    x, y = prediction - 0.5, target - 0.5
    mean_x, mean_y = blur(x), blur(y)
    variances = sample * (blur(x.square() + y.square()) - mean_x.square() - mean_y.square())
    covariance = sample * (blur(x * y) - mean_x * mean_y)
    contrast = (2 * covariance + _C2) / (variances.clamp_min(0.0) + _C2)
    mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x.square() + mean_y.square() + _C1)
    return luminance * contrast, contrast


def _gaussian(frames: Tensor) -> Tensor:
    """Average (N, C, H, W) → (N, C, H − 10, W − 10).

    One pass along the rows and one along the columns, with every picture as a channel of one: 16 frames of 224 px have
    their SSIM in 0.05 s on one core, and in 0.46 s by torchmetrics' 11x11 convolution.
    """
    offsets = torch.arange(SSIM_WINDOW, dtype=frames.dtype, device=frames.device) - SSIM_WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    window = window / window.sum()
    number, channels = frames.shape[:2]
    pictures = rearrange(frames, "n c h w -> 1 (n c) h w")
    groups = number * channels
    pictures = F.conv2d(pictures, window.view(1, 1, 1, -1).expand(groups, 1, 1, -1), groups=groups)
    pictures = F.conv2d(pictures, window.view(1, 1, -1, 1).expand(groups, 1, -1, 1), groups=groups)
    return rearrange(pictures, "1 (n c) h w -> n c h w", n=number)
