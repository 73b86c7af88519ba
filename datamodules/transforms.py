"""What happens to a batch on the device: the workers hand out bytes, a quarter of what floats would take."""

from typing import Any

import torch

from vidtwin.video.convert import to_clip


def to_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch of the workers with its clip as floats; a batch that has them already comes back as it is."""
    clip = batch["clip"]
    return {**batch, "clip": to_clip(clip)} if clip.dtype == torch.uint8 else batch
