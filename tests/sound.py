"""Small videos with sound, and what is heard in a file."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

RATE = 16_000


def pictures(count: int) -> np.ndarray:
    """Smooth ones, so that the encoder has nothing to leave out."""
    ramp = np.linspace(0, 200, 48, dtype=np.uint8)
    return np.stack([np.broadcast_to((ramp + 2 * k)[None, :, None], (32, 48, 3)) for k in range(count)])


def with_tone(path: Path, codec: str, count: int = 30, late: Fraction = Fraction(0)) -> Path:
    """A video of 25 fps whose sound is silent for its first half and a tone in its second; `late` shifts all of it."""
    options = {"strict": "-2"} if codec == "vorbis" else {}
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        audio = container.add_stream(codec, rate=48_000 if codec == "libopus" else RATE, options=options)
        audio.layout = "mono"
        for number, picture in enumerate(pictures(count)):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = number + round(late * 25), Fraction(1, 25)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        samples = audio.rate * count // 25
        wave = np.sin(np.arange(samples) * 2 * np.pi * 440 / audio.rate)
        wave[: samples // 2] = 0
        block = np.ascontiguousarray((wave * 20_000).astype(np.int16)[None])
        resampler = av.AudioResampler(audio.format, "mono", audio.rate)
        whole = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
        whole.sample_rate, whole.time_base, whole.pts = audio.rate, Fraction(1, audio.rate), None
        fifo = av.AudioFifo()
        for frame in resampler.resample(whole):
            frame.pts = None
            fifo.write(frame)
        place = round(late * audio.rate)
        while (frame := fifo.read(audio.codec_context.frame_size or 1024, True)) is not None:
            frame.pts, frame.time_base = place, Fraction(1, audio.rate)
            place += frame.samples
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    return path


def heard(path: Path) -> tuple[str, np.ndarray, Fraction]:
    """Codec, loudness in steps of 10 ms from time 0, and length in seconds of a file's sound."""
    with av.open(str(path)) as container:
        (audio,) = container.streams.audio
        loud: dict[int, float] = {}
        end = Fraction(0)
        for frame in container.decode(audio):
            data = frame.to_ndarray().astype(np.float64)
            data = data if frame.format.is_planar else data.reshape(1, -1)
            for place in range(0, data.shape[1], frame.sample_rate // 100):
                step = int((frame.time + place / frame.sample_rate) * 100)
                loud[step] = max(loud.get(step, 0.0), float(np.abs(data[:, place : place + 50]).max()))
            end = Fraction(frame.pts * frame.time_base) + Fraction(frame.samples, frame.sample_rate)
        steps = np.array([loud.get(step, 0.0) for step in range(max(loud) + 1)])
        return audio.codec_context.codec.canonical_name, steps / steps.max(), end


def first_loud(path: Path) -> float:
    _, steps, _ = heard(path)
    return float(np.argmax(steps > 0.3)) / 100
