"""Convert between video files, uint8 frames and the clips that an autoencoder takes."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vidtwin.errors import UserError
from vidtwin.video import Frames, Source, read_clip, write_video
from vidtwin.video.convert import from_uint8, to_uint8

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
    """Read a clip of a video in the form that a model takes.

    Args:
        source: Video file, or folder of numbered images.
        model: Its usual length and resolution are the defaults of `num_frames` and `size`.
        start: Start of the clip in seconds.
        fps: Frames per second of the clip; None takes every frame of the video.
        num_frames: T, by default that of the model, or 16.
        size: Side in pixels of the square to which the centre of the picture is cropped and resized. By default that of
            the model; the whole picture if the model has no fixed resolution.

    Returns:
        (1, 3, T, H, W) in [-1, 1], H and W padded to the model's `spatial_multiple` by repeating the border.

    Raises:
        VideoError: The video can't be read or ends before the clip does.
    """
    length = num_frames or (model.temporal.usual_length if model is not None else 16)
    side = size or (model.resolution if model is not None else None)
    frames = read_clip(source, start, length, fps, side)
    return as_clip([frames], model.spatial_multiple if model is not None else 1)


def save_clip(path: str | Path, clip: Tensor, fps: float | Fraction = 25) -> Path:
    """Write a clip (1, 3, T, H, W) or (3, T, H, W) in [-1, 1] as a video in the container of the path's suffix.

    Raises:
        UserError: The tensor has another shape.
    """
    if clip.ndim == 5 and len(clip) == 1:
        clip = clip[0]
    if clip.ndim != 4 or clip.shape[0] != 3:
        raise UserError(f"Expected one clip (1, 3, T, H, W) to write to {path}, got {tuple(clip.shape)}.")
    return write_video(path, to_uint8(clip), fps)


def as_clip(windows: Sequence[Frames] | Tensor, multiple: int = 1) -> Tensor:
    """Stack uint8 (T, H, W, 3) → (B, 3, T, H, W) in [-1, 1], H and W padded to multiples by repeating the border.

    A tensor uint8 (B, T, H, W, 3) is converted on its device.
    """
    stacked = windows if isinstance(windows, Tensor) else torch.from_numpy(np.stack(windows))
    clip = from_uint8(stacked.permute(0, 4, 1, 2, 3))
    below, right = (-side % multiple for side in clip.shape[3:])
    if not (below or right):
        return clip
    return torch.nn.functional.pad(clip, (0, right, 0, below, 0, 0), mode="replicate")


def views(model: "VideoAutoencoder", clip: Tensor, reconstruction: "Reconstruction") -> list[dict[str, Frames]]:
    """Convert clips (B, 3, T, H, W) to frames by name: input, reconstruction and each latent alone if supported."""
    stacked = {"input": clip, "reconstruction": reconstruction.clip}
    if model.partial_latents:
        for name, latent in reconstruction.latents.items():
            stacked[f"{name} only"] = model.decode({name: latent}, clip.shape[2])
    return [{name: to_uint8(clips[index]) for name, clips in stacked.items()} for index in range(len(clip))]
