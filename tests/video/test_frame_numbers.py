"""Videos whose frames show their numbers: the ones that come are those that are asked for, whatever holds them."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from vidtwin.video import VideoError, read_clip, survey

BITS, WIDTH, HEIGHT = 9, 144, 32
RATES = [Fraction(25), Fraction(30), Fraction(30000, 1001), Fraction(24000, 1001), Fraction(60000, 1001), Fraction(12)]


def numbered(number: int) -> np.ndarray:
    """A frame with its number as bars, black for 0 and white for 1."""
    bits = [number >> bit & 1 for bit in range(BITS)]
    return np.repeat(np.repeat(np.array(bits, np.uint8)[None, :, None] * 255, HEIGHT, 0), WIDTH // BITS, 1).repeat(3, 2)


def numbers(clip: np.ndarray) -> list[int]:
    bars = clip.mean(axis=(1, 3)).reshape(len(clip), BITS, -1)[..., 4:-4].mean(-1) > 127
    return [int(sum(1 << bit for bit in range(BITS) if row[bit])) for row in bars]


def write(
    path: Path,
    count: int = 150,
    rate: Fraction = Fraction(25),
    place: Callable[[int], int] = lambda index: index,
    codec: str = "libx264",
    unit: Fraction | None = None,
    **options: str,
) -> Path:
    """Frame `index` is shown at `place(index)` units of time, by default frames."""
    settings = {"g": "30", "bf": "2"} if codec == "libx264" else {"g": "12"}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate, options=settings)
        stream.width, stream.height = WIDTH, HEIGHT
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if unit is not None:
            stream.time_base = stream.codec_context.time_base = unit
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(numbered(index), format="rgb24")
            frame.pts, frame.time_base = place(index), unit or 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


CONTAINERS = {
    "mp4": "libx264",
    "mkv": "libx264",
    "flv": "libx264",
    "ts": "libx264",
    "mov": "libx264",
    "avi": "mpeg4",
    "wmv": "wmv2",
}


@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("rate", RATES, ids=lambda rate: f"{float(rate):.2f}")
@pytest.mark.parametrize("suffix", CONTAINERS)
def test_frames_are_those_at_their_times(tmp_path: Path, suffix: str, rate: Fraction, offset: int) -> None:
    """Also where the first timestamp is not 0 and times are rounded to milliseconds."""
    if suffix == "avi" and offset:
        pytest.skip("AVI has no timestamps: the muxer drops frames behind the first one")
    path = write(tmp_path / f"a.{suffix}", 110, rate, lambda index: index + offset, CONTAINERS[suffix])
    info = survey(path)
    assert info.num_frames == 110
    assert abs(float(info.fps / rate) - 1) < 2e-3
    for start in (0, 1, 17, 40, 94):
        every = read_clip(path, start / info.fps, 16, rate=info.fps)
        assert numbers(every) == list(range(start, start + 16))
    for start in (0, 17, 40):
        count = min(16, 1 + int((109 - start) * 8 / rate))
        found = numbers(read_clip(path, start / info.fps, count, 8, rate=info.fps))
        for k, number in enumerate(found):
            moment = float(start / info.fps + Fraction(k, 8)) * float(rate)  # in frames
            late = 0.0021 * float(rate)  # times of milliseconds tell no finer
            assert int(moment + 1e-6) <= number <= int(moment + late + 1e-6), f"frame {k} from {start}"


def test_every_frame_at_a_variable_rate(tmp_path: Path) -> None:
    def place(index: int) -> int:
        return index * 20 if index < 60 else 1200 + (index - 60) * 90

    path = write(tmp_path / "a.mp4", 120, Fraction(50), place, unit=Fraction(1, 1000))
    info = survey(path)
    for start in (0, 30, 55, 104):
        assert numbers(read_clip(path, start / info.fps, 16, rate=info.fps)) == list(range(start, start + 16))
    found = numbers(read_clip(path, 0.5, 16, 8))
    assert found == [max(i for i in range(120) if place(i) <= 500 + 125 * k + 1e-6) for k in range(16)]


def test_a_header_with_a_wrong_rate_is_corrected(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", 120, Fraction(60), lambda index: index * 40, unit=Fraction(1, 1000))
    info = survey(path)
    assert info.fps == 25
    assert numbers(read_clip(path, 50 / info.fps, 16, rate=info.fps)) == list(range(50, 66))


@pytest.mark.parametrize("codec", ["mpeg4", "mjpeg"])
def test_frames_that_an_avi_drops_are_shown_again(tmp_path: Path, codec: str) -> None:
    path = write(tmp_path / "a.avi", 100, place=lambda index: index if index < 40 else index + 5, codec=codec)
    info = survey(path)
    assert info.num_frames == 105
    # The file holds 40 frames, five times nothing, and 60 more.
    assert numbers(read_clip(path, 36 / info.fps, 12)) == [36, 37, 38, 39, 39, 39, 39, 39, 39, 40, 41, 42]
    assert numbers(read_clip(path, 3, 1, 8)) == [70]


def test_a_video_that_begins_late_is_whole(tmp_path: Path) -> None:
    for suffix in ("mkv", "ts", "flv", "mp4"):
        path = write(tmp_path / f"a.{suffix}", 100, place=lambda index: index + 100)
        assert survey(path).num_frames == 100
        assert numbers(read_clip(path, 1, 4, 8)) == [25, 28, 31, 34]


@pytest.mark.parametrize("cut", [0.1, 0.35])
def test_a_broadcast_begins_with_its_first_whole_picture(tmp_path: Path, cut: float) -> None:
    content = write(tmp_path / "a.ts", 250).read_bytes()
    packets = int(len(content) * cut) // 188 * 188
    path = tmp_path / "cut.ts"
    path.write_bytes(content[: 3 * 188] + content[packets:])
    info = survey(path)
    with av.open(str(path)) as container:  # FFmpeg leaves out what it can't decode
        first = numbers(next(container.decode(video=0)).to_ndarray(format="rgb24")[None])[0]
    assert first > 0
    assert 0 <= info.num_frames - (250 - first) <= 3
    for start in (0, 40, 90):
        assert numbers(read_clip(path, start / info.fps, 4, 12.5)) == [first + start + 2 * k for k in range(4)]


def test_a_program_stream_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mpg", 150, codec="mpeg2video")
    info = survey(path)
    assert info.num_frames == 150
    for start in (0, 3, 60, 130):
        assert numbers(read_clip(path, start / info.fps, 6, 25)) == list(range(start, start + 6))


def test_the_main_video_is_read_and_not_the_first(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        still, stream = (container.add_stream("libx264", rate=25, options={"bf": "0"}) for _ in range(2))
        for each, width in ((still, 16), (stream, WIDTH)):
            each.width, each.height, each.pix_fmt = width, HEIGHT if each is stream else 16, "yuv420p"
        for index in range(50):
            if index < 2:
                container.mux(still.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(index), format="rgb24")))
        container.mux(still.encode(None))
        container.mux(stream.encode(None))
    assert survey(path).num_frames == 50
    assert numbers(read_clip(path, 0.4, 4, 25)) == [10, 11, 12, 13]


def test_a_failing_disk_is_not_blamed_on_the_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.mp4", 20)
    with monkeypatch.context() as patch:
        patch.setattr(av, "open", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(VideoError, match="Input/output error") as caught:
            survey(path)
    assert not caught.value.lasting
    path.write_bytes(b"no video")
    with pytest.raises(VideoError) as caught:
        survey(path)
    assert caught.value.lasting
