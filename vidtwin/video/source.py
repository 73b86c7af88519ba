"""Open and probe sources of video: a file, its bytes, raw frames or a folder of images.

Damage is detected in three ways, since decoders report little of it. `survey` compares the header with the content of
the container (a truncated AVI decodes without an error); decoding stops at the first error instead of concealing it;
and a frame that FFmpeg marks as corrupt is an error too.
"""

import errno
import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, cast

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream

from vidtwin.errors import UserError
from vidtwin.files import NO_ROOM

Source = str | Path | bytes  # a file, a folder of numbered images, or the content of a file
Kind = Literal["unreadable", "truncated", "corrupt", "short", "slow"]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png"})
VIDEO_SUFFIXES = frozenset(
    {".avi", ".mp4", ".m4v", ".mkv", ".mov", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".ts", ".3gp"}
    | {".264", ".h264", ".265", ".hevc", ".y4m", ".yuv", ".mts", ".m2ts", ".gif"}
)
IMAGES_FPS = 24  # folders of images have no rate; this is DAVIS's
# Containers whose timestamps are not times: packed B-frames in AVI give pts 1, 2, 4, 3, 5, …; raw streams have none,
# and program streams only some.
COUNTED_FORMATS = frozenset(
    {"avi", "h264", "hevc", "m4v", "mpeg", "mpegvideo", "mjpeg", "rawvideo", "yuv4mpegpipe", "image2"}
)
# Containers whose index locates times, and whose first timestamp is that of the first picture.
SOUGHT_FORMATS = frozenset({"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"})
# Broadcasts, which may start within a group of pictures: undecodable packets before the first keyframe are not damage.
CUT_IN_FORMATS = frozenset({"mpegts", "mpeg"})

MIN_RATE, MAX_RATE = Fraction(1, 10**6), 10**6  # frames per second of a file that is written
# Errors of a system: a disk, a network, permissions, too many open files. FFmpeg has others for damaged content.
_SYSTEM_ERRORS = frozenset(
    {errno.EIO, errno.EACCES, errno.EMFILE, errno.ENFILE, errno.EBUSY, errno.ENODEV, errno.ENXIO, *NO_ROOM}
    | {errno.ETIMEDOUT, errno.ESTALE, errno.ENOTCONN, errno.ECONNRESET, errno.ECONNREFUSED, errno.ENETDOWN}
    | {errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH}
)
# Of these, errors that one file or its part of a disk has while others can be read; with them files that have gone.
_FILE_ERRORS = frozenset({errno.EIO, errno.EACCES, errno.EBUSY, errno.ENOENT})
HEADER_EXCESS = 3  # UCF-101's headers promise 1 to 3 frames more than there are
_NUMBERED = re.compile(r"(.*?)(\d+)(\.\w+)")
_RAW_SIZE = re.compile(r"_(\d+)x(\d+)(?:_(\d+(?:\.\d+)?))?")
_RATE = re.compile(r"([0-9]{1,19})(?:/([1-9][0-9]{0,18}))?")
_DISCARDED = 2  # AVINDEX_DISCARD_FRAME: outside the edit list


class VideoError(UserError):
    """A video that can't be used as requested; the message is one line that names it and the reason.

    Attributes:
        kind: "unreadable", "truncated" and "corrupt" are faults of the file; "short" and "slow" (of too low a rate) say
            that it does not hold the requested clip.
        decodable: Number of decoded frames, if the file was decoded to its end or to the first error.
        lasting: Whether the next attempt will fail as well; False if the system failed and not the file.
    """

    def __init__(
        self, message: str, decodable: int | None = None, kind: Kind = "unreadable", lasting: bool = True
    ) -> None:
        # A DataLoader rebuilds a worker's error from the text of its traceback, whose last line is our message.
        line = message.strip().rpartition("\n")[2]
        super().__init__(line.removeprefix(f"{__name__}.{type(self).__qualname__}: "))
        self.decodable = decodable
        self.kind: Kind = kind
        self.lasting = lasting


class DisorderedError(Exception):
    """Timestamps are missing or do not rise, so frames have to be counted."""


