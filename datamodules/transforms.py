"""Transform a batch on the device: the workers send bytes, a quarter of the size of floats."""

from typing import Any

import torch

from vidtwin.video.convert import to_clip


def to_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """Convert the clip of a workers' batch to floats; return a batch that has floats unchanged."""
    clip = batch["clip"]
    return {**batch, "clip": to_clip(clip)} if clip.dtype == torch.uint8 else batch
