"""Between files, uint8 frames and clips as an autoencoder takes them, in Python."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vidtwin.errors import UserError
from vidtwin.video import Frames, Source, read_clip, write_video
from vidtwin.video.panels import to_uint8

if TYPE_CHECKING:
    from vidtwin.autoencoder import Reconstruction, VideoAutoencoder


def load_clip(
    source: Source,
    model: "VideoAutoencoder | None" = None,
    start: float = 0.0,
    fps: float | None = None,
    num_frames: int | None = None,
    size: int | None = None,
) -> Tensor:
    """Read a clip of a video as a model takes it.

    Args:
        source: Video file, or folder of numbered images.
        model: Whose usual length and resolution are taken where `num_frames` and `size` are not given.
        start: Of the clip, in seconds.
        fps: Frames per second of the clip; None: every frame of the video.
        num_frames: T; without it and without a model 16.
        size: Side of the square that the middle of the picture is cropped and resized to; without it, and where the
            model has no resolution of its own, the whole picture.

    Returns:
        (1, 3, T, H, W) in [-1, 1]. H and W are multiples of what the model wants: the border is repeated.

    Raises:
        VideoError: The video can't be read, or ends before the clip.
    """
    length = num_frames or (model.temporal.usual_length if model is not None else 16)
    side = size or (model.resolution if model is not None else None)
    frames = read_clip(source, start, length, fps, side)
    return as_clip([frames], model.spatial_multiple if model is not None else 1)


def save_clip(path: str | Path, clip: Tensor, fps: float | Fraction = 25) -> Path:
    """Write a clip (1, 3, T, H, W) or (3, T, H, W) in [-1, 1] as a video; its suffix names the container."""
    if clip.ndim == 5 and len(clip) == 1:
        clip = clip[0]
    if clip.ndim != 4 or clip.shape[0] != 3:
        raise UserError(f"Expected one clip (1, 3, T, H, W) to write to {path}, got {tuple(clip.shape)}.")
    return write_video(path, to_uint8(clip), fps)


def as_clip(windows: Sequence[Frames], multiple: int = 1) -> Tensor:
    """uint8 (T, H, W, 3) each → (B, 3, T, H, W) in [-1, 1], H and W raised to multiples by repeating the border."""
    clip = torch.from_numpy(np.stack(windows)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    below, right = (-side % multiple for side in clip.shape[3:])
    if not (below or right):
        return clip
    return torch.nn.functional.pad(clip, (0, right, 0, below, 0, 0), mode="replicate")


def views(model: "VideoAutoencoder", clip: Tensor, reconstruction: "Reconstruction") -> list[dict[str, Frames]]:
    """Show clips (B, 3, T, H, W) as frames by name: input, reconstruction and, if the model can, each latent alone."""
    stacked = {"input": clip, "reconstruction": reconstruction.clip}
    if model.partial_latents:
        for name, latent in reconstruction.latents.items():
            stacked[f"{name} only"] = model.decode({name: latent}, clip.shape[2])
    return [{name: to_uint8(clips[index]) for name, clips in stacked.items()} for index in range(len(clip))]
