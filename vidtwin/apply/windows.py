"""A video of any length as clips of a model's length, one after the other, in constant memory."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from vidtwin.video import Frames, Source, VideoError, VideoInfo, probe, survey, timed_frames


@dataclass
class Window:
    """One clip of a video.

    Attributes:
        frames: uint8 (T, H, W, 3). Behind the real ones the last is repeated.
        num_frames: How many are real: T, but in the last window of a video.
        start_frame: Number of the first one in the video.
        times: When each real frame is shown, in seconds from the video's first.
    """

    frames: Frames
    num_frames: int
    start_frame: int
    times: list[Fraction]


def windows(source: Source, length: int, size: int | None = None) -> Iterator[Window]:
    """Every frame of a video once, in clips of `length` frames.

    Args:
        source: Video file or folder of images.
        length: T.
        size: Side in pixels of the square that the middle of the picture is cropped and resized to; None: the whole
            picture. A picture that changes its size within the video has that of the first frame.

    Raises:
        VideoError: The video is damaged; what can be decoded before has been given by then.
    """
    frames: list[Frames] = []
    times: list[Fraction] = []
    start = 0
    reader = timed_frames(source, size)
    failure: VideoError | None = None
    while True:
        try:
            time, frame = next(reader)
        except StopIteration:
            break
        except VideoError as error:  # what came before it is still given
            failure = error
            break
        frames.append(frame)
        times.append(time)
        if len(frames) == length:
            yield Window(np.stack(frames), length, start, times)
            start += length
            frames, times = [], []
    if frames:
        filled = frames + [frames[-1]] * (length - len(frames))
        yield Window(np.stack(filled), len(frames), start, times)
    if failure is not None:
        raise failure


def examine(source: Source) -> tuple[VideoInfo, VideoError | None]:
    """What a video holds, without decoding it, and what is wrong with it: it may end before its header says.

    Raises:
        VideoError: It can't be read at all.
    """
    try:
        return survey(source), None
    except VideoError as error:
        if error.kind != "truncated":
            raise
        return replace(probe(source), num_frames=error.decodable or 0), error


class BeforeDamage:
    """The first windows of a video, up to where it is damaged.

    One that gives no window at all raises its `VideoError`.

    Args:
        stream: Windows of a video.
        limit: How many are taken; None: all.

    Attributes:
        reason: Why they end early; None where they do not.
    """

    def __init__(self, stream: Iterator[Window], limit: int | None = None) -> None:
        self.stream, self.limit = stream, limit
        self.reason: str | None = None

    def __iter__(self) -> Iterator[Window]:
        given = 0
        short = False
        while given != self.limit or short:  # behind a window that is not full comes the reason why
            try:
                window = next(self.stream)
            except StopIteration:
                return
            except VideoError as error:
                if not given:
                    raise
                self.reason = str(error)
                return
            given += 1
            short = window.num_frames < len(window.frames)
            yield window
