"""Clips as an evaluation compares them: floats, rounded to 8 bits, or read back from a video file."""

from typing import Literal, get_args

import torch
from einops import rearrange
from torch import Tensor

from vidtwin.errors import UserError
from vidtwin.video.convert import from_uint8, round_to_uint8
from vidtwin.video.writing import write_and_read

Compared = Literal["floats", "8-bit", "mp4v", "h264"]


def as_compared(clips: Tensor, compared: Compared, fps: float) -> Tensor:
    """Convert clips (B, 3, T, H, W) to the form that the protocol compares, clamped to [-1, 1], in single precision.

    - "floats": as they are.
    - "8-bit": rounded to the nearest of 256 values. Open-Sora-Plan truncates, half a step darker on both sides.
    - "mp4v", "h264": the 8-bit clip written as a video and read back, see `vidtwin.video.writing.write_and_read`.

    Args:
        clips: (B, 3, T, H, W) in [-1, 1].
        compared: See above.
        fps: Frames per second of the files.
    """
    if compared not in get_args(Compared):
        raise UserError(f"Expected compared to be one of {', '.join(get_args(Compared))}, got {compared!r}.")
    if compared == "floats":
        return clips.float().clamp(-1.0, 1.0)
    steps = round_to_uint8(clips)
    if compared != "8-bit":
        pictures = rearrange(steps, "b c t h w -> b t h w c").to("cpu", torch.uint8).numpy()
        read = torch.stack([torch.from_numpy(write_and_read(clip, compared, fps)) for clip in pictures])
        steps = rearrange(read, "b t h w c -> b c t h w").to(clips.device)
    return from_uint8(steps)
