"""Measure one video for `vidtwin doctor`: faults, container, motion, cuts and a fingerprint."""

import dataclasses
import hashlib
import math
import statistics
from array import array
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from vidtwin.listing import identity, images_of
from vidtwin.video import VideoError, decode, survey
from vidtwin.video.picture import UPRIGHT, FilterChain, orientation, turn
from vidtwin.video.source import COUNTED_FORMATS, is_lasting, open_video

VERSION = 2  # raise it when the same file would give other numbers, also because of the reader
FINGERPRINT_FRAMES = 8
MOTION_STEP = Fraction(1, 8)  # seconds between the two pictures whose difference is motion
CUT_RISE = 9.0  # percent of the range of values; chosen on real clips, docs/doctor.md says which

_THUMBNAIL = 32  # side in pixels
_UNEVEN = 0.25  # share of the mean by which the time between frames of a variable rate differs


@dataclass
class Measurement:
    """Measurements of one video; None for those that a fault of the file prevented.

    Attributes:
        name: Relative to the scanned folder.
        mtime_ns: With name and size it shows whether the file has changed since.
        fault: "unreadable", "truncated", "corrupt", "crash" (it ended its process) or "timeout"; None if intact.
        reason: One line on the fault.
        lasting: Whether the next attempt would find the same fault; False if the system failed and not the file.
        width: Of the stored picture; the shown picture is upright and has square pixels.
        rotation: Degrees that the stored picture is turned counterclockwise to be shown.
        aspect: Width of a stored pixel divided by its height, as "10:11".
        matrix: Colour matrix, as FFmpeg numbers them (2: untagged, 1: BT.709, 5 and 6: BT.601).
        colour_range: 0: untagged, 1: limited, 2: full.
        header_frames: Number of frames according to the header; 0 if it has none.
        frames: Decoded frames, up to the first error.
        variable_rate: Whether times between frames differ.
        keyframes: Number of keyframes; with a single one, a seek saves nothing.
        disordered: Whether timestamps are absent or not rising, so that frames have to be counted.
        luma: Mean luma in 0..255.
        motion: Mean absolute difference of luma thumbnails (32x32, in 0..255) that are shown 1/8 s apart.
        cuts: Seconds at which a new scene begins.
        fingerprint: A difference hash (64 bits, hexadecimal) of the middle of each of eight equal parts.
    """

    name: str
    bytes: int
    mtime_ns: int
    fault: str | None = None
    reason: str | None = None
    lasting: bool = True
    sha256: str | None = None
    container: str | None = None
    codec: str | None = None
    pixel_format: str | None = None
    width: int | None = None
    height: int | None = None
    shown_width: int | None = None
    shown_height: int | None = None
    rotation: int | None = None
    aspect: str | None = None
    matrix: int | None = None
    colour_range: int | None = None
    header_frames: int | None = None
    frames: int | None = None
    fps: float | None = None
    variable_rate: bool | None = None
    seconds: float | None = None
    keyframes: int | None = None
    disordered: bool | None = None
    luma: float | None = None
    motion: float | None = None
    cuts: list[float] = field(default_factory=list)
    fingerprint: list[str] = field(default_factory=list)


FIELDS = frozenset(entry.name for entry in dataclasses.fields(Measurement))


def measure(path: Path, name: str) -> Measurement:
    """Survey and decode one video; no content of a file raises."""
    found = Measurement(name, 0, 0)
    try:
        found.bytes, found.mtime_ns = identity(path)
        found.sha256 = _digest(path)
        _decode(path, found)
    except VideoError as error:
        found.fault, found.frames = error.kind, error.decodable
        found.reason = str(error).removeprefix(f"{path}: ").removeprefix(f"{error.kind}: ")
        found.lasting = getattr(error, "lasting", True)
    except OSError as error:
        found.fault, found.lasting = "unreadable", is_lasting(error)
        found.reason = f"it can't be read: {error.strerror or error}"
    except MemoryError:
        found.fault, found.lasting = "unreadable", False
        found.reason = "there was not enough memory to measure it"
    except Exception as error:  # one file of thousands that meets a bug must not end the scan
        found.fault = "unreadable"
        found.reason = f"it can't be measured: {type(error).__name__}: {error}".replace(f"{path}", name)
    return found


def _decode(path: Path, found: Measurement) -> None:
    with open_video(path) as (container, stream):
        found.container, found.codec = container.format.name, stream.codec_context.name
        found.width, found.height, found.header_frames = stream.width, stream.height, stream.frames
        aspect = stream.sample_aspect_ratio or Fraction(1)
    found.aspect = f"{aspect.numerator}:{aspect.denominator}"
    info = survey(path)
    found.fps, found.seconds = float(info.fps), info.duration
    content = _Content(str(path), info.duration)
    stamps = _Stamps()
    keyframes = frames = 0
    for time, frame in decode(path):
        if not frames:
            _read_format(frame, aspect, found)
        frames += 1
        keyframes += bool(frame.key_frame)
        stamps.add(frame)
        content.add(float(time), frame)
    if not frames:
        raise VideoError(f"{path}: none of its {info.num_frames} frames decodes.", 0, "corrupt")
    content.end(1 / float(info.fps))
    found.frames, found.keyframes, found.seconds = frames, keyframes, content.seconds
    found.disordered = stamps.disordered
    found.variable_rate = found.container not in COUNTED_FORMATS and stamps.is_uneven()
    found.luma, found.motion = content.luma, content.motion
    found.cuts, found.fingerprint = content.cuts(), content.fingerprint


