"""Read and write video files with PyAV. The only place with frames as uint8 (T, H, W, C).

A clip is asked for by time: frame k of a clip is the one that is shown at `start + k / fps`, counted from the first
frame of the file. Which frame that is, is found in one of two ways:

* by counting frames, in containers without usable timestamps: AVI (packed B-frames give pts 1, 2, 4, 3, 5, …) and raw
  streams;
* by timestamps everywhere else: there they are true, at a variable frame rate too.

Pictures are cropped to a square, resized with swscale's area filter, which averages what it shrinks (so it is
antialiased) and is bilinear where it enlarges, and made RGB by one filter graph. Only wanted frames go through it. The
bicubic filter takes a quarter more time for the whole clip.
"""

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.filter
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from numpy.typing import NDArray

from vidtwin.errors import UserError
from vidtwin.files import replacing

RESIZE_FILTER = "area (swscale): antialiased shrinking, bilinear enlarging"
VIDEO_SUFFIXES = frozenset({".avi", ".mp4", ".m4v", ".mkv", ".mov", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv"})

Frames = NDArray[np.uint8]

_COUNTED_FORMATS = frozenset({"avi", "h264", "hevc", "m4v", "mpegvideo", "mjpeg", "rawvideo"})
# Hard to tell from the input: what is seen in a reconstruction should be the work of the model.
_QUALITY = {
    "libx264": {"crf": "12", "preset": "medium"},
    "mpeg4": {"flags": "+qscale", "global_quality": str(2 * 118)},  # in units of lambda, 118 per quantizer step
}


class VideoError(UserError):
    """A video file that can't be used as asked: one line that names the file and says what was wrong.

    Attributes:
        decodable: How many frames the file gave, if it was read to its end.
    """

    def __init__(self, message: str, decodable: int | None = None) -> None:
        # A DataLoader builds the error of a worker anew from the text of its traceback; the last line is ours.
        line = message.strip().rpartition("\n")[2]
        super().__init__(line.removeprefix(f"{__name__}.{type(self).__qualname__}: "))
        self.decodable = decodable


@dataclass(frozen=True)
class VideoInfo:
    """What the header says of a video.

    `num_frames` may exceed the number of decodable frames by a few, or by half in a truncated file.

    Attributes:
        fps: Average frame rate in frames per second.
        duration: `num_frames / fps`, in seconds.
    """

    path: Path
    num_frames: int
    fps: Fraction
    duration: float
    width: int
    height: int


@contextmanager
def _open(path: Path | str) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file and its first video stream; what FFmpeg raises here and inside becomes `VideoError`."""
    try:
        with av.open(os.fspath(path)) as container:
            if not container.streams.video:
                raise VideoError(f"{path}: expected a video, got a file without a video stream.")
            stream = container.streams.video[0]
            stream.thread_type = "NONE"  # threads within one small video are slower, and workers have one core each
            yield container, stream
    except FileNotFoundError:
        raise VideoError(f"{path}: there is no such file.") from None
    except (av.error.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(f"{path}: expected a readable video, FFmpeg says: {reason}.") from error


def _rate(stream: VideoStream, path: Path | str) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate
    if not rate or rate <= 0:
        raise VideoError(f"{path}: expected a video with a frame rate, the header has none.")
    return Fraction(rate)


def probe(path: Path | str) -> VideoInfo:
    """Read the header of a video. Where it has no frame count the packets are counted, without decoding."""
    with _open(path) as (container, stream):
        fps = _rate(stream, path)
        num_frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
        duration = float(num_frames / fps)
        return VideoInfo(Path(path), num_frames, fps, duration, stream.width, stream.height)


class _Converter:
    """Decoded frame → uint8 (H, W, 3): a square crop resized to `size`, or the whole picture if `size` is None."""

    def __init__(self, frame: VideoFrame, size: int | None, crop: tuple[float, float]) -> None:
        graph = av.filter.Graph()
        graph.threads = 1
        ends: list[Any] = [
            graph.add_buffer(
                width=frame.width,
                height=frame.height,
                format=frame.format,
                time_base=frame.time_base or Fraction(1, 25),
            )
        ]
        if size is not None:
            side = min(frame.width, frame.height)
            left, top = round((frame.width - side) * crop[0]), round((frame.height - side) * crop[1])
            ends.append(graph.add("crop", f"{side}:{side}:{left}:{top}"))
            ends.append(graph.add("scale", f"{size}:{size}:flags=area"))
        ends += [graph.add("format", "rgb24"), graph.add("buffersink")]
        graph.link_nodes(*ends).configure()
        self._graph = graph

    def __call__(self, frame: VideoFrame) -> Frames:
        self._graph.vpush(frame)
        return np.asarray(self._graph.vpull().to_ndarray(), dtype=np.uint8)


def read_clip(
    path: Path | str,
    start: float | Fraction = 0.0,
    num_frames: int = 16,
    fps: float | Fraction | None = None,
    size: int | None = None,
    crop: tuple[float, float] = (0.5, 0.5),
) -> Frames:
    """Read the frames that are shown at the times `start + k / fps`.

    Args:
        path: Video file.
        start: Time of the first frame in seconds, counted from the first frame of the file.
        num_frames: T.
        fps: Frames per second of the clip; None: the file's own average rate. Above the file's rate frames repeat.
        size: Side of the square picture in pixels; None: the whole picture as it is.
        crop: Where the largest square lies in the picture, as (x, y): 0 left or top, 0.5 centre, 1 right or bottom.

    Returns:
        uint8 (T, H, W, 3), RGB.

    Raises:
        VideoError: The file can't be read, or ends before the last wanted frame; `decodable` is then how many frames
            it has.
    """
    frames = _read(path, start, num_frames, fps, size, crop, seek=True)
    if frames is None:  # what was found after a seek was not all of it
        frames = _read(path, start, num_frames, fps, size, crop, seek=False)
    return np.stack(frames or [])


def iter_frames(path: Path | str, size: int | None = None, crop: tuple[float, float] = (0.5, 0.5)) -> Iterator[Frames]:
    """Every frame of a video in turn, uint8 (H, W, 3), in constant memory. `probe(path).fps` is their rate."""
    with _open(path) as (container, stream):
        converter = None
        for frame in container.decode(stream):
            converter = converter or _Converter(frame, size, crop)
            yield converter(frame)


def _exact(value: float | Fraction) -> Fraction:
    return Fraction(value).limit_denominator(10**7)


def _read(
    path: Path | str,
    start: float | Fraction,
    num_frames: int,
    fps: float | Fraction | None,
    size: int | None,
    crop: tuple[float, float],
    seek: bool,
) -> list[Frames] | None:
    """The frames of `read_clip`; None if the file was read from its middle and they were not all there."""
    with _open(path) as (container, stream):
        rate = _rate(stream, path)
        step = 1 / _exact(rate if fps is None else fps)
        times = [_exact(start) + k * step for k in range(num_frames)]
        by_count = container.format.name in _COUNTED_FORMATS
        tick = None if by_count else stream.time_base
        sought = seek and not by_count and _seek(container, stream, times[0], rate)
        count = 0

        def decode() -> Iterator[tuple[Fraction, VideoFrame]]:
            nonlocal count
            first = stream.start_time if sought else None
            for frame in container.decode(stream):
                count += 1
                if tick is None or frame.pts is None:
                    yield (count - 1) / rate, frame
                else:
                    first = frame.pts if first is None else first
                    yield (frame.pts - first) * tick, frame

        try:
            frames = _collect(decode(), times, rate, tick, size, crop)
        except av.error.FFmpegError as error:
            if sought:
                return None
            raise VideoError(f"{path}: decoding stops after {count} frames: {error.strerror}.", count) from error
    if len(frames) < num_frames and not sought:
        raise VideoError(
            f"{path}: ends after {count} frames ({float(count / rate):.2f} s), before the clip of {num_frames} frames "
            f"from {float(times[0]):.2f} s to {float(times[-1]):.2f} s.",
            count,
        )
    return frames if len(frames) == num_frames else None


def _seek(container: InputContainer, stream: VideoStream, start: Fraction, rate: Fraction) -> bool:
    """Go to the keyframe before `start`; False where it would save nothing or the first timestamp is unknown."""
    # Some demuxers seek by decoding time, which runs ahead of display by the depth of the B-frames: at most 16.
    target = start - 16 / rate
    if target < 1 or stream.start_time is None or stream.time_base is None:
        return False
    try:
        container.seek(stream.start_time + math.floor(target / stream.time_base), stream=stream)
    except av.error.FFmpegError:
        return False
    return True


def _collect(
    frames: Iterator[tuple[Fraction, VideoFrame]],
    times: list[Fraction],
    rate: Fraction,
    tick: Fraction | None,
    size: int | None,
    crop: tuple[float, float],
) -> list[Frames]:
    """Convert the frame that is shown at each of `times` (ascending): the last one whose time is not later.

    Fewer come back where the video ends before, none where it begins after the first wanted time.
    """
    # Times may be off by rounding: floats, or timestamps in ticks (1 ms in Matroska) that are short beside a frame.
    slack = tick / 2 if tick is not None and tick * rate < Fraction(1, 10) else Fraction(1, 10_000) / rate
    converter: _Converter | None = None
    found: list[Frames] = []
    shown: VideoFrame | None = None
    end = Fraction(0)
    for time, frame in frames:
        if shown is None and time > times[0] + slack:
            return []
        converted: Frames | None = None
        while len(found) < len(times) and shown is not None and times[len(found)] + slack < time:
            if converted is None:
                converter = converter or _Converter(shown, size, crop)
                converted = converter(shown)
            found.append(converted)
        if len(found) == len(times):
            return found
        shown = frame
        length = (frame.duration or 0) * (tick or 0)
        end = time + (length if tick is not None and length > 0 else 1 / rate)
    # The last frame stays until its own end.
    while shown is not None and len(found) < len(times) and times[len(found)] + slack < end:
        converter = converter or _Converter(shown, size, crop)
        found.append(converter(shown))
    return found


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
    try:
        with replacing(path) as partial, av.open(os.fspath(partial), "w") as container:
            stream: Any = None
            shape: tuple[int, ...] = ()
            for picture in frames:
                if stream is None:
                    shape = picture.shape
                    height, width = shape[0] + shape[0] % 2, shape[1] + shape[1] % 2
                    stream = container.add_stream(codec, rate=_exact(fps), options=_QUALITY.get(codec, {}) | options)
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
