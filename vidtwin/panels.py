"""Pictures of clips: rows of input, reconstruction and what each latent gives alone."""

import io

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vidtwin.autoencoder import Reconstruction, VideoAutoencoder

Frames = NDArray[np.uint8]  # (T, H, W, 3)


def to_uint8(clip: Tensor) -> Frames:
    """(3, T, H, W) in [-1, 1] → (T, H, W, 3), rounded."""
    frames = rearrange(clip.detach().float().clamp(-1, 1), "c t h w -> t h w c")
    return ((frames + 1) * 127.5).round().to(torch.uint8).cpu().numpy()


@torch.no_grad()
def views(model: VideoAutoencoder, clip: Tensor, reconstruction: Reconstruction) -> list[dict[str, Frames]]:
    """For each clip (B, 3, T, H, W) its views by name: input, reconstruction, and "<latent> only" where models can."""
    stacked = {"input": clip, "reconstruction": reconstruction.clip}
    if model.partial_latents:
        for name, latent in reconstruction.latents.items():
            stacked[f"{name} only"] = model.decode({name: latent}, clip.shape[2])
    return [{name: to_uint8(clips[index]) for name, clips in stacked.items()} for index in range(len(clip))]


def side_by_side(shown: dict[str, Frames]) -> Frames:
    """The views next to each other under their names: (T, H', W', 3) with even sides, as video codecs want them."""
    columns = [_titled(name, _enlarged(frames)) for name, frames in shown.items()]
    joined = np.concatenate(columns, axis=2)
    return np.pad(joined, [(0, 0), (0, joined.shape[1] % 2), (0, joined.shape[2] % 2), (0, 0)])


def filmstrip(shown: dict[str, Frames], num_frames: int = 6) -> Frames:
    """A still (H', W', 3): a row for each view, named at its left, with `num_frames` frames evenly over the clip."""
    rows = []
    for name, frames in shown.items():
        chosen = np.linspace(0, len(frames) - 1, min(num_frames, len(frames))).round().astype(int)
        strip = np.concatenate(list(_enlarged(frames[chosen])), axis=1)
        label = _text(name, width=110, height=strip.shape[0])
        rows.append(np.concatenate([label, strip], axis=1))
    return np.concatenate(rows, axis=0)


def png(image: Frames) -> bytes:
    """Encode (H, W, 3)."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def gif(frames: Frames, fps: float) -> bytes:
    """Encode (T, H, W, 3) as an animated GIF, which TensorBoard plays among its images."""
    buffer = io.BytesIO()
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(buffer, "gif", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    return buffer.getvalue()


def _enlarged(frames: Frames) -> Frames:
    """Frames of a small model repeated pixel by pixel to about 128 px, so that a person sees them."""
    times = max(1, 128 // frames.shape[2])
    return frames.repeat(times, axis=1).repeat(times, axis=2)


def _titled(name: str, frames: Frames) -> Frames:
    title = _text(name, width=frames.shape[2], height=14)
    return np.concatenate([np.repeat(title[None], len(frames), axis=0), frames], axis=1)


def _text(text: str, width: int, height: int) -> Frames:
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(10)
    while draw.textlength(text, font=font) > width - 2 and len(text) > 1:
        text = text[:-1]
    draw.text((2, (height - 12) / 2), text, fill="black", font=font)
    return np.asarray(image)
