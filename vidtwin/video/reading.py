"""Read the frames of a video that are shown at given times.

Clips are specified by time: frame k is the one shown at `start + k / fps`, counted from the first frame of the file. It
is found in one of two ways:

* by counting frames if timestamps are not times (in AVI, in raw streams, and if they do not rise), or if consecutive
  frames are requested;
* by timestamps otherwise, which also holds at a variable frame rate.
"""

import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from .picture import Converter, Frames, Resize, Size
from .source import (
    COUNTED_FORMATS,
    CUT_IN_FORMATS,
    SOUGHT_FORMATS,
    DisorderedError,
    Images,
    Source,
    VideoError,
    is_lasting,
    name_of,
    open_video,
    rate_of,
    reason_of,
    shown_packets,
    survey,
)

CENTRE = (0.5, 0.5)
# Codecs of which strict decoding refuses sound streams that are merely unusual: MPEG-2 with a picture for each field,
# H.264 with odd messages beside the pictures (SEI). Damage of these is an error in FFmpeg's log but for the harmless
# ones. HEVC, for one, is damaged without a line in the log.
_LENIENT_CODECS = frozenset({"h264", "mpeg1video", "mpeg2video"})
_HARMLESS = re.compile(r"SEI type .*|.*, ignoring")
# Files of these codecs, each with its size and modification time, that this process knows to be merely unusual: they
# are not decoded strictly again.
_unusual: set[tuple[str, int, int]] = set()


def read_clip(
    source: Source,
    start: float | Fraction = 0.0,
    num_frames: int = 16,
    fps: float | Fraction | None = None,
    size: Size | None = None,
    crop: tuple[float, float] = CENTRE,
    loop: bool = False,
    rate: Fraction | None = None,
    resize: Resize = "area",
    count: bool = False,
) -> Frames:
    """Read the frames that are shown at the times `start + k / fps`.

    Args:
        source: Video file, folder of images, or the content of a file.
        start: Time of the first frame in seconds, counted from the first frame of the file.
        num_frames: T.
        fps: Frames per second of the clip; None: consecutive frames. Above the file's rate frames repeat.
        size: Side of the square picture, or height and width, in pixels; None: the whole picture.
        crop: Position of the largest rectangle of that shape in the upright picture, as (x, y): 0 left or top, 0.5
            centre, 1 right or bottom.
        loop: Start the video again if it ends before the clip does.
        rate: Average rate of the file in frames per second, from `survey`; None: the header's rate.
        resize: Filter for `size`, see `vidtwin.video.picture.Converter`.
        count: Take the file's frames for evenly spaced at `rate`, whatever their timestamps say, if `fps` is given too.

    Returns:
        uint8 (T, H, W, 3), RGB, upright and with square pixels.

    Raises:
        VideoError: The file can't be read, is damaged between its keyframe before the clip and the clip's end (kind
            "corrupt"), or ends before the last requested frame (kind "short"); `decodable` is then its frame count.
    """
    least = min(size) if isinstance(size, tuple) else 1 if size is None else size
    if num_frames < 1 or least < 1 or (fps is not None and fps <= 0) or not 0 <= start < math.inf:
        raise VideoError(
            f"{name_of(source)}: expected num_frames and size of at least 1, fps above 0 and start of at least 0, got "
            f"{num_frames}, {size}, {fps} and {start}."
        )
    if not all(0 <= place <= 1 for place in crop):
        raise VideoError(f"{name_of(source)}: expected crop as two numbers from 0 to 1, got {crop}.")
    exact = None if fps is None else _to_fraction(fps)
    wanted = _Wanted(_to_fraction(start), num_frames, exact, size, crop, rate, resize, count or fps is None)
    try:
        return _read(source, wanted)
    except VideoError as error:
        if not (loop and error.kind == "short" and error.decodable):
            raise
    return _read(source, replace(wanted, period=_length(source)))


