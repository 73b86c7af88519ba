"""Videos with times of their own and the sound of another one."""

import re
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from sound import first_loud, heard, pictures, with_tone

from vidtwin.video import VideoError, VideoWriter, decode, probe, survey


@pytest.mark.parametrize(
    "rate", [Fraction(25), Fraction(30_000, 1001), Fraction(24_000, 1001), Fraction(1962, 100), Fraction(1)]
)
def test_a_constant_rate_stays_exact_through_times(tmp_path, rate):
    with VideoWriter(tmp_path / "a.mp4", rate, timed=True) as writer:
        for number, picture in enumerate(pictures(12)):
            writer.write(picture, number / rate)
    info = survey(tmp_path / "a.mp4")
    assert (info.num_frames, info.fps) == (12, rate)
    assert [time for time, _ in decode(tmp_path / "a.mp4")] == [number / rate for number in range(12)]


def test_times_that_do_not_rise_become_the_next_possible_ones(tmp_path):
    times = [Fraction(0), Fraction(0), Fraction(1, 25), Fraction(1, 25)]
    with VideoWriter(tmp_path / "a.mp4", 25, timed=True) as writer:
        for picture, time in zip(pictures(4), times, strict=True):
            writer.write(picture, time)
    found = [time for time, _ in decode(tmp_path / "a.mp4")]
    assert len(found) == 4
    assert all(abs(a - b) < Fraction(1, 1000) for a, b in zip(found, times, strict=True))


@pytest.mark.parametrize(
    ("codec", "suffix", "kept"),
    [("aac", ".mp4", "aac"), ("libmp3lame", ".mp4", "mp3"), ("libopus", ".mkv", "opus"), ("pcm_s16le", ".avi", "aac")],
)
def test_the_sound_goes_along_at_its_place_copied_where_mp4_takes_it(tmp_path, codec, suffix, kept):
    source = with_tone(tmp_path / f"in{suffix}", codec)
    with VideoWriter(tmp_path / "out.mp4", 25, timed=True, sound=source) as writer:
        for number, picture in enumerate(pictures(30)):
            writer.write(picture, Fraction(number, 25))
    assert writer.lost_sound is None
    name, _, end = heard(tmp_path / "out.mp4")
    assert name == kept
    assert abs(end - heard(source)[2]) < Fraction(1, 10)
    assert abs(first_loud(tmp_path / "out.mp4") - first_loud(source)) < 0.06
    assert probe(tmp_path / "out.mp4").num_frames == 30
    with av.open(str(tmp_path / "out.mp4")) as container:  # heard beside what is seen, as a player reads it
        times = [packet.dts * packet.time_base for packet in container.demux() if packet.dts is not None]
    assert all(after > before - 1 for before, after in pairwise(times))


def test_sound_is_counted_from_the_first_picture(tmp_path):
    source = with_tone(tmp_path / "in.mkv", "aac", late=Fraction(2))
    with VideoWriter(tmp_path / "out.mp4", 25, timed=True, sound=source) as writer:
        for number, picture in enumerate(pictures(30)):
            writer.write(picture, Fraction(number, 25))
    assert abs(first_loud(tmp_path / "out.mp4") - 0.6) < 0.1
    assert abs(first_loud(source) - 2.6) < 0.1


def test_a_source_without_sound_gives_none(tmp_path):
    with VideoWriter(tmp_path / "in.mp4", 25) as writer:
        writer.write(pictures(1)[0])
    with VideoWriter(tmp_path / "out.mp4", 25, sound=tmp_path / "in.mp4") as writer:
        writer.write(pictures(1)[0])
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert not container.streams.audio


def write(path: Path, *shown: np.ndarray, error: Exception | None = None, **arguments) -> None:
    with VideoWriter(path, 25, **arguments) as writer:
        for picture in shown:
            writer.write(picture)
        if error is not None:
            raise error


def test_an_error_leaves_no_file_and_the_earlier_one_as_it_was(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"before")
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "a.mp4", pictures(1)[0], error=ZeroDivisionError())
    assert (tmp_path / "a.mp4").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("room", [10, 3_000])
def test_a_full_disk_is_an_error_with_and_without_sound_and_leaves_no_file(tmp_path, room):
    """With sound the header was written a second time after it had failed, and FFmpeg crashed the process."""
    resource = pytest.importorskip("resource")
    source = with_tone(tmp_path / "in.mp4", "aac")
    noise = np.random.default_rng(0).integers(0, 256, (40, 32, 48, 3), np.uint8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for sound in (None, source):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        try:
            with pytest.raises(VideoError, match="File too large"):
                write(tmp_path / "out.mp4", *noise, sound=sound)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


def test_sound_that_the_container_refuses_is_left_out_and_logged(tmp_path):
    source = with_tone(tmp_path / "in.mkv", "libopus")
    with VideoWriter(tmp_path / "out.avi", 25, codec="mpeg4", sound=source) as writer:
        for picture in pictures(5):
            writer.write(picture)
    assert re.search("sound can't be (carried over|written to .avi)", writer.lost_sound)
    assert probe(tmp_path / "out.avi").num_frames == 5


def test_invalid_frames_are_refused_and_leave_no_file(tmp_path):
    (picture,) = pictures(1)
    with pytest.raises(VideoError, match="expected at least one frame"):
        write(tmp_path / "a.mp4")
    with pytest.raises(VideoError, match="expected frames with times"):
        write(tmp_path / "a.mp4", picture, timed=True)
    with pytest.raises(VideoError, match=r"expected frames of uint8 \(32, 48, 3\)"):
        write(tmp_path / "a.mp4", picture, picture[:16])
    assert not list(tmp_path.iterdir())


def test_the_same_frames_give_the_same_file(tmp_path):
    noise = np.random.default_rng(0).integers(0, 40, (24, 32, 48, 3), np.uint8)
    files = set()
    for _ in range(6):
        write(tmp_path / "a.mp4", *(noise + pictures(24)))
        files.add((tmp_path / "a.mp4").read_bytes())
    assert len(files) == 1
