"""Encode video."""

import io
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
from .reading import iter_frames
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


def through_file(frames: Frames, codec: str, fps: float | Fraction) -> Frames:
    """What is read back of an .mp4 that an evaluation writes and compares; it is written in memory.

    - "mp4v": `cv2.VideoWriter` with that code (Open-Sora-Plan). FFmpeg's MPEG-4 part 2, yuv420p, 1.5 bits a pixel,
      a keyframe every 12 frames. OpenCV would cut an odd row or column off; here it is refused.
    - "h264": `mediapy.write_video` by default (Cosmos, TokenBench). x264's preset medium at the quantizer 20, and 28
      where a frame has more than 640x480 pixels; yuv420p, and yuv444p where a side is odd.

    One thread encodes: x264's output depends on their number. Reading is this package's, where both evaluations leave
    rounding to swscale, 2 of 255 darker on both sides.

    Args:
        frames: uint8 (T, H, W, 3), RGB.
        codec: "mp4v" or "h264".
        fps: Frames per second, by which the encoders share out bits.

    Returns:
        uint8 (T, H, W, 3).
    """
    height, width = frames.shape[1:3]
    odd = bool(height % 2 or width % 2)
    if codec == "mp4v" and odd:
        raise VideoError(f"Expected frames with an even height and width for codec=mp4v, got {(height, width)}.")
    # MPEG-4 part 2 counts time in 65535ths at the finest.
    rate = Fraction(fps).limit_denominator(1001)
    if codec == "mp4v":
        encoder, options, bits = "mpeg4", {"g": "12"}, int(1.5 * float(rate) * height * width)
        options |= {"b": str(bits), "bt": str(bits)}
    elif codec == "h264":
        encoder, options = "libx264", {"preset": "medium", "qp": "20" if height * width <= 640 * 480 else "28"}
    else:
        raise VideoError(f"Expected the codec mp4v or h264, got {codec!r}.")
    file = io.BytesIO()
    try:
        with av.open(file, "w", format="mp4") as container:
            stream: Any = container.add_stream(encoder, rate=rate, options=options)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p" if odd else "yuv420p"
            stream.codec_context.thread_count = 1
            for picture in frames:
                container.mux(stream.encode(VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
            container.mux(stream.encode(None))
    except (av.error.FFmpegError, ValueError) as error:
        raise VideoError(f"A clip of {frames.shape} can't be written with codec={codec}: {error}.") from error
    back = np.stack(list(iter_frames(file.getvalue())))
    if back.shape != frames.shape:
        raise VideoError(f"Expected {frames.shape} back from a file with codec={codec}, got {back.shape}.")
    return back