def decode(source: Source) -> Iterator[tuple[Fraction, VideoFrame]]:
    """Yield every frame of a video with its time in seconds from the first one, in constant memory.

    Raises:
        VideoError: At the first damaged frame, after `decodable` intact ones.
    """
    with _open(source) as (container, stream, strict):
        yield from _timed(container, stream, source, strict)


@contextmanager
def _open(source: Source) -> Iterator[tuple[InputContainer, VideoStream, bool]]:
    """Open a video as `open_video` does → also whether to decode it strictly."""
    strict = _key(source) not in _unusual
    with open_video(source, strict) as (container, stream):
        yield container, stream, strict


def _key(source: Source) -> tuple[str, int, int] | None:
    """Return a file's path, size and modification time; None for bytes and missing files."""
    if isinstance(source, bytes):
        return None
    try:
        status = os.stat(source)
    except (OSError, ValueError):
        return None
    return os.path.abspath(source), status.st_size, status.st_mtime_ns


def _timed(
    container: InputContainer, stream: VideoStream, source: Source, strict: bool
) -> Iterator[tuple[Fraction, VideoFrame]]:
    rate = rate_of(stream, source)
    by_count = container.format.name in COUNTED_FORMATS
    first: int | None = None
    last = Fraction(-1)
    for place, frame in _decode(container, stream, source, strict=strict):
        time = place / rate
        if not by_count and frame.pts is not None and stream.time_base is not None:
            first = frame.pts if first is None else first
            time = max((frame.pts - first) * stream.time_base, last)
        last = time
        yield time, frame


def iter_frames(source: Source, size: int | None = None, crop: tuple[float, float] = CENTRE) -> Iterator[Frames]:
    """Yield every frame of a video, uint8 (H, W, 3), in constant memory. `probe(source).fps` is their rate."""
    with _open(source) as (container, stream, strict):
        converter = Converter(size, crop, stream.sample_aspect_ratio, name_of(source))
        for _, frame in _decode(container, stream, source, strict=strict):
            yield converter(frame)


def timed_frames(
    source: Source, size: int | None = None, crop: tuple[float, float] = CENTRE
) -> Iterator[tuple[Fraction, Frames]]:
    """Yield frames like `iter_frames`, each with its time in seconds from the first one; times never decrease."""
    with _open(source) as (container, stream, strict):
        converter = Converter(size, crop, stream.sample_aspect_ratio, name_of(source))
        for time, frame in _timed(container, stream, source, strict):
            yield time, converter(frame)


def _decode(
    container: InputContainer, stream: VideoStream, source: Source, again: bool = True, strict: bool = True
) -> Iterator[tuple[int, VideoFrame]]:
    """Yield decoded frames with their numbers from 0; any damage that FFmpeg reports is an error.

    AVI skips the number of a dropped frame, so that the previous one is shown again.

    Args:
        container: Container of `source`.
        stream: Its stream of pictures.
        source: For messages, and to be opened again.
        again: If strict decoding fails with one of `_LENIENT_CODECS`, decode again from the beginning.
        strict: Whether the stream was opened so.
    """
    name = container.format.name
    counted = name in COUNTED_FORMATS
    begun = name not in CUT_IN_FORMATS
    first: int | None = None
    waiting: deque[int] = deque()  # numbers of the packets whose frames are not decoded yet
    frames = 0
    try:
        for packet in shown_packets(container, stream, flush=True):
            if packet.size:
                number = frames + len(waiting)
                if name == "avi" and packet.dts is not None:
                    first = packet.dts if first is None else first
                    number = packet.dts - first
                waiting.append(number)
            try:
                decoded, logged = (packet.decode(), None) if strict else _decode_lenient(packet)
            except av.error.FFmpegError:
                if begun:
                    raise
                decoded, logged = [], None
            if begun and logged:
                text = f"{name_of(source)}: decoding stops after {frames} frames: {logged}."
                raise VideoError(text, frames, "corrupt")
            for frame in decoded:
                if frame.is_corrupt:
                    if not begun:
                        continue
                    raise VideoError(f"{name_of(source)}: frame {frames} is damaged.", frames, "corrupt")
                begun = True
                yield (waiting.popleft() if counted and waiting else frames), frame
                frames += 1
            # If frames are counted, a silently lost one would shift all later ones.
            if counted and packet.size and begun and len(waiting) > stream.codec_context.reorder_depth + 1:
                raise VideoError(
                    f"{name_of(source)}: frame {frames} or one shortly before it is missing.", frames, "corrupt"
                )
        return
    except (av.error.FFmpegError, MemoryError) as error:
        at = f" at {container.image}" if isinstance(container, Images) else ""
        text = f"{name_of(source)}: decoding stops after {frames} frames{at}: {reason_of(error)}."
        failure = VideoError(text, frames, "corrupt", is_lasting(error))
        if not (again and strict and failure.lasting and stream.codec_context.name in _LENIENT_CODECS):
            raise failure from error
    key = _key(source)
    try:
        with open_video(source, strict=False) as (container, stream):
            for found in islice(_decode(container, stream, source, strict=False), frames, None):
                if key is not None:
                    _unusual.add(key)
                yield found
    except VideoError as error:
        raise (failure if (error.decodable or 0) <= frames else error) from None


