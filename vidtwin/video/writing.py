"""Encode video."""

import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import VideoFrame

from vidtwin.files import replacing

from .picture import Frames
from .source import VideoError

# Hard to tell from the input: what is seen in a reconstruction should be the work of the model.
_QUALITY = {
    "libx264": {"crf": "12", "preset": "medium"},
    "mpeg4": {"flags": "+qscale", "global_quality": str(2 * 118)},  # in units of lambda, 118 per quantizer step
}


def write_video(
    path: Path | str, frames: Iterable[Frames], fps: float | Fraction, codec: str = "libx264", **options: str
) -> Path:
    """Write a video, nearly without loss, as yuv420p that browsers play. An odd side grows by one repeated pixel.

    The file appears under its name only when it is complete; its folder is made.

    Args:
        path: Where to; the suffix names the container.
        frames: uint8 (H, W, 3) each, RGB.
        fps: Frames per second.
        codec: FFmpeg's name of the encoder; "libx264" and "mpeg4" have their quality set here.
        options: Options of the encoder, over those set here.
    """
    path = Path(path)
    rate = Fraction(fps).limit_denominator(10**7)
    try:
        with replacing(path) as partial, av.open(os.fspath(partial), "w") as container:
            stream: Any = None
            shape: tuple[int, ...] = ()
            for picture in frames:
                if stream is None:
                    shape = picture.shape
                    height, width = shape[0] + shape[0] % 2, shape[1] + shape[1] % 2
                    stream = container.add_stream(codec, rate=rate, options=_QUALITY.get(codec, {}) | options)
                    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                if picture.shape != shape or picture.dtype != np.uint8:
                    raise VideoError(f"{path}: expected frames of uint8 {shape}, got {picture.dtype} {picture.shape}.")
                padded = np.pad(picture, ((0, shape[0] % 2), (0, shape[1] % 2), (0, 0)), mode="edge")
                container.mux(stream.encode(VideoFrame.from_ndarray(padded, format="rgb24")))
            if stream is None:
                raise VideoError(f"{path}: expected at least one frame to write, got none.")
            container.mux(stream.encode(None))
    except av.error.FFmpegError as error:
        raise VideoError(f"{path}: can't be written with codec={codec}: {error.strerror}.") from error
    return path
