"""Copying of a video's sound into another video with new pictures."""

from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from typing import Any, Self

from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.packet import Packet

from .source import Source, is_lasting, name_of, open_video, reason_of

# Codecs that MP4 files hold and common players play; others are encoded anew.
_COPIED = frozenset({"aac", "ac3", "alac", "eac3", "flac", "mp3", "opus"})
_BEFORE = Fraction(1, 10)  # seconds before time 0 whose packets a decoder needs to start


class SoundError(Exception):
    """Sound that ends early because of an error; the message is one line."""


class Sound:
    """The sound of `source`, added to a container along with the pictures, in constant memory.

    Time 0 is the source's first picture.
    """

    def __init__(self, source: Source, stream: AudioStream, packets: Iterator[Packet], start: Fraction) -> None:
        self._name = name_of(source)
        self._stream = stream
        self._packets = packets
        self._start = start
        self._waiting: Packet | None = None
        self._container: Any = None
        self._output: Any = None
        self._copied = stream.codec_context.codec.canonical_name in _COPIED
        self._closing = ExitStack()

    @classmethod
    def of(cls, source: Source, container: OutputContainer) -> Self | None:
        """Open the sound of `source`, or return None without sound; call before anything is written to `container`."""
        with ExitStack() as stack:
            given, pictures = stack.enter_context(open_video(source))
            stream = given.streams.best("audio")
            if not isinstance(stream, AudioStream) or stream.codec_context is None:
                return None
            start = (pictures.start_time or 0) * (pictures.time_base or Fraction(0))
            packets = (p for p in given.demux(stream) if p.size and p.pts is not None and p.dts is not None)
            sound = cls(source, stream, packets, start)
            sound._closing = stack.pop_all()
        sound._container = container
        try:  # errors from here on are not the source's
            if sound._copied:
                sound._output = container.add_stream_from_template(stream)
            else:
                sound._output = container.add_stream("aac", rate=stream.rate)
                sound._output.layout = "mono" if stream.channels == 1 else "stereo"
        except BaseException:
            sound.close()
            raise
        return sound

    def add(self, until: Fraction | None) -> None:
        """Write the sound up to a time in seconds; None writes the rest and ends the stream."""
        try:
            while (packet := self._waiting or next(self._packets, None)) is not None:
                self._waiting = packet if until is not None and self._time(packet) > until else None
                if self._waiting is not None:
                    return
                self._write(packet)
            if until is None and not self._copied:
                self._container.mux(self._output.encode(None))
        except Exception as error:
            if not is_lasting(error):  # such as a full disk: not an error of the sound
                raise
            raise SoundError(f"{self._name}: the sound breaks off: {reason_of(error)}.") from error

    def close(self) -> None:
        self._closing.close()

    def _time(self, packet: Packet) -> Fraction:
        return (packet.pts or 0) * packet.time_base - self._start

    def _write(self, packet: Packet) -> None:
        if self._time(packet) < -_BEFORE:
            return
        if self._copied:
            shift = round(self._start / packet.time_base)
            packet.pts = (packet.pts or 0) - shift
            packet.dts = (packet.dts or 0) - shift
            packet.stream = self._output
            self._container.mux(packet)
            return
        for frame in packet.decode():
            if frame.pts is not None and frame.time_base is not None:
                frame.pts -= round(self._start / frame.time_base)
            self._container.mux(self._output.encode(frame))
