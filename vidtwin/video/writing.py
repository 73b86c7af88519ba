"""Encode video."""

import io
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import numpy as np
from av.video.frame import VideoFrame

from vidtwin.files import replacing

from .picture import Frames
from .sound import Sound, SoundError
from .source import MAX_RATE, MIN_RATE, Source, VideoError

# Visually lossless, so that visible differences in a reconstruction come from the model.
_QUALITY = {
    # No mbtree: with several threads it makes the bytes of small pictures differ from run to run.
    "libx264": {"crf": "12", "preset": "medium", "mbtree": "0"},
    "mpeg4": {"flags": "+qscale", "global_quality": str(2 * 118)},  # in units of lambda, 118 per quantizer step
}


class VideoWriter:
    """Writer of a video, frame by frame, nearly lossless, as yuv420p that browsers play.

    An odd side grows by one repeated pixel. The file appears under its name only when the `with` block ends without an
    error; its folder is created.

    Args:
        path: File to write; the suffix names the container.
        fps: Frames per second, for frames without a time.
        codec: FFmpeg's name of the encoder; "libx264" and "mpeg4" get a quality preset.
        timed: Frames are written with their times, which are kept to a thousandth of a frame.
        sound: Video whose sound is added, copied if the container supports its codec and encoded as AAC if not. It is
            shifted so that the first frame of that video is at time 0 here.
        options: Options of the encoder, which override the preset.

    Attributes:
        lost_sound: Why the sound or its end is missing, in one line; None if it is not.
    """

    def __init__(
        self,
        path: Path | str,
        fps: float | Fraction,
        codec: str = "libx264",
        timed: bool = False,
        sound: Source | None = None,
        options: dict[str, str] | None = None,
    ) -> None:
        self.path = Path(path)
        if not MIN_RATE <= fps <= MAX_RATE:
            raise VideoError(f"{self.path}: expected frames per second above 0 and up to {MAX_RATE:,}, got {fps}.")
        # FFmpeg counts in 31 bits.
        self.rate = Fraction(fps).limit_denominator(min(10**7, (2**31 - 1) // math.ceil(fps)))
        self.codec = codec
        self.options = _QUALITY.get(codec, {}) | (options or {})
        self.timed = timed
        self.lost_sound: str | None = None
        self._source = sound
        self._sound: Sound | None = None
        self._stream: Any = None
        self._shape: tuple[int, ...] = ()
        self._place = -1
        # A thousandth of a frame, so that constant rates are exact.
        self._ticks = min(1000, (2**31 - 1) // self.rate.numerator) if timed else 1
        self._tick = 1 / (self.rate * self._ticks)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._partial = stack.enter_context(replacing(self.path))
            with self._explain_errors():
                self._container = stack.enter_context(av.open(os.fspath(self._partial), "w"))
            self._closing = stack.pop_all()
        return self

    def write(self, picture: Frames, time: Fraction | None = None) -> None:
        """Add a frame, uint8 (H, W, 3); with `timed` it is shown from `time` on, in seconds."""
        if self.timed != (time is not None):
            raise VideoError(f"{self.path}: expected frames {'with' if self.timed else 'without'} times.")
        if self._stream is None:
            self._open(picture)
        if picture.shape != self._shape or picture.dtype != np.uint8:
            raise VideoError(
                f"{self.path}: expected frames of uint8 {self._shape}, got {picture.dtype} {picture.shape}."
            )
        padded = np.pad(picture, ((0, self._shape[0] % 2), (0, self._shape[1] % 2), (0, 0)), mode="edge")
        frame = VideoFrame.from_ndarray(padded, format="rgb24")
        place = self._place + 1 if time is None else max(round(time / self._tick), self._place + 1)
        frame.pts, frame.time_base, frame.duration = place, self._tick, self._ticks
        self._place = place
        with self._explain_errors():
            self._add_sound(place * self._tick)
            self._container.mux(self._stream.encode(frame))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                if self._stream is None:
                    raise VideoError(f"{self.path}: expected at least one frame to write, got none.")
                with self._explain_errors():
                    self._container.mux(self._stream.encode(None))
                    self._add_sound(None)
        except BaseException as failed:
            self._closing.__exit__(type(failed), failed, failed.__traceback__)
            raise
        finally:
            if self._sound is not None:
                self._sound.close()
        with self._explain_errors():
            self._closing.__exit__(kind, error, traceback)

    def _open(self, picture: Frames) -> None:
        self._shape = picture.shape
        with self._explain_errors():
            if self._source is not None:
                try:
                    self._sound = Sound.of(self._source, self._container)
                except (VideoError, av.error.FFmpegError, ValueError) as error:  # PyAV's for codecs that do not fit
                    self.lost_sound = f"its sound can't be carried over: {error}."
            try:
                self._add_pictures()
                # Writes the header. FFmpeg crashes if a container is used after this failed.
                self._container.start_encoding()
            except av.error.FFmpegError as error:
                if self._sound is None or isinstance(error, OSError):
                    raise
                self._lose_sound(f"its sound can't be written to {self.path.suffix}: {error.strerror}.")
                self._container.close()
                self._container = self._closing.enter_context(av.open(os.fspath(self._partial), "w"))
                self._add_pictures()
                self._container.start_encoding()

    def _add_pictures(self) -> None:
        height, width = (side + side % 2 for side in self._shape[:2])
        self._stream = self._container.add_stream(self.codec, rate=self.rate, options=self.options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        if self.timed:
            self._stream.codec_context.time_base = self._tick

    def _add_sound(self, until: Fraction | None) -> None:
        if self._sound is not None:
            try:
                self._sound.add(until)
            except SoundError as error:  # the pictures are intact without it
                self._lose_sound(str(error))

    def _lose_sound(self, reason: str) -> None:
        self.lost_sound = reason
        if self._sound is not None:
            self._sound.close()
            self._sound = None

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        try:
            yield
        except av.error.FFmpegError as error:
            reason = f"can't be written with codec={self.codec}: {error.strerror}"
            raise VideoError(f"{self.path}: {reason}.", lasting=not isinstance(error, OSError)) from error


def write_video(
    path: Path | str, frames: Iterable[Frames], fps: float | Fraction, codec: str = "libx264", **options: str
) -> Path:
    """Write frames, uint8 (H, W, 3) each, RGB, at a constant rate with `VideoWriter`."""
    with VideoWriter(path, fps, codec, options=options) as writer:
        for picture in frames:
            writer.write(picture)
    return Path(path)


def write_and_read(frames: Frames, codec: str, fps: float | Fraction) -> Frames:
    """Encode frames as an .mp4 in memory with `encode` and read them back, as evaluations of files do.

    Reading converts colours by swscale's defaults, as OpenCV, decord and FFmpeg's command do: up to 2 of 255 darker
    than `read_clip`, and without interpolation of chroma.

    Args:
        frames: uint8 (T, H, W, 3), RGB.
        codec: "mp4v" or "h264".
        fps: Frames per second of the file.

    Returns:
        uint8 (T, H, W, 3).

    Raises:
        VideoError: The frames can't be encoded with this codec, or it is unknown.
    """
    with av.open(io.BytesIO(encode(frames, codec, fps)), "r") as container:
        back: Frames = np.array([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)], np.uint8)
    if back.shape != frames.shape:
        raise VideoError(f"Expected {frames.shape} back from a file with codec={codec}, got {back.shape}.")
    return back


def encode(frames: Frames, codec: str, fps: float | Fraction) -> bytes:
    """Encode frames as the writer of an evaluation does that compares files.

    - "mp4v": `cv2.VideoWriter` with that code (Open-Sora-Plan). FFmpeg's MPEG-4 part 2, yuv420p, 1.5 bits per pixel,
      quantizers from 3, a keyframe every 12 frames. With the same FFmpeg the bytes of the stream are OpenCV's. Odd
      sides are refused (OpenCV would drop a row or column).
    - "h264": `mediapy.write_video` by default (Cosmos, TokenBench). x264's preset medium at the quantizer 20, or 28
      if a frame has more than 640x480 pixels; yuv420p, or yuv444p if a side is odd.

    Colours are converted as there, by swscale's defaults and the bicubic filter. Encoding uses one thread, since x264's
    output depends on their number.

    Args:
        frames: uint8 (T, H, W, 3), RGB.
        codec: "mp4v" or "h264".
        fps: Frames per second, on which the encoders' bit rate depends.

    Returns:
        Content of an .mp4.

    Raises:
        VideoError: The frames can't be encoded with this codec, or it is unknown.
    """
    height, width = frames.shape[1:3]
    odd = bool(height % 2 or width % 2)
    if codec == "mp4v" and odd:
        raise VideoError(f"Expected frames with an even height and width for codec=mp4v, got {(height, width)}.")
    # The finest time unit of MPEG-4 part 2 is 1/65535.
    rate = Fraction(fps).limit_denominator(1001)
    layout, pictures = "rgb24", frames
    if codec == "mp4v":
        encoder, options, bits = "mpeg4", {"g": "12"}, int(1.5 * float(rate) * height * width)
        layout, pictures = "bgr24", frames[..., ::-1]  # OpenCV's order, for which swscale truncates, and not for RGB
        # Without a least quantizer still pictures get the finest one, and files 1.2 to 1.7 times as large.
        options |= {"b": str(bits), "bt": str(bits), "qmin": "3"}
    elif codec == "h264":
        encoder, options = "libx264", {"preset": "medium", "qp": "20" if height * width <= 640 * 480 else "28"}
    else:
        raise VideoError(f"Expected the codec mp4v or h264, got {codec!r}.")
    file = io.BytesIO()
    try:
        with av.open(file, "w", format="mp4") as container:
            stream: Any = container.add_stream(encoder, rate=rate, options=options)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv444p" if odd else "yuv420p"
            stream.codec_context.thread_count = 1
            for picture in pictures:
                frame = VideoFrame.from_ndarray(np.ascontiguousarray(picture), format=layout)
                container.mux(stream.encode(frame.reformat(format=stream.pix_fmt, interpolation="BICUBIC")))
            container.mux(stream.encode(None))
    except (av.error.FFmpegError, ValueError) as error:
        raise VideoError(f"A clip of {frames.shape} can't be written with codec={codec}: {error}.") from error
    return file.getvalue()
