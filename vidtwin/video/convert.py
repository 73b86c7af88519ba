"""Convert between uint8 values and floats in [-1, 1]. Imports torch, so `vidtwin.video` does not import it."""

import torch
from einops import rearrange
from torch import Tensor

from .picture import Frames


def from_uint8(values: Tensor) -> Tensor:
    """Map values 0 to 255 to float32 in [-1, 1]; the order of the axes in memory is kept."""
    return values.to(torch.float32, copy=True).div_(127.5).sub_(1.0)


def to_clip(frames: Tensor) -> Tensor:
    """Convert uint8 (B, T, H, W, 3) to float32 (B, 3, T, H, W) in [-1, 1]."""
    return from_uint8(rearrange(frames, "b t h w c -> b c t h w").contiguous())


def round_to_uint8(values: Tensor) -> Tensor:
    """Clamp values to [-1, 1] and round them to the nearest of 256 values, as float32 in 0 to 255."""
    return ((values.detach().float().clamp(-1.0, 1.0) + 1.0) * 127.5).round()


def to_uint8(clip: Tensor) -> Frames:
    """Convert (3, T, H, W) in [-1, 1] to uint8 (T, H, W, 3), rounded."""
    return to_frames(clip).cpu().numpy()


def to_frames(clip: Tensor) -> Tensor:
    """Convert (..., 3, T, H, W) in [-1, 1] to uint8 (..., T, H, W, 3), rounded, on the same device."""
    return round_to_uint8(rearrange(clip, "... c t h w -> ... t h w c")).to(torch.uint8)