def _decode_lenient(packet: Packet) -> tuple[list[VideoFrame], str | None]:
    """Decode a packet → frames, and the first error that FFmpeg logged for it and that is not harmless."""
    level, skip = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)  # the last packet may have had the same one
    try:
        with av.logging.Capture() as logged:  # of this thread; nothing is shown
            frames = packet.decode()
    finally:
        av.logging.set_level(level)
        av.logging.set_skip_repeated(skip)
    messages = (text.strip() for severity, _, text in logged if severity <= av.logging.ERROR)
    return frames, next((text for text in messages if text and not _HARMLESS.fullmatch(text)), None)


def _to_fraction(value: float | Fraction) -> Fraction:
    return Fraction(value).limit_denominator(10**7)


@dataclass(frozen=True)
class _Wanted:
    """The arguments of `read_clip`; `period` is the length in seconds of a video that loops."""

    start: Fraction
    num_frames: int
    fps: Fraction | None
    size: Size | None
    crop: tuple[float, float]
    rate: Fraction | None
    resize: Resize
    count: bool
    period: Fraction | None = None

    def times(self, rate: Fraction) -> list[Fraction]:
        """Return the frames' times for a video of this rate, ascending unless the video loops."""
        step = 1 / (self.fps or rate)
        times = [self.start + k * step for k in range(self.num_frames)]
        return times if self.period is None else [time % self.period for time in times]


def _read(source: Source, wanted: _Wanted) -> Frames:
    try:
        clip = _attempt(source, wanted, seek=not wanted.count, count=wanted.count)
        if clip is None:  # a seek did not find all frames
            clip = _attempt(source, wanted, seek=False)
    except DisorderedError:
        clip = _attempt(source, wanted, seek=False, count=True)
    assert clip is not None
    return clip


