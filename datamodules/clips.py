"""Clips of videos for training and evaluation: which frames, in which order, on which rank.

All that is random depends on (seed, epoch, index) alone: the sampler hands out (epoch, index) pairs, so workers (also
persistent ones) need no state, and their number and that of the ranks changes no clip. What training has seen is
therefore a place in one endless order of clips, (epoch, clips of it), which a checkpoint holds.

A video that can't be used is named once, with its reason, and never replaced under its name. What `survey` finds (a
file that does not open, is truncated, too short) is left out before an epoch is made, so that its length and the ranks'
shares are right. What only decoding finds is skipped when it is met: training takes another clip instead, drawn by
(seed, epoch, index) too; evaluation has a clip less.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from vidtwin.video import Source, VideoError, VideoInfo, read_clip, survey
from vidtwin.video.source import HEADER_EXCESS

from .index import Fault
from .sampler import shuffled

Key = int | tuple[int, int]
Rates = float | Sequence[float] | None
SPLITS = ("train", "val", "test")

_ATTEMPTS = 100  # clips that are drawn one after the other before training gives up


@dataclass(frozen=True)
class Video:
    """One video of a data set: its file, its name in results, its class (-1: none), what is in it if that is known."""

    path: Path
    name: str
    label: int = -1
    info: VideoInfo | None = None


class ClipDataset(Dataset[dict[str, Any]], ABC):
    """One clip for each index, in training another one in each epoch.

    `dataset[epoch, index]` (or `dataset[index]`, epoch 0) is `{"clip": uint8 (T, H, W, 3), "label": int, "name": str,
    "start_frame": int}`, and if files were met that can't be read, `"skipped": [(name, reason), …]`; in evaluation that
    alone.

    Attributes:
        split_name: Name of the split in the protocol, where the clips know it themselves.
    """

    split_name: str | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def clip(self, epoch: int, index: int) -> dict[str, Any]:
        """One clip, as numpy array, with its label, name and start frame; `VideoError` if there is none to be had."""

    @abstractmethod
    def identity(self, index: int) -> tuple[str, int]:
        """Name and start frame of an evaluation clip, without decoding it."""

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """All indices in the order in which an epoch of training takes them, all ranks together."""
        return shuffled(len(self), seed, epoch)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        item = self.clip(epoch, index)
        return {**item, "clip": torch.from_numpy(np.ascontiguousarray(item["clip"]))}


class VideoClips(ClipDataset):
    """Clips of video files.

    Training takes a random start, a random square crop, one of the rates and, with `horizontal_flip`, the mirror image
    of every second clip. Evaluation takes the clip in the middle of the video, centre-cropped, at the first rate.

    Args:
        videos: The videos; those without `info` are surveyed when they are first needed.
        num_frames: T.
        resolution: Side of the square picture in pixels.
        fps: Frames per second of the clip, or several of them; None takes every frame of the video.
        seed: Of all that is drawn.
        training: Draw another clip in each epoch.
        horizontal_flip: Mirror half of the clips that are drawn.
        loop: Begin a video again that ends before the clip does.
        replace: Take another clip for one that can't be read.

    Raises:
        VideoError: From `clip`, for a file that can't be read, is too short for a clip, or (in evaluation) has fewer
            frames per second than the clip; with `replace`, for a hundred of them.
    """

    def __init__(
        self,
        videos: list[Video],
        num_frames: int,
        resolution: int,
        fps: Rates,
        seed: int = 0,
        training: bool = False,
        horizontal_flip: bool = False,
        loop: bool = False,
        replace: bool = False,
    ) -> None:
        self.videos = videos
        self.num_frames = num_frames
        self.resolution = resolution
        self.rates = rates_of(fps)
        self.seed = seed
        self.training = training
        self.horizontal_flip = horizontal_flip
        self.loop = loop
        self.replace = replace

    def __len__(self) -> int:
        return len(self.videos)

    def identity(self, index: int) -> tuple[str, int]:
        info = self._info(index)
        return self.videos[index].name, self._last_start(info, self._usable_rates(info)[0]) // 2

    def __getitem__(self, key: Key) -> dict[str, Any]:
        try:
            return super().__getitem__(key)
        except VideoError as error:
            if self.replace:
                raise
            return {"skipped": [self._skipped(key[1] if isinstance(key, tuple) else key, error)]}

    def clip(self, epoch: int, index: int) -> dict[str, Any]:
        if not self.replace:
            return self._draw(index, np.random.default_rng((self.seed, epoch, index)))
        skipped: list[tuple[str, str]] = []
        for attempt in range(_ATTEMPTS):
            # The first one draws as if there were no others.
            random = np.random.default_rng((self.seed, epoch, index, attempt) if attempt else (self.seed, epoch, index))
            chosen = int(random.integers(len(self.videos))) if attempt else index
            try:
                item = self._draw(chosen, random)
            except VideoError as error:
                skipped.append(self._skipped(chosen, error))
                continue
            return {**item, "skipped": skipped} if skipped else item
        name, reason = skipped[0]
        raise VideoError(f"{name}: {reason}; {_ATTEMPTS - 1} clips drawn in its place could not be read either.")

    def _skipped(self, index: int, error: VideoError) -> tuple[str, str]:
        video = self.videos[index]
        return video.name, Fault.of(error, video.info.path if video.info else video.path).reason

    def fault(self, index: int) -> Fault | None:
        """Why no clip of this video can be taken, as far as that can be told without decoding it."""
        info = self._info(index)
        try:
            self._last_start(info, self._usable_rates(info)[0])
        except VideoError as error:
            return Fault.of(error, info.path)
        return None

    def _info(self, index: int) -> VideoInfo:
        video = self.videos[index]
        if video.info is None:
            video = self.videos[index] = replace(video, info=survey(video.path))
        assert video.info is not None
        return video.info

    def _draw(self, index: int, random: np.random.Generator) -> dict[str, Any]:
        position, x, y, mirror, rate = random.random(5) if self.training else (0.5, 0.5, 0.5, 1.0, 0.0)
        video, info = self.videos[index], self._info(index)
        rates = self._usable_rates(info)
        fps = rates[int(rate * len(rates))]
        try:
            start, frames = self._read(info, fps, position, (x, y))
        except VideoError as error:
            if error.decodable is None or not 0 < info.num_frames - error.decodable <= HEADER_EXCESS:
                raise
            # The container promised a little more than there is: choose again from what was decoded.
            info = replace(info, num_frames=error.decodable)
            start, frames = self._read(info, fps, position, (x, y))
        if self.horizontal_flip and mirror < 0.5:
            frames = frames[:, :, ::-1]
        return {"clip": frames, "label": video.label, "name": video.name, "start_frame": start}

    def _read(self, info: VideoInfo, fps: float | None, position: float, crop: tuple[float, float]) -> tuple[int, Any]:
        last = self._last_start(info, fps)
        start = min(int(position * (last + 1)), last) if self.training else last // 2
        source, time, size = self.content(info), start / info.fps, self.resolution
        try:
            return start, read_clip(source, time, self.num_frames, fps, size, crop, self.loop, info.fps)
        except VideoError as error:
            if isinstance(source, bytes):  # which don't know the name
                reason = str(error).partition(": ")[2]
                raise VideoError(f"{info.path}: {reason}", error.decodable, error.kind, error.lasting) from None
            raise

    def content(self, info: VideoInfo) -> Source:
        """What to read a video from."""
        return info.path

    def _usable_rates(self, info: VideoInfo) -> list[float | None]:
        """The rates to draw from for a video: those that it can give; in evaluation the first."""
        if not self.training or len(self.rates) == 1:
            return self.rates[:1]
        given = [rate for rate in self.rates if rate is not None and rate <= info.fps * 1.001]
        if not given:
            return [min(rate or 0 for rate in self.rates)]  # frames repeat
        return [rate for rate in given if self._span(info, rate) < info.num_frames] or [max(given)]

    def _span(self, info: VideoInfo, fps: float | None) -> int:
        """Frames of the video from the first to the last of a clip."""
        if fps is None:
            return self.num_frames - 1
        return int((self.num_frames - 1) * info.fps / Fraction(fps).limit_denominator(10**7))

    def _last_start(self, info: VideoInfo, fps: float | None) -> int:
        """The last frame of the video at which a clip can begin."""
        if fps is not None and not self.training and fps > info.fps * 1.001:
            raise VideoError(
                f"{info.path}: expected at least data.fps={fps:g} frames per second, the video has "
                f"{float(info.fps):.4g}; lower data.fps (null: every frame).",
                kind="slow",
            )
        span = self._span(info, fps)
        if info.num_frames <= span and not self.loop:
            rate = "all frames" if fps is None else f"{fps:g} frames per second"
            raise VideoError(
                f"{info.path}: too short: a clip of {self.num_frames} at {rate} spans {span + 1}, "
                f"it has {info.num_frames}.",
                kind="short",
            )
        return max(0, info.num_frames - 1 - span)


def rates_of(fps: Rates) -> list[float | None]:
    """One rate or several, as a list."""
    return list(fps) if isinstance(fps, Sequence) else [fps]
