"""Which frames of a video are shown when.

A clip is asked for by time: frame k of a clip is the one that is shown at `start + k / fps`, counted from the first
frame of the file. Which frame that is, is found in one of two ways:

* by counting frames, where timestamps are no times: in AVI, in raw streams, and wherever they do not rise; and where
  every frame is wanted, one after the other;
* by timestamps everywhere else: there they are true, at a variable frame rate too.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from .picture import Converter, Frames
from .source import (
    COUNTED_FORMATS,
    CUT_IN_FORMATS,
    SOUGHT_FORMATS,
    Source,
    VideoError,
    name_of,
    open_video,
    rate_of,
    shown_packets,
    survey,
)

CENTRE = (0.5, 0.5)


class _DisorderedError(Exception):
    """Timestamps that are absent or do not rise: frames have to be counted."""


def read_clip(
    source: Source,
    start: float | Fraction = 0.0,
    num_frames: int = 16,
    fps: float | Fraction | None = None,
    size: int | None = None,
    crop: tuple[float, float] = CENTRE,
    loop: bool = False,
    rate: Fraction | None = None,
) -> Frames:
    """Read the frames that are shown at the times `start + k / fps`.

    Args:
        source: Video file, folder of images, or the content of a file.
        start: Time of the first frame in seconds, counted from the first frame of the file.
        num_frames: T.
        fps: Frames per second of the clip; None: consecutive frames. Above the file's rate frames repeat.
        size: Side of the square picture in pixels; None: the whole picture.
        crop: Where the largest square lies in the upright picture, as (x, y): 0 left or top, 0.5 centre, 1 right or
            bottom.
        loop: Begin the video again where it ends before the clip does.
        rate: Average rate of the file, as `survey` found it; None: what the header says.

    Returns:
        uint8 (T, H, W, 3), RGB, upright and with square pixels.

    Raises:
        VideoError: The file can't be read, is damaged between its keyframe before the clip and the clip's end (kind
            "corrupt"), or ends before the last wanted frame (kind "short"); `decodable` is then how many frames it has.
    """
    if num_frames < 1 or (size is not None and size < 1) or (fps is not None and fps <= 0) or not 0 <= start < math.inf:
        raise VideoError(
            f"{name_of(source)}: expected num_frames and size of at least 1, fps above 0 and start of at least 0, got "
            f"{num_frames}, {size}, {fps} and {start}."
        )
    if not all(0 <= place <= 1 for place in crop):
        raise VideoError(f"{name_of(source)}: expected crop as two numbers from 0 to 1, got {crop}.")
    wanted = _Wanted(_exact(start), num_frames, None if fps is None else _exact(fps), size, crop, rate)
    try:
        return _read(source, wanted)
    except VideoError as error:
        if not (loop and error.kind == "short" and error.decodable):
            raise
    return _read(source, replace(wanted, period=_length(source)))


def decode(source: Source) -> Iterator[tuple[Fraction, VideoFrame]]:
    """Every frame of a video with its time in seconds from the first one, in constant memory.

    Raises:
        VideoError: At the first damage; `decodable` frames came before it.
    """
    with open_video(source) as (container, stream):
        yield from _timed(container, stream, source)


def _timed(container: InputContainer, stream: VideoStream, source: Source) -> Iterator[tuple[Fraction, VideoFrame]]:
    rate = rate_of(stream, source)
    by_count = container.format.name in COUNTED_FORMATS
    first: int | None = None
    last = Fraction(-1)
    for place, frame in _decode(container, stream, source):
        time = place / rate
        if not by_count and frame.pts is not None and stream.time_base is not None:
            first = frame.pts if first is None else first
            time = max((frame.pts - first) * stream.time_base, last)
        last = time
        yield time, frame


def iter_frames(source: Source, size: int | None = None, crop: tuple[float, float] = CENTRE) -> Iterator[Frames]:
    """Every frame of a video in turn, uint8 (H, W, 3), in constant memory. `probe(source).fps` is their rate."""
    with open_video(source) as (container, stream):
        converter = Converter(size, crop, stream.sample_aspect_ratio)
        for _, frame in _decode(container, stream, source):
            yield converter(frame)


def timed_frames(
    source: Source, size: int | None = None, crop: tuple[float, float] = CENTRE
) -> Iterator[tuple[Fraction, Frames]]:
    """As `iter_frames`, each with its time in seconds from the first one; no time is before the one before it."""
    with open_video(source) as (container, stream):
        converter = Converter(size, crop, stream.sample_aspect_ratio)
        for time, frame in _timed(container, stream, source):
            yield time, converter(frame)


def _decode(container: InputContainer, stream: VideoStream, source: Source) -> Iterator[tuple[int, VideoFrame]]:
    """Decoded frames with their numbers, from 0; whatever FFmpeg knows of damage is an error.

    In AVI a number is left out where a frame was dropped, so that the one before it is shown again.
    """
    name = container.format.name
    counted = name in COUNTED_FORMATS
    begun = name not in CUT_IN_FORMATS
    first: int | None = None
    waiting: deque[int] = deque()  # numbers of the packets whose frames have not come yet
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
                decoded = packet.decode()
            except av.error.FFmpegError:
                if begun:
                    raise
                decoded = []
            for frame in decoded:
                if frame.is_corrupt:
                    if not begun:
                        continue
                    raise VideoError(f"{name_of(source)}: frame {frames} is damaged.", frames, "corrupt")
                begun = True
                yield (waiting.popleft() if counted and waiting else frames), frame
                frames += 1
            # Where frames are counted, one that is lost without a word would move all that follow.
            if counted and packet.size and begun and len(waiting) > stream.codec_context.reorder_depth + 1:
                raise VideoError(
                    f"{name_of(source)}: frame {frames} or one shortly before it is missing.", frames, "corrupt"
                )
    except (av.error.FFmpegError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise VideoError(
            f"{name_of(source)}: decoding stops after {frames} frames: {reason}.",
            frames,
            "corrupt",
            lasting=not isinstance(error, OSError | MemoryError),
        ) from error


def _exact(value: float | Fraction) -> Fraction:
    return Fraction(value).limit_denominator(10**7)


@dataclass(frozen=True)
class _Wanted:
    """The arguments of `read_clip`; `period` is the length in seconds of a video that is shown again and again."""

    start: Fraction
    num_frames: int
    fps: Fraction | None
    size: int | None
    crop: tuple[float, float]
    rate: Fraction | None = None
    period: Fraction | None = None

    def times(self, rate: Fraction) -> list[Fraction]:
        """Ascending but for a period, for a video of this rate."""
        step = 1 / (self.fps or rate)
        times = [self.start + k * step for k in range(self.num_frames)]
        return times if self.period is None else [time % self.period for time in times]


def _read(source: Source, wanted: _Wanted) -> Frames:
    try:
        clip = _attempt(source, wanted, seek=wanted.fps is not None, count=wanted.fps is None)
        if clip is None:  # what was found after a seek was not all of it
            clip = _attempt(source, wanted, seek=False)
    except _DisorderedError:
        clip = _attempt(source, wanted, seek=False, count=True)
    assert clip is not None
    return clip


def _attempt(source: Source, wanted: _Wanted, seek: bool, count: bool = False) -> Frames | None:
    """What `read_clip` gives; None if the file was read from its middle and they were not all there."""
    with open_video(source) as (container, stream):
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

        def placed() -> Iterator[tuple[int, VideoFrame]]:
            """Frames with their places in units of `unit` from the first frame of the file."""
            nonlocal decoded
            first = stream.start_time if sought else None
            last: int | None = None
            for place, frame in _decode(container, stream, source):
                decoded = place + 1
                if counted:
                    yield place, frame
                    continue
                if frame.pts is None or (last is not None and frame.pts <= last):
                    raise _DisorderedError
                last = frame.pts
                first = last if first is None else first
                yield last - first, frame

        converter = Converter(wanted.size, wanted.crop, stream.sample_aspect_ratio)
        clip: Frames | None = None
        found = 0

        def put(frame: VideoFrame, number: int) -> None:
            """A frame that is shown at so many of the times."""
            nonlocal clip, found
            planes = converter.planes(frame)
            if clip is None:
                clip = np.empty((len(times), *planes[0].shape, 3), np.uint8)
            first, *others = order[found : found + number]
            for channel, plane in enumerate(planes):
                clip[first, ..., channel] = plane
            for place in others:
                clip[place] = clip[first]
            found += number

        try:
            _collect(placed(), ascending, unit, rate, put)
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
    """Seconds from the first frame to the end of the last one that can be decoded."""
    info = survey(source)
    end = Fraction(0)
    for time, _ in decode(source):
        end = time + 1 / info.fps
    return end


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
    frames: Iterator[tuple[int, VideoFrame]],
    times: list[Fraction],
    unit: Fraction,
    rate: Fraction,
    put: Callable[[VideoFrame, int], None],
) -> None:
    """Find the frame that is shown at each of `times` (ascending): the last one whose time is not later.

    It is put once, with the number of times at which it is shown. They are not all found where the video ends before,
    and none where it begins after the first of them.
    """
    # Two timestamps that were rounded to units (1 ms in Matroska), this one and the first, may be off by one together.
    # Units that are long beside a frame are those of a grid on which it lies exactly.
    slack = Fraction(1, 10_000) / rate + (unit if unit * rate < Fraction(1, 4) else 0)
    # In whole units, since this is compared with each frame of the file: it is later where its place is greater.
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
    if shown is not None:  # the last frame stays until its own end
        timed = unit != 1 / rate and shown.duration
        put_until(place + (shown.duration if timed else 1 / rate / unit))