def _attempt(source: Source, wanted: _Wanted, seek: bool, count: bool = False) -> Frames | None:
    """Read the clip; return None if the file was read from a seek position and frames were missing."""
    with _open(source) as (container, stream, strict):
        rate = wanted.rate or rate_of(stream, source)
        times = wanted.times(rate)
        order = sorted(range(len(times)), key=times.__getitem__)
        ascending = [times[index] for index in order]
        counted = count or container.format.name in COUNTED_FORMATS
        unit = 1 / rate if counted or stream.time_base is None else stream.time_base
        sought = (
            seek
            and not counted
            and container.format.name in SOUGHT_FORMATS
            and _seek(container, stream, ascending[0], rate)
        )
        decoded = 0

        def locate() -> Iterator[tuple[int, VideoFrame]]:
            """Yield frames with their positions in units of `unit` from the first frame of the file."""
            nonlocal decoded
            first = stream.start_time if sought else None
            last: int | None = None
            for place, frame in _decode(container, stream, source, again=not sought, strict=strict):
                decoded = place + 1
                if counted:
                    yield place, frame
                    continue
                if frame.pts is None or (last is not None and frame.pts <= last):
                    raise DisorderedError
                last = frame.pts
                first = last if first is None else first
                yield last - first, frame

        converter = Converter(wanted.size, wanted.crop, stream.sample_aspect_ratio, name_of(source), wanted.resize)
        clip: Frames | None = None
        found = 0

        def put(frame: VideoFrame, number: int) -> None:
            """Store a frame that is shown at the next `number` times."""
            nonlocal clip, found
            planes = converter.planes(frame)
            if clip is None:
                clip = np.empty((len(times), *planes[0].shape, 3), np.uint8)
            first, *others = order[found : found + number]
            np.stack(planes, axis=-1, out=clip[first])
            clip[others] = clip[first]
            found += number

        try:
            _collect(locate(), ascending, unit, rate, put)
        except VideoError:
            if sought:
                return None
            raise
        if found == len(times):
            return clip
        if sought:
            return None
        raise VideoError(
            f"{name_of(source)}: ends after {decoded} frames ({float(decoded / rate):.2f} s), before the clip of "
            f"{len(times)} frames from {float(ascending[0]):.2f} s to {float(ascending[-1]):.2f} s.",
            decoded,
            "short",
        )


def _length(source: Source) -> Fraction:
    """Return the seconds from the first frame to the end of the last decodable one."""
    info = survey(source)
    end = Fraction(0)
    for time, _ in decode(source):
        end = time + 1 / info.fps
    return end


def _seek(container: InputContainer, stream: VideoStream, start: Fraction, rate: Fraction) -> bool:
    """Seek to the keyframe before `start`; return False if that saves nothing or the first timestamp is unknown."""
    # Some demuxers seek by decoding time, which precedes display time by the depth of the B-frames: at most 16.
    target = start - 16 / rate
    if target < 1 or stream.start_time is None or stream.time_base is None:
        return False
    try:
        container.seek(stream.start_time + math.floor(target / stream.time_base), stream=stream)
    except av.error.FFmpegError:
        return False
    return True


def _collect(
    frames: Iterator[tuple[int, VideoFrame]],
    times: list[Fraction],
    unit: Fraction,
    rate: Fraction,
    put: Callable[[VideoFrame, int], None],
) -> None:
    """Find the frame shown at each of `times` (ascending): the last one whose time is not later.

    Each frame is put once, with the number of times at which it is shown. Times after the end of the video are not
    found, and none are if the video starts after the first.
    """
    # Two timestamps rounded to units (1 ms in Matroska), this one and the first, may be off by one unit together.
    # Units that are long compared with a frame belong to a grid on which it lies exactly.
    slack = Fraction(1, 10_000) / rate + (unit if unit * rate < Fraction(1, 4) else 0)
    # In whole units, since every frame of the file is compared: it is later if its position is greater.
    wanted = [math.floor((time + slack) / unit) for time in times]
    found = 0
    shown: VideoFrame | None = None
    place = 0

    def put_until(later: float | Fraction) -> None:
        nonlocal found
        number = 0
        while found + number < len(wanted) and wanted[found + number] < later:
            number += 1
        if number and shown is not None:
            put(shown, number)
            found += number

    for place, frame in frames:
        if place > wanted[found]:
            if shown is None:
                return
            put_until(place)
            if found == len(wanted):
                return
        shown = frame
    if shown is not None:  # the last frame is shown until its own end
        timed = unit != 1 / rate and shown.duration
        put_until(place + (shown.duration if timed else 1 / rate / unit))
