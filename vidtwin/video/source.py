"""What holds a video: a file, its bytes, raw frames or a folder of images; opened, and what is in it told.

Damage is told in three ways, since decoders say little of it. `survey` compares what the header promises with what the
container holds (a truncated AVI decodes without a word); decoding is asked to stop at the first error instead of
concealing it; and a frame that FFmpeg marks as corrupt is an error too.
"""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from vidtwin.errors import UserError

Source = str | Path | bytes  # a file, a folder of numbered images, or the content of a file
Kind = Literal["unreadable", "truncated", "corrupt", "short", "slow"]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
VIDEO_SUFFIXES = frozenset(
    {".avi", ".mp4", ".m4v", ".mkv", ".mov", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".ts", ".3gp"}
    | {".264", ".h264", ".265", ".hevc", ".y4m", ".yuv"}
)
IMAGES_FPS = 24  # folders of images have no rate; DAVIS has this one
# Containers whose timestamps are no times: packed B-frames in AVI give pts 1, 2, 4, 3, 5, …; raw streams have none.
COUNTED_FORMATS = frozenset({"avi", "h264", "hevc", "m4v", "mpegvideo", "mjpeg", "rawvideo", "yuv4mpegpipe", "image2"})

_HEADER_EXCESS = 3  # UCF-101's headers promise 1 to 3 frames more than there are
_NUMBERED = re.compile(r"(.*?)(\d+)(\.\w+)")
_RAW_SIZE = re.compile(r"_(\d+)x(\d+)(?:_(\d+(?:\.\d+)?))?")
_DISCARDED = 2  # AVINDEX_DISCARD_FRAME: outside of the edit list


class VideoError(UserError):
    """A video that can't be used as asked: one line that names it and says what was wrong.

    Attributes:
        kind: "unreadable", "truncated" and "corrupt" are faults of the file; "short" and "slow" (of too low a rate) say
            that it does not hold the clip that was asked for.
        decodable: How many frames the file gave, if it was decoded to its end or to where it breaks.
    """

    def __init__(self, message: str, decodable: int | None = None, kind: Kind = "unreadable") -> None:
        # A DataLoader builds the error of a worker anew from the text of its traceback; the last line is ours.
        line = message.strip().rpartition("\n")[2]
        super().__init__(line.removeprefix(f"{__name__}.{type(self).__qualname__}: "))
        self.decodable = decodable
        self.kind: Kind = kind


@dataclass(frozen=True)
class VideoInfo:
    """What is in a video.

    From `probe` it is what the header says: `num_frames` may then exceed the number of decodable frames by a few, or
    by half in a truncated file. From `survey` it is what the container holds.

    Attributes:
        fps: Average frame rate in frames per second.
        duration: From the first frame to the end of the last one, in seconds.
        width: Of the stored picture, before rotation and sample aspect ratio, in pixels.
        height: Likewise.
    """

    path: Path
    num_frames: int
    fps: Fraction
    duration: float
    width: int
    height: int


def name_of(source: Source) -> str:
    """What messages call a video."""
    return f"a video of {len(source):,} bytes" if isinstance(source, bytes) else str(source)


@contextmanager
def open_video(source: Source) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a video and its first stream of pictures; what FFmpeg raises here and inside becomes `VideoError`."""
    name = name_of(source)
    try:
        with _container(source) as container:
            # The cover of a song is a video stream to FFmpeg, too.
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise VideoError(f"{name}: expected a video, got a file without a video stream.")
            stream = streams[0]
            if stream.codec_context is None:
                raise VideoError(f"{name}: expected a video that FFmpeg can decode, it does not know the codec.")
            stream.thread_type = "NONE"  # threads within one small video are slower, and workers have one core each
            stream.codec_context.options = {"err_detect": "explode"}
            yield container, stream
    except FileNotFoundError:
        raise VideoError(f"{name}: there is no such file.") from None
    except (av.error.FFmpegError, OSError, MemoryError) as error:  # a damaged header may ask for absurd amounts
        raise VideoError(f"{name}: expected a readable video, FFmpeg says: {_reason(error)}.") from error


def _container(source: Source) -> InputContainer:
    if isinstance(source, bytes):
        return av.open(io.BytesIO(source), "r", metadata_errors="replace")
    path = Path(source)
    if path.is_dir():
        return _open_images(path)
    if path.suffix.lower() == ".yuv":
        return _open_raw(path)
    return av.open(os.fspath(path), "r", metadata_errors="replace")  # titles may be in any encoding


def _open_images(folder: Path) -> InputContainer:
    """Images with consecutive numbers at the end of their names."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    matches = [_NUMBERED.fullmatch(name) for name in names]
    first = matches[0] if matches else None
    if first is None:
        raise VideoError(f"{folder}: expected images named like 00000.jpg in a folder that is a video, found none.")
    start, width = int(first[2]), len(first[2])
    for offset, name in enumerate(names):
        expected = f"{first[1]}{start + offset:0{width}d}{first[3]}"
        if name != expected:
            raise VideoError(f"{folder}: expected the image {expected}, the next one is {name}.", kind="truncated")
    pattern = f"{os.fspath(folder)}/{first[1]}".replace("%", "%%") + f"%0{width}d{first[3]}"
    options = {"start_number": str(start), "framerate": str(IMAGES_FPS), "pattern_type": "sequence"}
    return av.open(pattern, "r", format="image2", options=options)


