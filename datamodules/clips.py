"""Choose the frames of clips for training and evaluation.

Everything random depends on (seed, epoch, index) alone: the sampler yields (epoch, index) pairs, so workers need no
state, and neither their number nor that of the ranks changes a clip. The progress of training is therefore a place in
one endless order of clips, (epoch, clips of it), which a checkpoint holds.

A video that can't be used is reported once, with its reason, and never replaced under its name. Faults found by
`survey` (a file that does not open, is truncated, or too short) are left out of the epochs, so that their length and
the ranks' shares are right. Damage that only decoding finds is skipped when it is met: training takes another clip
instead, also drawn by (seed, epoch, index); evaluation has a clip less. A video cut into consecutive clips may end
within the last one, a little before the end that its container promises: that clip is padded or left out, without an
error. A whole video as one clip has the frames that decode.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from vidtwin.data import ClipSettings, Skip
from vidtwin.video import Frames, Source, VideoError, VideoInfo, read_clip, survey
from vidtwin.video.reading import CENTRE
from vidtwin.video.source import HEADER_EXCESS

from .content import digest_all
from .index import Fault
from .sampler import shuffled

Key = int | tuple[int, int]
Crop = tuple[float, float]

_NEAR = Fraction(1002, 1000)  # a rate may exceed that of the video by so little: 30 of NTSC's 29.97
_ATTEMPTS = 100  # clips that are drawn one after the other before training gives up


@dataclass(frozen=True)
class Video:
    """One video of a data set: its file, its name in results, its class (-1: none), its properties if surveyed."""

    path: Path
    name: str
    label: int = -1
    info: VideoInfo | None = None


class EndedError(VideoError):
    """An intact video that ends before a clip that its container promised."""


class ClipDataset(Dataset[dict[str, Any]], ABC):
    """Dataset of one clip per index, in training another one in each epoch.

    `dataset[epoch, index]` (or `dataset[index]`, epoch 0) is a `vidtwin.data.Clip`.

    Attributes:
        split_name: Name of the split in the protocol, if the clips themselves have one.
    """

    split_name: str | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def clip(self, epoch: int, index: int) -> dict[str, Any]:
        """Return a clip, as numpy array, with its label, name and start frame; `VideoError` if none can be read.

        "padded" may be missing for 0.
        """

    @abstractmethod
    def identity(self, index: int) -> tuple[str, int]:
        """Return name and start frame of an evaluation clip, without decoding it."""

    def shape(self, index: int) -> tuple[int, int, int]:
        """Return frames, height and width of an evaluation clip; its video may end a few frames before."""
        frames, height, width, _ = self.clip(0, index)["clip"].shape
        return frames, height, width

    def digests(self, show: bool = False) -> dict[str, str]:
        """Return the SHA-256 of the content of each video, by name; none for clips that are not of files.

        Args:
            show: Show a progress bar if it takes a while.
        """
        return {}

    def skip(self, index: int, error: VideoError) -> Skip:
        """Return the entry of "skipped" for an evaluation clip that can't be read."""
        return self.identity(index)[0], str(error)

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return all indices in the order in which an epoch of training takes them, all ranks together."""
        return shuffled(len(self), seed, epoch)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        return _with_tensor(self.clip(*_split(key)))

    def __getitems__(self, keys: Sequence[Key]) -> list[dict[str, Any]]:
        """Return the items of a batch, as a `DataLoader` asks for them."""
        return [self[key] for key in keys]


class VideoClips(ClipDataset):
    """Clips of video files.

    Training takes a random start, a random crop, one of the rates and, with `horizontal_flip`, the mirror image of
    every second clip; with `augment: windows` a random start alone, among the multiples of T. Evaluation takes the clip
    in the middle of the video, all consecutive clips, or the whole video, cropped at the centre, at the first rate.

    Clip k of "all" has the frames that are shown from k·T / fps on: joined, the clips are the video at that rate from
    its first frame on. `start_frame` is the frame of the file that is shown first, so no two clips share one.

    Args:
        videos: The videos; those without `info` are surveyed on first use.
        settings: Choice of the clips.
        split: Only "train" draws clips, and replaces those that can't be read.

    Raises:
        VideoError: From `clip`, for a file that can't be read, is too short for a clip, or (in evaluation, unless it
            takes every n-th frame) has fewer frames per second than the clip; in training, after a hundred of them in
            turn.
    """

    def __init__(self, videos: list[Video], settings: ClipSettings, split: str = "test") -> None:
        self.videos = videos
        self.num_frames, self.size, self.seed = settings.num_frames, settings.size, settings.seed
        self.rates = settings.rates
        self.training = settings.draws(split)
        self.windows = self.training and settings.augment == "windows"
        self.horizontal_flip = settings.horizontal_flip and self.training and not self.windows
        self.loop = settings.short_videos == "loop"
        self.replace = split == "train"
        self.consecutive = settings.takes_all(split)
        self.entire = settings.takes_whole(split)
        self.pad = settings.pads(split)
        self.first = settings.takes_first(split)
        self.whole = settings.steps_whole(split)
        self.resize = settings.resize
        self._ends: NDArray[np.int64] | None = None
        self._sizes: dict[int, tuple[int, int]] = {}  # of pictures at their own size, by the videos' places

    def __len__(self) -> int:
        return int(self._clip_ends()[-1]) if self.consecutive and self.videos else len(self.videos)

    def identity(self, index: int) -> tuple[str, int]:
        place, number = self._place(index)
        info = self._info(place)
        fps = self._usable_rates(info)[0]
        if self.entire:
            return self.videos[place].name, 0
        start = self._start(info, fps, number)[0] if self.consecutive else self._fixed_start(info, fps)
        return self.videos[place].name, start

    def shape(self, index: int) -> tuple[int, int, int]:
        place = self._place(index)[0]
        info = self._info(place)
        size = self.size or self._sizes.get(place)
        if size is None:
            try:  # turned pictures and pixels that are not square show in a frame alone
                height, width, _ = self._read(info, Fraction(0), 1, self._usable_rates(info)[0])[0].shape
            except VideoError:  # reported when its clip is read
                height, width = info.height, info.width
            size = self._sizes[place] = (height, width)
        return (self._length(info, self._usable_rates(info)[0]), *size)

    def digests(self, show: bool = False) -> dict[str, str]:
        digests = digest_all([video.path for video in self.videos], show)
        return {video.name: digest for video, digest in zip(self.videos, digests, strict=True)}

    def leave_out(self, names: Collection[str]) -> None:
        """Remove these videos."""
        self.videos = [video for video in self.videos if video.name not in names]
        self._ends, self._sizes = None, {}

    def __getitem__(self, key: Key) -> dict[str, Any]:
        try:
            return super().__getitem__(key)
        except VideoError as error:
            if self.replace or not error.lasting:  # a disk that fails for a moment must not leave a gap in results
                raise
            return {"skipped": [self.skip(_split(key)[1], error)]}

    def __getitems__(self, keys: Sequence[Key]) -> list[dict[str, Any]]:
        """Return the items of a batch.

        Consecutive clips of a video are read at once: if a file has to be decoded from its beginning, doing so for each
        clip would take time that grows as the square of the video's length.
        """
        if not self.consecutive:
            return super().__getitems__(keys)
        runs: list[list[int]] = []
        for _, index in map(_split, keys):
            if runs and index == runs[-1][-1] + 1 and self._place(index)[1] > 0:
                runs[-1].append(index)
            else:
                runs.append([index])
        items: list[dict[str, Any]] = []
        for run in runs:
            items += (self._together(run) if len(run) > 1 else None) or [self[index] for index in run]
        return items

    def _together(self, run: list[int]) -> list[dict[str, Any]] | None:
        """Return the items of consecutive clips of a video; None unless all can be read."""
        place, number = self._place(run[0])
        info = self._info(place)
        fps = self._usable_rates(info)[0]
        length, each = len(run) * self._length(info, fps), self._length(info, fps)
        promised = self._num_shown(info, fps) - number * each
        try:
            self._check_rate(info, fps)
            frames = self._read(info, self._start(info, fps, number)[1], min(length, promised), fps)
        except VideoError:
            return None
        padded = max(0, length - promised)
        clips = np.split(_pad(frames, padded), len(run))
        return [
            _with_tensor(self._item(place, self.identity(index)[1], clip, padded if index == run[-1] else 0))
            for index, clip in zip(run, clips, strict=True)
        ]

    def _item(self, place: int, start: int, frames: Frames, padded: int) -> dict[str, Any]:
        video = self.videos[place]
        item = {"clip": frames, "label": video.label, "name": video.name, "start_frame": start}
        return {**item, "padded": padded} if padded else item

    def clip(self, epoch: int, index: int) -> dict[str, Any]:
        if not self.replace:
            return self._draw(index, np.random.default_rng((self.seed, epoch, index)))
        skipped: list[Skip] = []
        for attempt in range(_ATTEMPTS):
            # The first attempt draws as if there were no others.
            random = np.random.default_rng((self.seed, epoch, index, attempt) if attempt else (self.seed, epoch, index))
            chosen = int(random.integers(len(self.videos))) if attempt else index
            try:
                item = self._draw(chosen, random)
            except VideoError as error:
                skipped.append(self.skip(chosen, error))
                continue
            return {**item, "skipped": skipped} if skipped else item
        name, reason = skipped[0][:2]
        raise VideoError(f"{name}: {reason}; {_ATTEMPTS - 1} clips drawn in its place could not be read either.")

    def skip(self, index: int, error: VideoError) -> Skip:
        video = self.videos[self._place(index)[0]]
        reason = Fault.of(error, video.info.path if video.info else video.path).reason
        return (video.name, reason, False) if isinstance(error, EndedError) else (video.name, reason)

    def fault(self, place: int) -> Fault | None:
        """Return the reason why no clip of this video can be taken, if one is known without decoding; or None."""
        info = self._info(place)
        fps = self._usable_rates(info)[0]
        try:
            (self._check_rate if self.pad or self.entire else self._last_start)(info, fps)
        except VideoError as error:
            return Fault.of(error, info.path)
        return None

    def _info(self, place: int) -> VideoInfo:
        video = self.videos[place]
        if video.info is None:
            video = self.videos[place] = replace(video, info=survey(video.path))
        assert video.info is not None
        return video.info

    def _place(self, index: int) -> tuple[int, int]:
        """Return the place of a clip's video, and the clip's number in it."""
        if not self.consecutive:
            return index, 0
        if not 0 <= index < len(self):
            raise IndexError(f"Expected an index below {len(self)}, got {index}.")
        ends = self._clip_ends()
        place = int(np.searchsorted(ends, index, side="right"))
        return place, index - (int(ends[place - 1]) if place else 0)

    def _clip_ends(self) -> NDArray[np.int64]:
        """Return the cumulative numbers of clips of the videos."""
        if self._ends is None:
            counts = [self._num_clips(self._info(place)) for place in range(len(self.videos))]
            self._ends = np.cumsum(counts, dtype=np.int64)
        return self._ends

    def _num_clips(self, info: VideoInfo) -> int:
        """Count the consecutive clips of a video."""
        fps = self._usable_rates(info)[0]
        shown, length = self._num_shown(info, fps), self._length(info, fps)
        if self.pad:
            return math.ceil(shown / length)
        return max(shown // length, int(self.loop))

    def _length(self, info: VideoInfo, fps: float | None) -> int:
        """Return the frames of a clip."""
        return self._num_shown(info, fps) if self.num_frames is None else self.num_frames

    def _num_shown(self, info: VideoInfo, fps: float | None) -> int:
        """Count the frames of a whole video at the clip's rate: the last one is shown until its end."""
        return math.ceil(info.num_frames * self._rate(info, fps) / info.fps)

    def _start(self, info: VideoInfo, fps: float | None, number: int) -> tuple[int, Fraction]:
        """Return the first frame of the `number`-th consecutive clip, and its time in seconds."""
        time = number * self._length(info, fps) / self._rate(info, fps)
        return math.floor(time * info.fps), time

    def _draw(self, index: int, random: np.random.Generator) -> dict[str, Any]:
        position, x, y, mirror, rate = random.random(5) if self.training else (0.5, 0.5, 0.5, 1.0, 0.0)
        if self.windows:
            x, y = CENTRE
        place, number = self._place(index)
        info = self._info(place)
        rates = self._usable_rates(info)
        fps = rates[int(rate * len(rates))]
        padded = 0
        if self.consecutive or self.entire:
            start, frames, padded = self._read_consecutive(info, fps, number)
        else:
            try:
                start, frames = self._read_at(info, fps, position, (x, y))
            except VideoError as error:
                missing = _count_missing(info, error)
                if missing is None or not 0 < missing <= HEADER_EXCESS:
                    raise
                # The container promised a little too much: choose again from the frames that were decoded.
                info = replace(info, num_frames=info.num_frames - missing)
                start, frames = self._read_at(info, fps, position, (x, y))
        if self.horizontal_flip and mirror < 0.5:
            frames = frames[:, :, ::-1]
        return self._item(place, start, frames, padded)

    def _read_at(self, info: VideoInfo, fps: float | None, position: float, crop: Crop) -> tuple[int, Frames]:
        """Read the clip at a position from 0 to 1 → first frame, pictures."""
        if self.training:
            step = self._length(info, fps) if self.windows else 1
            last = self._last_start(info, fps) // step
            start = step * min(int(position * (last + 1)), last)
        else:
            start = self._fixed_start(info, fps)
        return start, self._read(info, start / info.fps, self._length(info, fps), fps, crop, self.loop)

    def _read_consecutive(self, info: VideoInfo, fps: float | None, number: int) -> tuple[int, Frames, int]:
        """Read a clip of those that a video is cut into → first frame, pictures, number of padded ones."""
        self._check_rate(info, fps)
        start, time = self._start(info, fps, number)
        wanted = promised = least = self._length(info, fps)
        if self.pad or self.entire:
            promised = min(wanted, self._num_shown(info, fps) - number * wanted)
            # Frames that the container promised in excess are padded too, or left out of a whole video.
            least = max(1, promised - HEADER_EXCESS - 1)
        loop = self.loop and not (self.pad or self.entire) and number == 0
        for length in range(promised, least - 1, -1):
            try:
                frames = self._read(info, time, length, fps, loop=loop)
            except VideoError as error:
                missing = _count_missing(info, error)
                if missing is None or missing > HEADER_EXCESS:
                    raise
                ended = error
                continue
            padded = 0 if self.entire else wanted - length
            return start, _pad(frames, padded), padded
        raise EndedError(str(ended), ended.decodable, ended.kind) from None

    def _read(
        self, info: VideoInfo, time: Fraction, length: int, fps: float | None, crop: Crop = CENTRE, loop: bool = False
    ) -> Frames:
        source, rate = self.content(info), None if fps is None else self._rate(info, fps)
        try:
            return read_clip(source, time, length, rate, self.size, crop, loop, info.fps, self.resize, self.whole)
        except VideoError as error:
            if isinstance(source, bytes):  # whose name the error lacks
                reason = str(error).partition(": ")[2]
                raise VideoError(f"{info.path}: {reason}", error.decodable, error.kind, error.lasting) from None
            raise

    def content(self, info: VideoInfo) -> Source:
        """Return the source that a video is read from."""
        return info.path

    def _usable_rates(self, info: VideoInfo) -> list[float | None]:
        """Return the rates to draw from for a video: those that it supports; in evaluation the first."""
        if not self.training or len(self.rates) == 1:
            return self.rates[:1]
        given = [rate for rate in self.rates if rate is not None and rate <= info.fps * _NEAR]
        if not given:
            return [min(rate or 0 for rate in self.rates)]  # frames repeat
        return [rate for rate in given if self._span(info, rate) < info.num_frames] or [max(given)]

    def _rate(self, info: VideoInfo, fps: float | None) -> Fraction:
        """Return a clip's frames per second; in evaluation at most the video's, as 30 of 29.97 would repeat some."""
        if fps is None:
            return info.fps
        if self.whole:
            return info.fps / max(1, round(info.fps / Fraction(fps).limit_denominator(10**7)))
        rate = Fraction(fps).limit_denominator(10**7)
        return rate if self.training else min(rate, info.fps)

    def _span(self, info: VideoInfo, fps: float | None) -> int:
        """Return the frames of the video from the first to the last of a clip."""
        return int((self._length(info, fps) - 1) * info.fps / self._rate(info, fps))

    def _check_rate(self, info: VideoInfo, fps: float | None) -> None:
        if fps is not None and not (self.training or self.whole) and fps > info.fps * _NEAR:
            raise VideoError(
                f"{info.path}: expected at least data.fps={fps:g} frames per second, got "
                f"{float(info.fps):.4g}; lower data.fps (null: every frame) or set data.frame_steps: whole.",
                kind="slow",
            )

    def _fixed_start(self, info: VideoInfo, fps: float | None) -> int:
        """Return the first frame of a video's only clip, which no epoch changes."""
        last = self._last_start(info, fps)
        return 0 if self.first else last // 2

    def _last_start(self, info: VideoInfo, fps: float | None) -> int:
        """Return the last frame of the video at which a clip can begin; `VideoError` if there is none."""
        self._check_rate(info, fps)
        span = self._span(info, fps)
        if info.num_frames <= span and not self.loop:
            rate = "all frames" if fps is None else f"{fps:g} frames per second"
            raise VideoError(
                f"{info.path}: too short: a clip of {self._length(info, fps)} at {rate} spans {span + 1}, "
                f"it has {info.num_frames}.",
                kind="short",
            )
        return max(0, info.num_frames - 1 - span)


def _split(key: Key) -> tuple[int, int]:
    return key if isinstance(key, tuple) else (0, key)


def _with_tensor(item: dict[str, Any]) -> dict[str, Any]:
    return {"padded": 0, **item, "clip": torch.from_numpy(np.ascontiguousarray(item["clip"]))}


def _count_missing(info: VideoInfo, error: VideoError) -> int | None:
    """Return the number of promised frames that do not decode; None if it is unknown or the system failed."""
    return info.num_frames - error.decodable if error.decodable is not None and error.lasting else None


def _pad(frames: Frames, padded: int) -> Frames:
    """Append copies of the last of (T, H, W, 3) frames."""
    return np.concatenate([frames, np.repeat(frames[-1:], padded, axis=0)]) if padded else frames