@dataclass(frozen=True)
class VideoInfo:
    """Properties of a video.

    `probe` reads them from the header: `num_frames` may then exceed the number of decodable frames by a few, or by half
    in a truncated file. `survey` reads them from the content of the container.

    Attributes:
        fps: Average frame rate in frames per second.
        duration: From the first frame to the end of the last one, in seconds.
        width: Of the stored picture, before rotation and sample aspect ratio, in pixels.
        height: Of the stored picture, in pixels.
    """

    path: Path
    num_frames: int
    fps: Fraction
    duration: float
    width: int
    height: int


def name_of(source: Source) -> str:
    """Return the name of a video for messages."""
    return f"a video of {len(source):,} bytes" if isinstance(source, bytes) else str(source)


@contextmanager
def open_video(source: Source, strict: bool = True) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a video and its first stream of pictures; turn all errors, here and inside, into `VideoError`.

    Args:
        source: Video file, folder of images, or the content of a file.
        strict: Let decoding stop at whatever FFmpeg finds odd.
    """
    name = name_of(source)
    try:
        images = _list_images(Path(source)) if not isinstance(source, bytes) and os.path.isdir(source) else []
        with _open_image(images[0]) if images else _container(source) as container:
            # FFmpeg treats a song's cover as a video stream, too.
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                raise VideoError(f"{name}: expected a video, got a file without a video stream.")
            best = container.streams.best("video")
            stream = best if isinstance(best, VideoStream) and best in streams else streams[0]
            if stream.codec_context is None:
                raise VideoError(f"{name}: expected a video that FFmpeg can decode, got an unknown codec.")
            stream.thread_type = "NONE"  # threads within one small video are slower, and workers have one core each
            stream.codec_context.options = {"err_detect": "explode"} if strict else {}
            yield (cast(InputContainer, Images(container, images)) if images else container), stream
    except (VideoError, DisorderedError):
        raise
    except FileNotFoundError as error:
        raise VideoError(f"{name}: there is no such file.", lasting=False) from error
    # A damaged header may request huge allocations, and one file that meets a bug must not end the work on the others.
    except Exception as error:
        known = isinstance(error, OSError | MemoryError | av.error.FFmpegError)
        says = "FFmpeg says" if known else type(error).__name__
        raise VideoError(
            f"{name}: expected a readable video, {says}: {reason_of(error)}.", lasting=is_lasting(error)
        ) from error


def _container(source: Source) -> InputContainer:
    if isinstance(source, bytes):
        return av.open(io.BytesIO(source), "r", metadata_errors="replace")
    path = Path(source)
    if path.suffix.lower() == ".yuv":
        return _open_raw(path)
    return av.open(os.fspath(path), "r", metadata_errors="replace")  # titles may be in any encoding


class Images:
    """The images of a folder as the container of a video.

    FFmpeg's own reader of image sequences takes an empty file for the end, and needs numbers of equal width.

    Attributes:
        image: Name of the latest image that was read.
    """

    def __init__(self, first: InputContainer, paths: list[Path]) -> None:
        self._first = first
        self._paths = paths
        self.image = paths[0].name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._first, name)

    def __len__(self) -> int:
        return len(self._paths)

    def demux(self, stream: VideoStream) -> Iterator[Packet]:
        """Yield a packet per image and an empty last one, as a container does."""
        for number, path in enumerate(self._paths):
            self.image = path.name
            packet = Packet(_read_image(path, number))
            packet.stream, packet.time_base, packet.duration = stream, Fraction(1, IMAGES_FPS), 1
            packet.pts, packet.dts, packet.is_keyframe = number, number, True
            yield packet
        packet = Packet()
        packet.stream = stream
        yield packet


def _list_images(folder: Path) -> list[Path]:
    """List the images of a folder by the consecutive numbers at the end of their names."""
    shown = (path for path in folder.iterdir() if not path.name.startswith("."))
    images = [path for path in shown if path.suffix.lower() in IMAGE_SUFFIXES]
    matches = {path: _NUMBERED.fullmatch(path.name) for path in images}
    parts = {path: (match[1], int(match[2]), match[3]) for path, match in matches.items() if match}
    if not parts:
        raise VideoError(f"{folder}: expected images named like 00000.jpg in a folder that is a video, found none.")
    images.sort(key=lambda path: (path not in parts, parts.get(path), path.name))
    prefix, start, suffix = parts[images[0]]
    for number, path in enumerate(images, start):
        if parts.get(path) != (prefix, number, suffix):
            width = len(images[0].name) - len(prefix) - len(suffix)
            expected = f"{prefix}{number:0{width}d}{suffix}"
            raise VideoError(f"{folder}: expected the image {expected}, got {path.name}.", kind="truncated")
    return images


def _read_image(path: Path, number: int) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        text = f"{path.parent}: the image {path.name} can't be read: {reason_of(error)}."
        raise VideoError(text, number, "corrupt", is_lasting(error)) from error
    if not content:
        raise VideoError(f"{path.parent}: the image {path.name} is empty.", number, "corrupt")
    return content


def _open_image(path: Path) -> InputContainer:
    _read_image(path, 0)
    try:
        return av.open(
            os.fspath(path), "r", format="image2", options={"pattern_type": "none", "framerate": str(IMAGES_FPS)}
        )
    except av.error.InvalidDataError as error:
        raise VideoError(f"{path.parent}: the image {path.name} can't be read: {reason_of(error)}.", 0) from error


def _open_raw(path: Path) -> InputContainer:
    """Open raw 8-bit 4:2:0 planes, with size and rate from the name, as in videoSRC01_1920x1080_30.yuv."""
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
    """Read the header of a video; if it has no frame count, count packets without decoding."""
    with open_video(source) as (container, stream):
        fps = rate_of(stream, source)
        promised = len(container) if isinstance(container, Images) else stream.frames
        num_frames = promised or sum(1 for packet in container.demux(stream) if packet.size)
        return _info(source, stream, num_frames, fps)


def survey(source: Source) -> VideoInfo:
    """Measure the true content of a video without decoding: MP4 by its index, other files by all their packets.

    Raises:
        VideoError: It can't be opened or demuxed, has no frame, or is shorter than its header says.
    """
    with open_video(source) as (container, stream):
        rate = rate_of(stream, source)
        tick = stream.time_base or 1 / rate
        counted = container.format.name in COUNTED_FORMATS
        if "mp4" in container.format.name and stream.frames > 0:
            count, length = _read_index(container, stream, source)
        else:
            held = _demux(container, stream)
            count, length = held.count, Fraction(0)
            if count > 1:  # `count` frames at the rate from the first to the last
                length = (held.last - held.first) * tick * Fraction(count, count - 1)
            if container.format.name == "avi":  # its count includes dropped frames, which repeat the previous one
                count = held.last_dts - held.first_dts + 1 if held.count else 0
            if counted and stream.frames - count > HEADER_EXCESS:
                raise _truncated(source, f"{stream.frames} frames, it holds {count}", count)
            promised = None if counted else _promised_end(container, stream)
            if promised is not None and promised - held.end * tick > max(Fraction(1, 2), HEADER_EXCESS / rate):
                ends = f"{float(promised):.2f} s, it ends at {float(held.end * tick):.2f} s"
                raise _truncated(source, ends, count)
        if not count:
            raise VideoError(f"{name_of(source)}: expected a video, got one without frames.")
        # If timestamps are true the header's rate is a guess; keep it if it is right to half a frame.
        if not counted and length > 0 and abs(count - length * rate) > Fraction(1, 2):
            rate = (count / length).limit_denominator(100_000)
        return _info(source, stream, count, rate)


@dataclass
class _Demuxed:
    """Packets of a video: number with content, and first, last and ending times in units of the stream."""

    count: int = 0
    first: int = 0
    last: int = 0
    end: int = 0
    first_dts: int = 0
    last_dts: int = 0


def _demux(container: InputContainer, stream: VideoStream) -> _Demuxed:
    held = _Demuxed()
    for packet in shown_packets(container, stream):
        if packet.is_discard:  # outside the edit list
            continue
        begin = packet.pts if packet.pts is not None else packet.dts
        if begin is not None:
            held.first = begin if not held.count else min(held.first, begin)
            held.last = max(held.last, begin)
            held.end = max(held.end, begin + (packet.duration or 0))
        dts = packet.dts if packet.dts is not None else held.last_dts + 1
        held.first_dts, held.last_dts = (held.first_dts if held.count else dts), dts
        held.count += 1
    return held


def shown_packets(container: InputContainer, stream: VideoStream, flush: bool = False) -> Iterator[Packet]:
    """Yield packets with pictures from the first decodable one on; with `flush` also the empty last one."""
    begun = container.format.name not in CUT_IN_FORMATS
    for packet in container.demux(stream):
        begun = begun or packet.is_keyframe
        if (begun and packet.size) or (flush and not packet.size):
            yield packet


def _read_index(container: InputContainer, stream: VideoStream, source: Source) -> tuple[int, Fraction]:
    """Return an MP4's frames and length in seconds; a readable index is intact, as it does not lie between samples."""
    entries = list(stream.index_entries)
    last = max((entry.pos + entry.size for entry in entries), default=0)
    if last > container.size > 0:
        intact = sum(entry.pos + entry.size <= container.size for entry in entries)
        raise _truncated(source, f"{len(entries)} frames, it holds {intact}", intact)
    shown = sum(not entry.flags & _DISCARDED for entry in entries)
    return shown, (stream.duration or 0) * (stream.time_base or Fraction(0))


