"""Cut videos of any length into clips of a model's length, one after the other, in constant memory."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from typing import TypeVar

import numpy as np

from vidtwin.apply.inputs import Input
from vidtwin.video import Frames, Source, VideoError, VideoInfo, probe, survey, timed_frames

T = TypeVar("T")


@dataclass
class Window:
    """One clip of a video.

    Attributes:
        frames: uint8 (T, H, W, 3); the last frame of the video is repeated up to T frames.
        num_frames: Number of frames before the repeated ones; T except in the last window of a video.
        start_frame: Index of the first frame in the video.
        times: Times of the `num_frames` frames, in seconds from the video's first.
    """

    frames: Frames
    num_frames: int
    start_frame: int
    times: list[Fraction]


def windows(source: Source, length: int, size: int | None = None) -> Iterator[Window]:
    """Cut a video into clips of `length` frames that cover every frame once.

    Args:
        source: Video file or folder of images.
        length: T.
        size: Side in pixels of the square to which the centre of the picture is cropped and resized; None takes the
            whole picture. If the picture's size changes within the video, that of the first frame is kept.

    Raises:
        VideoError: The video is damaged; the frames before the damage have been yielded by then.
    """
    frames: list[Frames] = []
    times: list[Fraction] = []
    start = 0
    failure: VideoError | None = None
    try:
        for time, frame in timed_frames(source, size):
            frames.append(frame)
            times.append(time)
            if len(frames) == length:
                yield Window(np.stack(frames), length, start, times)
                start += length
                frames, times = [], []
    except VideoError as error:
        failure = error  # raised below, after the frames that were decoded before it
    if frames:
        filled = frames + [frames[-1]] * (length - len(frames))
        yield Window(np.stack(filled), len(frames), start, times)
    if failure is not None:
        raise failure


def examine(source: Source) -> tuple[VideoInfo, VideoError | None]:
    """Probe a video without decoding it → its properties, and its damage if it ends before its header says.

    Raises:
        VideoError: It can't be read at all, or the system failed.
    """
    try:
        return survey(source), None
    except VideoError as error:
        if error.kind not in ("truncated", "corrupt") or not error.lasting:
            raise
        return replace(probe(source), num_frames=error.decodable or 0), error


def count_frames(inputs: Iterable[Input], limit: int | None = None) -> int:
    """Count the frames that headers promise, at most `limit` of each video; 0 of one that can't be read."""
    total = 0
    for entry in inputs:
        with suppress(VideoError):  # reported when its turn comes
            count = probe(entry.path).num_frames
            total += count if limit is None else min(count, limit)
    return total


class VideoWindows:
    """Yield the windows of a video up to its damage, if there is any.

    Args:
        source: Video file or folder of images.
        length: As of `windows`.
        size: Likewise.
        limit: Maximum number of windows; None yields all.

    Attributes:
        info: Properties of the video, from its header.
        damage: Why the video ends early, by its header or its frames; None if it does not.

    Raises:
        VideoError: The video can't be read at all, no window of it can be decoded, or the system failed.
    """

    def __init__(self, source: Source, length: int, size: int | None = None, limit: int | None = None) -> None:
        self.info, error = examine(source)
        self.damage = str(error) if error else None
        self._windows, self._limit = windows(source, length, size), limit

    def __iter__(self) -> Iterator[Window]:
        count = 0
        try:
            for count, window in enumerate(self._windows, 1):
                yield window
                # After a window that is not full comes the error, if there is one.
                if count == self._limit and window.num_frames == len(window.frames):
                    return
        except VideoError as error:
            if not count or not error.lasting:  # a disk that fails for a moment must not leave a part for the whole
                raise
            self.damage = str(error)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Split items into lists of `size`; the last one may be shorter. (From Python 3.12 on in itertools.)"""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