def _open_raw(path: Path) -> InputContainer:
    """Planes of 8-bit 4:2:0; size and rate stand in the name, as in videoSRC01_1920x1080_30.yuv."""
    match = _RAW_SIZE.search(path.stem)
    if match is None or match[3] is None:
        raise VideoError(
            f"{path}: expected the size and rate of raw frames in the file's name, as in NAME_1920x1080_30.yuv."
        )
    width, height, rate = int(match[1]), int(match[2]), match[3]
    frame, size = width * height * 3 // 2, path.stat().st_size
    if not size or size % frame:
        raise VideoError(
            f"{path}: expected whole frames of {frame:,} bytes (8 bits, 4:2:0), got {size:,} bytes.", kind="truncated"
        )
    options = {"video_size": f"{width}x{height}", "framerate": rate, "pixel_format": "yuv420p"}
    return av.open(os.fspath(path), "r", format="rawvideo", options=options)


def probe(source: Source) -> VideoInfo:
    """Read the header of a video. Where it has no frame count the packets are counted, without decoding."""
    with open_video(source) as (container, stream):
        fps = rate_of(stream, source)
        num_frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
        return _info(source, stream, num_frames, fps, float(num_frames / fps))


def survey(source: Source) -> VideoInfo:
    """What a video really holds, without decoding it: MP4 by its index, other files by all their packets.

    Raises:
        VideoError: It can't be opened or demuxed, has no frame, or holds less than its header promises.
    """
    with open_video(source) as (container, stream):
        rate = rate_of(stream, source)
        tick = stream.time_base or 1 / rate
        indexed = "mp4" in container.format.name and stream.frames > 0
        if indexed:
            count, end = _indexed(container, stream, source)
        else:
            count, end = 0, Fraction(0)
            first: int | None = None
            for packet in container.demux(stream):
                if not packet.size or packet.is_discard:
                    continue
                count += 1
                if packet.pts is not None:
                    first = packet.pts if first is None else min(first, packet.pts)
                    end = max(end, (packet.pts + (packet.duration or 0)) * tick)
            end -= (first or 0) * tick
        if not count:
            raise VideoError(f"{name_of(source)}: expected a video, got one without frames.")
        counted = container.format.name in COUNTED_FORMATS
        if counted and stream.frames - count > _HEADER_EXCESS:
            raise VideoError(
                f"{name_of(source)}: truncated: its header promises {stream.frames} frames, it holds {count}.",
                count,
                "truncated",
            )
        promised = None if counted or indexed else _promised(container, stream)
        if promised is not None and promised - end > max(Fraction(1, 2), _HEADER_EXCESS / rate):
            raise VideoError(
                f"{name_of(source)}: truncated: its header promises {float(promised):.2f} s, it ends after "
                f"{float(end):.2f} s.",
                count,
                "truncated",
            )
        if not counted and end > 0 and not Fraction(99, 100) < count / end / rate < Fraction(101, 100):
            rate = (count / end).limit_denominator(100_000)  # of a variable rate headers tell a guess
        return _info(source, stream, count, rate, float(count / rate))


def _indexed(container: InputContainer, stream: VideoStream, source: Source) -> tuple[int, Fraction]:
    """Frames of an MP4, and its length in seconds; its index lies before or behind all samples, so it is whole."""
    entries = list(stream.index_entries)
    last = max((entry.pos + entry.size for entry in entries), default=0)
    if last > container.size > 0:
        whole = sum(entry.pos + entry.size <= container.size for entry in entries)
        raise VideoError(
            f"{name_of(source)}: truncated: its header promises {len(entries)} frames, it holds {whole}.",
            whole,
            "truncated",
        )
    shown = sum(not entry.flags & _DISCARDED for entry in entries)
    return shown, (stream.duration or 0) * (stream.time_base or Fraction(0))


def _promised(container: InputContainer, stream: VideoStream) -> Fraction | None:
    """Seconds of video that the header promises, if it does."""
    if stream.duration is not None and stream.time_base is not None:
        return stream.duration * stream.time_base
    if match := re.match(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", "")):  # Matroska
        return int(match[1]) * 3600 + int(match[2]) * 60 + Fraction(match[3])
    if container.duration is not None and len(container.streams) == 1:
        return Fraction(container.duration, av.time_base)
    return None


def rate_of(stream: VideoStream, source: Source) -> Fraction:
    """Average frame rate that the header tells."""
    rate = stream.average_rate or stream.guessed_rate
    if not rate or rate <= 0:
        raise VideoError(f"{name_of(source)}: expected a video with a frame rate, the header has none.")
    return Fraction(rate)


def _info(source: Source, stream: VideoStream, num_frames: int, fps: Fraction, duration: float) -> VideoInfo:
    path = Path("-") if isinstance(source, bytes) else Path(source)
    return VideoInfo(path, num_frames, fps, duration, stream.width, stream.height)


def _reason(error: Any) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