def _promised_end(container: InputContainer, stream: VideoStream) -> Fraction | None:
    """Return the end of the video in seconds according to its header, or None; FFmpeg's estimates do not count."""
    if container.format.name in CUT_IN_FORMATS:
        return None
    if container.format.name == "asf" and len(container.streams) > 1:  # WMV: of the longest stream, such as the sound
        return None
    if match := re.match(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", "")):  # Matroska, from zero
        return int(match[1]) * 3600 + int(match[2]) * 60 + Fraction(match[3])
    if stream.duration is not None and stream.time_base is not None:
        return ((stream.start_time or 0) + stream.duration) * stream.time_base
    if container.duration is not None and len(container.streams) == 1:
        return Fraction(container.duration, av.time_base)
    return None


def rate_of(stream: VideoStream, source: Source) -> Fraction:
    """Return the average frame rate in the header; raise `VideoError` if it has none."""
    rate = stream.average_rate or stream.guessed_rate
    if not rate or rate <= 0:
        raise VideoError(f"{name_of(source)}: expected a video with a frame rate, got a header without one.")
    return Fraction(rate)


def parse_rate(text: str) -> Fraction:
    """Parse frames per second of a manifest, such as `30000/1001`; raise `ValueError` for anything else."""
    match = _RATE.fullmatch(text)
    rate = Fraction(int(match[1]), int(match[2] or 1)) if match else Fraction(0)
    if not MIN_RATE <= rate <= MAX_RATE:
        raise ValueError(f"frames per second: {ascii(text)[:40]}")
    return rate


def _info(source: Source, stream: VideoStream, num_frames: int, fps: Fraction) -> VideoInfo:
    path = Path("-") if isinstance(source, bytes) else Path(source)
    return VideoInfo(path, num_frames, fps, float(num_frames / fps), stream.width, stream.height)


def _truncated(source: Source, promised: str, decodable: int) -> VideoError:
    return VideoError(f"{name_of(source)}: truncated: its header promises {promised}.", decodable, "truncated")


def is_lasting(error: Exception) -> bool:
    """Return whether an error will recur; failures of a disk, a network or a memory limit may be temporary.

    Not every OSError is one of the system: FFmpeg has "Function not implemented" for content, too.
    """
    return not isinstance(error, MemoryError) and getattr(error, "errno", None) not in _SYSTEM_ERRORS


def is_of_file(error: VideoError) -> bool:
    """Return whether an error is of its video alone, such as a bad sector or a missing right; others may be intact."""
    return error.lasting or getattr(error.__cause__, "errno", None) in _FILE_ERRORS


def reason_of(error: Any) -> str:
    """Return the reason that FFmpeg or the system gives for an error."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
