"""Frames are those that an independent full decode shows at the wanted times; bad files are named in one line."""

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from vidtwin.video import VideoError, iter_frames, probe, read_clip, write_video


def moving_pictures(count: int, height: int = 32, width: int = 48) -> Iterator[np.ndarray]:
    """Frames that all differ: a bright bar over a gradient, and a level that rises."""
    for index in range(count):
        frame = np.empty((height, width, 3), np.uint8)
        frame[..., 0] = np.linspace(0, 200, width)
        frame[..., 1] = np.linspace(0, 200, height)[:, None]
        frame[..., 2] = 2 * index
        frame[:, (3 * index) % width] = 255
        yield frame


def decode_all(path: Path) -> tuple[list[np.ndarray], list[float] | None]:
    """Every frame in display order, and their times from the first where the container has true ones."""
    with av.open(str(path)) as container:
        counted = container.format.name == "avi"
        decoded = list(container.decode(video=0))
        pictures = [frame.to_ndarray(format="rgb24").astype(np.int16) for frame in decoded]
        return pictures, None if counted else [float(frame.time - decoded[0].time) for frame in decoded]


def shown_at(moment: Fraction, rate: Fraction, times: list[float] | None) -> int:
    if times is None:
        return int(moment * rate)
    return int(np.searchsorted(times, float(moment) + 1e-3, side="right")) - 1


def assert_frames(path: Path, start: Fraction, fps: Fraction, count: int) -> None:
    pictures, times = decode_all(path)
    rate = probe(path).fps
    clip = read_clip(path, start, count, fps)
    for k, frame in enumerate(clip):
        expected = shown_at(start + k / fps, rate, times)
        distances = [np.abs(picture - frame).mean() for picture in pictures]
        assert distances[expected] <= min(distances) + 1e-9, f"frame {k}: not number {expected}"


@pytest.mark.parametrize(("suffix", "codec"), [(".avi", "mpeg4"), (".mp4", "libx264"), (".mkv", "libx264")])
@pytest.mark.parametrize("start_frame", [0, 7, 50])
def test_25_to_8_fps_takes_the_frames_shown_at_these_times(
    tmp_path: Path, suffix: str, codec: str, start_frame: int
) -> None:
    path = write_video(tmp_path / f"a{suffix}", moving_pictures(100), 25, codec, g="12")
    assert_frames(path, Fraction(start_frame, 25), Fraction(8), 16)


def test_the_rate_does_not_drift(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi", moving_pictures(120), 25, "mpeg4")
    every = np.stack(list(iter_frames(path)))
    # 38 frames at 8 fps span 37 / 8 s = 115.6 source frames; every third frame (8.33 fps) would span 111.
    np.testing.assert_array_equal(read_clip(path, 0, 38, 8)[-1], every[115])


def test_without_fps_consecutive_frames_come_from_any_start(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi", moving_pictures(60), Fraction(30000, 1001), "mpeg4")
    every = np.stack(list(iter_frames(path)))
    for start in (0, 1, 17, 44):
        np.testing.assert_array_equal(read_clip(path, start / probe(path).fps, 16), every[start : start + 16])
        np.testing.assert_array_equal(read_clip(path, start / float(probe(path).fps), 16), every[start : start + 16])


def test_variable_frame_rate_goes_by_timestamps(tmp_path: Path) -> None:
    path = tmp_path / "vfr.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for index, picture in enumerate(moving_pictures(60)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = (index * 40 if index < 30 else 1200 + (index - 30) * 100), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert_frames(path, Fraction(1, 2), Fraction(8), 16)


@pytest.mark.parametrize(
    "name",
    ["v_ApplyEyeMakeup_g01_c01.avi", "v_BaseballPitch_g01_c01.avi", "anet_GGSY1Qvo990.mp4", "flipping_a_pancake.mkv"],
)
def test_real_files_agree_with_a_full_decode(shared: Path, name: str) -> None:
    path = shared / "data" / "clips" / name
    info = probe(path)
    start = Fraction(int(info.num_frames - 16 * info.fps / 8 - 1)) / info.fps
    assert_frames(path, max(start, Fraction(0)), Fraction(8), 16)


def test_seeking_gives_what_decoding_from_the_start_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", moving_pictures(120), 25, g="10")
    sought = read_clip(path, 3.0, 8, 8, size=16)
    monkeypatch.setattr("vidtwin.video.reading._seek", lambda *args: False)
    np.testing.assert_array_equal(sought, read_clip(path, 3.0, 8, 8, size=16))


def test_the_crop_is_the_square_at_its_place(tmp_path: Path) -> None:
    halves = np.zeros((32, 64, 3), np.uint8)
    halves[:, 32:] = 255
    path = write_video(tmp_path / "a.mp4", [halves] * 4, 25)
    left, middle, right = (read_clip(path, 0, 1, size=16, crop=(x, 0.5))[0] for x in (0.0, 0.5, 1.0))
    assert left.shape == (16, 16, 3)
    assert left.max() < 30
    assert right.min() > 225
    assert middle[:, 0].max() < 60 < 200 < middle[:, -1].min()


def test_what_is_written_is_read_back_nearly_without_loss(tmp_path: Path) -> None:
    smooth = [np.full((32, 48, 3), (40 + 3 * k, 120, 200 - 3 * k), np.uint8) for k in range(20)]
    for path in (
        write_video(tmp_path / "new/a.mp4", smooth, 12.5),
        write_video(tmp_path / "a.avi", smooth, 25, "mpeg4"),
    ):
        back = np.stack(list(iter_frames(path))).astype(int)
        assert back.shape == (20, 32, 48, 3)
        assert np.abs(back - np.stack(smooth)).mean() < 3
    assert probe(tmp_path / "new/a.mp4").fps == Fraction(25, 2)
    assert sorted(os.listdir(tmp_path / "new")) == ["a.mp4"]


def test_an_odd_side_grows_by_one_pixel(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving_pictures(3, 31, 47), 25)
    assert (probe(path).height, probe(path).width) == (32, 48)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving_pictures(3), 25)
    before = path.read_bytes()
    with pytest.raises(VideoError, match="expected frames of uint8"):
        write_video(path, [np.zeros((32, 48, 3), np.uint8), np.zeros((30, 48, 3), np.uint8)], 25)
    with pytest.raises(VideoError, match="at least one frame"):
        write_video(path, [], 25)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_a_video_that_ends_early_says_how_many_frames_it_had(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving_pictures(60), 25)
    with pytest.raises(VideoError, match="ends after 60 frames") as caught:
        read_clip(path, 2.0, 16, 8)
    assert caught.value.decodable == 60


@pytest.mark.parametrize("content", [b"", b"this is no video at all\n" * 40])
def test_a_file_that_is_no_video_is_named_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.avi"
    path.write_bytes(content)
    for read in (lambda: probe(path), lambda: read_clip(path), lambda: list(iter_frames(path))):
        with pytest.raises(VideoError, match=r"bad\.avi: expected a readable video") as caught:
            read()
        assert "\n" not in str(caught.value)
    with pytest.raises(VideoError, match=r"absent\.avi: there is no such file"):
        probe(tmp_path / "absent.avi")


def test_a_truncated_real_file_says_how_many_frames_it_had(shared: Path) -> None:
    path = shared / "data" / "clips" / "hard" / "truncated_half.avi"
    assert probe(path).num_frames == 164
    with pytest.raises(VideoError) as caught:
        read_clip(path, 4.0, 16, 8)
    assert caught.value.decodable == 78