def _read_format(frame: VideoFrame, aspect: Fraction, found: Measurement) -> None:
    found.pixel_format = frame.format.name
    found.matrix, found.colour_range = int(frame.colorspace), int(frame.color_range)
    found.rotation = frame.rotation
    shown = max(1, round(frame.width * aspect)), frame.height
    found.shown_width, found.shown_height = shown[::-1] if (orientation(frame) or UPRIGHT)[0] else shown


class _Stamps:
    """Timestamps in the order in which frames are shown."""

    def __init__(self) -> None:
        self.disordered = False
        self._last: int | None = None
        self._steps = array("d")

    def add(self, frame: VideoFrame) -> None:
        if frame.pts is None or (self._last is not None and frame.pts <= self._last):
            self.disordered = True
        elif self._last is not None:
            self._steps.append(frame.pts - self._last)
        self._last = frame.pts if frame.pts is not None else self._last

    def is_uneven(self) -> bool:
        """Return whether the times between frames vary by more than one tick (1 ms in Matroska)."""
        if self.disordered or not self._steps:
            return False
        mean = statistics.fmean(self._steps)
        return max(abs(step - mean) for step in self._steps) > max(_UNEVEN * mean, 1)


class _Content:
    """Motion, luma, cuts and fingerprint, collected frame by frame in little memory."""

    def __init__(self, name: str, duration: float) -> None:
        self._duration = duration
        self._times = array("d")
        self._differences = array("d")  # from the frame before, percent of the range of values
        self._scenes = FilterChain(name, ("scdet", None))
        self._thumbnail = _Luma(name, _THUMBNAIL, _THUMBNAIL)
        self._small = _Luma(name, 9, 8)
        self._shown: tuple[float, VideoFrame] | None = None
        self._seen: NDArray[np.float32] | None = None  # the thumbnail 1/8 s ago
        self._steps = 0
        self._lumas = array("d")
        self._motion = 0.0  # sum over the steps
        self.fingerprint: list[str] = []
        self.seconds = 0.0

    def add(self, time: float, frame: VideoFrame) -> None:
        scored = self._scenes(frame)
        self._times.append(time)
        self._differences.append(float(scored.metadata.get("lavfi.scd.mafd", 0)))
        self._show_until(time)
        self._shown = time, frame

    def end(self, length: float) -> None:
        """Finish after the last frame, which is shown for `length` seconds."""
        assert self._shown is not None
        self.seconds = self._shown[0] + length
        self._show_until(self.seconds)
        while len(self.fingerprint) < FINGERPRINT_FRAMES:  # the video is shorter than its container says
            self.fingerprint.append(_difference_hash(self._small(self._shown[1])))

    def _show_until(self, time: float) -> None:
        """Account for the last frame, which is shown until `time`."""
        if self._shown is None:
            return
        frame = self._shown[1]
        steps = math.ceil(time / MOTION_STEP)  # bad timestamps make it large: no loop over it
        if steps > self._steps:
            thumbnail = self._thumbnail(frame).astype(np.float32)
            self._lumas.append(float(thumbnail.mean()))
            if self._seen is not None:
                self._motion += float(np.abs(thumbnail - self._seen).mean())
            self._seen, self._steps = thumbnail, steps
        while len(self.fingerprint) < FINGERPRINT_FRAMES and self._next_middle() < time:
            self.fingerprint.append(_difference_hash(self._small(frame)))

    def _next_middle(self) -> float:
        return (len(self.fingerprint) + 0.5) / FINGERPRINT_FRAMES * self._duration

    @property
    def luma(self) -> float:
        return statistics.fmean(self._lumas)

    @property
    def motion(self) -> float | None:
        """None if the video lasts less than 1/8 s. A frame that is shown for long adds steps without motion."""
        steps = self._steps - 1
        return self._motion / steps if steps > 0 else None

    def cuts(self) -> list[float]:
        """Return the times of frames that differ from the one before by far more than their neighbours do.

        FFmpeg's own score compares with the frame before alone: if a converted rate repeats frames, each movement
        after a repeated frame would be a cut. So one repeated frame is ignored on both sides.
        """
        changes = self._differences
        return [
            round(self._times[index], 3)
            for index in range(1, len(changes))
            if changes[index] - max(_change_beside(changes, index, step) for step in (-1, 1)) >= CUT_RISE
        ]


def _change_beside(changes: "array[float]", index: int, direction: int) -> float:
    """Return the change beside `index`, or the one behind it if a repeated frame lies between."""
    beside = [changes[i] for i in (index + direction, index + 2 * direction) if 0 < i < len(changes)]
    if not beside:
        return 0.0
    return max(beside) if beside[0] < 0.3 else beside[0]


def _difference_hash(luma: NDArray[np.uint8]) -> str:
    """Hash (8, 9) pixels: whether each is darker than its right neighbour, 64 bits for any size and quality."""
    return np.packbits(luma[:, 1:] > luma[:, :-1]).tobytes().hex()


class _Luma:
    """Convert frames to luma, uint8 (height, width), upright, 0 black and 255 white for any tagged range."""

    def __init__(self, name: str, width: int, height: int) -> None:
        self._upright, self._turned = (
            FilterChain(name, ("scale", f"{shape}:flags=area:out_range=full"), ("format", "gray"))
            for shape in (f"{width}:{height}", f"{height}:{width}")
        )

    def __call__(self, frame: VideoFrame) -> NDArray[np.uint8]:
        how = orientation(frame) or UPRIGHT
        return turn(np.asarray((self._turned if how[0] else self._upright)(frame).to_ndarray(), np.uint8), how)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for file in images_of(path) if path.is_dir() else [path]:
        with file.open("rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
