"""What happens to a batch on the device: the workers hand out bytes, a quarter of what floats would take."""

from typing import Any

import torch
from torch import Tensor


def to_clip(frames: Tensor) -> Tensor:
    """uint8 (B, T, H, W, 3) → float32 (B, 3, T, H, W) in [-1, 1]."""
    clip = frames.permute(0, 4, 1, 2, 3).to(torch.float32, memory_format=torch.contiguous_format)
    return clip.div_(127.5).sub_(1.0)


def to_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch of the workers with its clip as floats; a batch that has them already comes back as it is."""
    clip = batch["clip"]
    return {**batch, "clip": to_clip(clip)} if clip.dtype == torch.uint8 else batch
