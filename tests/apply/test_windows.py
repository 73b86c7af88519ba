"""Cutting long videos into clips of one length."""

import errno
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from vidtwin.apply.inputs import Input
from vidtwin.apply.outputs import write_png
from vidtwin.apply.windows import VideoWindows, Window, batched, count_frames, windows
from vidtwin.video import VideoError, VideoWriter, iter_frames, source, write_video


def numbered(count: int) -> np.ndarray:
    """Frame k has the brightness 6 k."""
    return np.repeat(np.arange(count, dtype=np.uint8) * 6, 32 * 48 * 3).reshape(count, 32, 48, 3)


@pytest.mark.parametrize(("count", "real"), [(1, [1]), (7, [7]), (8, [8]), (9, [8, 1]), (21, [8, 8, 5])])
def test_every_frame_is_in_one_window_and_the_last_window_repeats_the_last_frame(tmp_path, count, real):
    path = write_video(tmp_path / "a.mp4", numbered(count), 25)
    found = list(windows(path, 8))
    assert [window.num_frames for window in found] == real
    assert [window.start_frame for window in found] == list(range(0, count, 8))
    assert all(window.frames.shape == (8, 32, 48, 3) for window in found)
    frames = np.concatenate([window.frames[: window.num_frames] for window in found])
    assert np.array_equal(frames, np.stack(list(iter_frames(path))))
    for window in found:
        assert (window.frames[window.num_frames :] == window.frames[window.num_frames - 1]).all()
    assert [time for window in found for time in window.times] == [Fraction(k, 25) for k in range(count)]


def test_times_are_those_of_a_variable_rate(tmp_path):
    times = [Fraction(k, 25) for k in (0, 1, 2, 5, 9, 10)]
    with VideoWriter(tmp_path / "a.mp4", 25, timed=True) as writer:
        for picture, time in zip(numbered(6), times, strict=True):
            writer.write(picture, time)
    found = [time for window in windows(tmp_path / "a.mp4", 4) for time in window.times]
    assert found == times


def test_of_a_damaged_video_all_before_the_damage_is_given_then_the_error(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 48, 3), np.uint8)
    path = write_video(tmp_path / "a.mp4", noise, 25, g="1")
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2000] = bytes(2000)
    path.write_bytes(data)
    reader = windows(path, 4)
    found = [next(reader) for _ in range(3)]
    with pytest.raises(VideoError) as caught:
        next(reader)
    assert sum(window.num_frames for window in found) == caught.value.decodable == 9
    assert [window.num_frames for window in found] == [4, 4, 1]


def test_a_disk_that_fails_is_no_end_of_a_video(tmp_path, monkeypatch):
    folder = tmp_path / "a"
    for number, frame in enumerate(numbered(9)):
        write_png(folder / f"{number}.png", frame)
    real, fails = Path.read_bytes, False

    def read(path):
        if fails and path.name == "8.png":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    reader = VideoWindows(folder, 4)
    fails = True
    with pytest.raises(VideoError, match=os.strerror(errno.EIO)):
        list(reader)
    with pytest.raises(VideoError, match=os.strerror(errno.EIO)):
        VideoWindows(folder, 4)


def test_windows_end_at_the_damage_unless_it_lies_behind_the_limit(monkeypatch, tmp_path):
    path = write_video(tmp_path / "a.mp4", numbered(3), 25)

    def read(lengths, limit):
        def windows(*_):
            for length in lengths:
                yield Window(np.zeros((4, 2, 2, 3), np.uint8), length, 0, [])
            raise VideoError("broken")

        monkeypatch.setattr("vidtwin.apply.windows.windows", windows)
        found = VideoWindows(path, 4, limit=limit)
        return [window.num_frames for window in found], found.damage

    assert read([4, 3], 2) == ([4, 3], "broken")
    assert read([4, 4, 3], 2) == ([4, 4], None)
    assert read([4, 4, 3], None) == ([4, 4, 3], "broken")
    with pytest.raises(VideoError, match="broken"):
        read([], 2)


@pytest.mark.parametrize(("count", "batches"), [(0, []), (2, [[0, 1]]), (5, [[0, 1], [2, 3], [4]])])
def test_batches_hold_all_items_in_order(count, batches):
    assert list(batched(range(count), 2)) == batches


def test_frames_are_counted_by_headers_and_files_without_one_count_nothing(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.avi", numbered(9), 25, "mpeg4")
    (tmp_path / "b.avi").write_bytes(b"no video")
    entries = [Input(path, "a"), Input(tmp_path / "b.avi", "b")]
    monkeypatch.setattr(source, "_demux", lambda *_: pytest.fail("read all packets"))
    assert count_frames(entries) == 9
    assert count_frames(entries, 4) == 4
