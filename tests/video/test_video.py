"""Frames are those that an independent full decode shows at the wanted times; bad files are named in one line."""

import io
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from PIL import Image
from torchvision.transforms import v2

from vidtwin.video import VideoError, decode, iter_frames, probe, read_clip, survey, write_video


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


REAL = [
    "anet_GGSY1Qvo990.mp4", "bikes.mp4", "carphone_pristine.mp4", "flipping_a_pancake.mkv", "foreman_cif_openh264.mp4",
    "mma_demo.mp4", "mma_part0.mp4", "mma_structuralize.mp4", "mma_test.mp4", "mobile_cif_30f.mp4",
    "paddle_example.avi", "realshort.mp4", "v_ApplyEyeMakeup_g01_c01.avi", "v_BaseballPitch_g01_c01.avi",
    "hard/anamorphic_sar10_11.avi", "hard/av1.mkv", "hard/bframes_unpacked.avi", "hard/eight_frames.avi",
    "hard/fullrange_bt709.mp4", "hard/gray.mp4", "hard/h264_raw_P_lost.264", "hard/h265_10bit.mp4",
    "hard/h265_10fps.mp4", "hard/lowbitrate_carphone_distorted.mp4", "hard/nonzero_start_editlist.mp4",
    "hard/odd_171x129_yuv444.mp4", "hard/one_frame.avi", "hard/portrait_160x320.mp4",
    "hard/rapid_scene_cuts_LS_SVA_D.mp4", "hard/rotate_0.mov", "hard/rotate_180.mov", "hard/rotate_90.mov",
    "hard/short_19f_720p.mp4", "hard/small_120x90.avi",
]  # fmt: skip
LARGE = ["bigbuckbunny.mp4", "cockatoo_yuv420.mp4", "pexels_19216241.mp4", "hard/h264_yuv444p_cockatoo.mp4"]


@pytest.mark.parametrize("name", [*REAL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)])
def test_real_files_give_the_frames_that_a_full_decode_shows(shared: Path, name: str) -> None:
    path = shared / "data" / "clips" / name
    with av.open(str(path)) as container:
        counted = container.format.name in ("avi", "h264")
        stream = container.streams.video[0]
        rate, tick = Fraction(stream.average_rate or 25), stream.time_base or Fraction(1)
        pictures, times = [], []
        for frame in container.decode(video=0):  # all frames, in the order in which they are shown
            times.append(len(times) / rate if counted else (frame.pts or 0) * tick)
            pictures.append(thumbnail(frame))
    info = survey(path)
    assert info.num_frames == len(pictures)
    turns = {"rotate_90": 1, "rotate_180": 2}.get(path.stem, 0)
    slack = Fraction(1, 2000 if path.suffix == ".mkv" else 10**6)  # Matroska's times are whole milliseconds
    for start in {0, len(pictures) // 3, max(0, len(pictures) - 40)}:
        count = min(16, 1 + int((len(pictures) - start - 1) * 8 / rate))
        for k, picture in enumerate(read_clip(path, start / info.fps, count, 8)):
            upright = np.ascontiguousarray(np.rot90(picture, turns))
            shown = thumbnail(av.VideoFrame.from_ndarray(upright, format="rgb24"))
            moment = start / info.fps + Fraction(k, 8) + slack
            expected = max(i for i, time in enumerate(times) if time - times[0] <= moment)
            distances = [np.abs(candidate - shown).mean() for candidate in pictures]
            assert distances[expected] <= min(distances) + 0.5, f"frame {k} from {start}: not number {expected}"
            assert distances[expected] < 8


def thumbnail(frame: av.VideoFrame) -> np.ndarray:
    return frame.reformat(width=64, height=48, format="rgb24").to_ndarray().astype(np.int16)


def test_seeking_gives_what_decoding_from_the_start_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", moving_pictures(120), 25, g="10")
    sought = read_clip(path, 3.0, 8, 8, size=16)
    monkeypatch.setattr("vidtwin.video.reading._seek", lambda *args: False)
    np.testing.assert_array_equal(sought, read_clip(path, 3.0, 8, 8, size=16))


@pytest.mark.parametrize("name", ["anet_GGSY1Qvo990.mp4", "bikes.mp4", "flipping_a_pancake.mkv", "hard/av1.mkv"])
def test_seeking_in_real_files_changes_nothing(shared: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shared / "data" / "clips" / name
    starts = [info_time for info_time in (1.9, 2.5, 3.3) if info_time + 1.9 < survey(path).duration]
    sought = [read_clip(path, start, 16, 8, size=32) for start in starts]
    monkeypatch.setattr("vidtwin.video.reading._seek", lambda *args: False)
    for start, clip in zip(starts, sought, strict=True):
        np.testing.assert_array_equal(clip, read_clip(path, start, 16, 8, size=32))


def test_the_crop_is_the_square_at_its_place(tmp_path: Path) -> None:
    halves = np.zeros((32, 64, 3), np.uint8)
    halves[:, 32:] = 255
    path = write_video(tmp_path / "a.mp4", [halves] * 4, 25)
    left, middle, right = (read_clip(path, 0, 1, size=16, crop=(x, 0.5))[0] for x in (0.0, 0.5, 1.0))
    assert left.shape == (16, 16, 3)
    assert left.max() < 30
    assert right.min() > 225
    assert middle[:, 0].max() < 60 < 200 < middle[:, -1].min()


def test_written_frames_are_read_back_nearly_without_loss(tmp_path: Path) -> None:
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
def test_a_file_without_a_video_is_named_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.avi"
    path.write_bytes(content)
    for read in (lambda: probe(path), lambda: read_clip(path), lambda: list(iter_frames(path))):
        with pytest.raises(VideoError, match=r"bad\.avi: expected a readable video") as caught:
            read()
        assert "\n" not in str(caught.value)
    with pytest.raises(VideoError, match=r"absent\.avi: there is no such file"):
        probe(tmp_path / "absent.avi")


def write_frames(path: Path, frames: list[np.ndarray], codec: str = "libx264", **attributes: object) -> Path:
    """Frames as they are given: of planes (any pixel format), or RGB."""
    pixels = str(attributes.pop("pixels", "yuv420p"))
    turn = attributes.pop("turn", None)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"crf": "0", "qp": "0"} if codec == "libx264" else {})
        height, width = (
            frames[0].shape[:2] if frames[0].ndim == 3 else (frames[0].shape[0] * 2 // 3, frames[0].shape[1])
        )
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        for key, value in attributes.items():
            setattr(stream.codec_context, key, value)
        if turn is not None:
            stream.set_display_rotation(**turn)
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24" if frame.ndim == 3 else pixels)
            for key in ("colorspace", "color_range"):
                if key in attributes:
                    setattr(picture, key, attributes[key])
            picture.pts = index
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def corners(height: int = 64, width: int = 96) -> np.ndarray:
    """Red, green, blue and white corners, in reading order."""
    picture = np.zeros((height, width, 3), np.uint8)
    for rows, columns, colour in (
        (slice(None, height // 2), slice(None, width // 2), (255, 0, 0)),
        (slice(None, height // 2), slice(width // 2, None), (0, 255, 0)),
        (slice(height // 2, None), slice(None, width // 2), (0, 0, 255)),
        (slice(height // 2, None), slice(width // 2, None), (255, 255, 255)),
    ):
        picture[rows, columns] = colour
    return picture


def colours_at_the_corners(picture: np.ndarray) -> list[str]:
    named = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
    found = []
    for row, column in ((4, 4), (4, -5), (-5, 4), (-5, -5)):
        pixel = picture[row, column].astype(int)
        found.append(min(named, key=lambda name: np.abs(pixel - named[name]).sum()))
    return found


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("hflip", [False, True])
def test_a_video_is_shown_as_its_display_matrix_says(tmp_path: Path, degrees: int, hflip: bool) -> None:
    path = write_frames(tmp_path / "a.mp4", [corners()] * 3, turn={"degrees": degrees, "hflip": hflip})
    expected = np.rot90(corners(), degrees // 90)  # counter-clockwise, and mirrored after it
    expected = expected[:, ::-1] if hflip else expected
    whole = read_clip(path, 0, 1)[0]
    assert whole.shape == expected.shape
    assert colours_at_the_corners(whole) == colours_at_the_corners(expected)
    # The crop is taken where it lies on the screen.
    upright = np.ascontiguousarray(expected)
    for crop in ((0.0, 0.0), (1.0, 1.0)):
        square = read_clip(path, 0, 1, size=64, crop=crop)[0]
        height, width = upright.shape[:2]
        left, top = round((width - 64) * crop[0]), round((height - 64) * crop[1])
        assert np.abs(square.astype(int) - upright[top : top + 64, left : left + 64]).mean() < 6


def test_pixels_that_are_not_square_are_made_square(tmp_path: Path) -> None:
    # A disc on the screen: stored half as wide, since a pixel is twice as wide as high.
    y, x = np.mgrid[:64, :48]
    disc = (((2 * x - 47) ** 2 + (y - 31.5) ** 2) < 24**2)[..., None] * np.full(3, 255, np.uint8)
    path = write_frames(tmp_path / "a.mp4", [disc] * 3, sample_aspect_ratio=Fraction(2))
    whole = read_clip(path, 0, 1)[0]
    assert whole.shape == (64, 96, 3)
    for picture in (whole, read_clip(path, 0, 1, size=64)[0]):
        inside = picture[..., 0] > 127
        width, height = np.flatnonzero(inside.any(0)).size, np.flatnonzero(inside.any(1)).size
        assert abs(width - 48) <= 2
        assert abs(height - 48) <= 2


MATRICES = {"bt601": (5, 0.299, 0.114), "bt709": (1, 0.2126, 0.0722), "untagged": (2, 0.299, 0.114)}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("size", [None, 32])
def test_colours_follow_the_matrix_and_range_of_the_file(
    tmp_path: Path, matrix: str, full: bool, size: int | None
) -> None:
    tag, red, blue = MATRICES[matrix]
    for planes in ((120, 90, 170), (60, 140, 100), (200, 120, 135)):
        frame = np.concatenate(
            [np.full((64, 64), planes[0]), np.full((16, 64), planes[1]), np.full((16, 64), planes[2])]
        )
        path = write_frames(
            tmp_path / "a.mp4", [frame.astype(np.uint8)] * 2, colorspace=tag, color_range=2 if full else 1
        )
        # ITU-R BT.601 and BT.709: E'R = E'Y + 2(1 - kR) E'Cr, E'B = E'Y + 2(1 - kB) E'Cb.
        y, cb, cr = planes[0] / 255, (planes[1] - 128) / 255, (planes[2] - 128) / 255
        if not full:
            y, cb, cr = (planes[0] - 16) / 219, (planes[1] - 128) / 224, (planes[2] - 128) / 224
        r, b = y + 2 * (1 - red) * cr, y + 2 * (1 - blue) * cb
        expected = 255 * np.array([r, (y - red * r - blue * b) / (1 - red - blue), b])
        shown = read_clip(path, 0, 1, size=size)[0].reshape(-1, 3)
        assert np.abs(shown - expected.clip(0, 255)).max() < 1.6


@pytest.mark.parametrize("pixels", ["yuv444p", "yuv422p", "yuv420p10le", "yuv444p10le"])
def test_other_pixel_formats_show_the_same_picture(tmp_path: Path, pixels: str) -> None:
    pictures = list(moving_pictures(4))
    smooth = [np.repeat(p.mean((1, 2), keepdims=True).astype(np.uint8), 48, 1).repeat(3, 2) for p in pictures]
    clip = read_clip(write_frames(tmp_path / "a.mp4", smooth, pixels=pixels), 0, 4)
    assert np.abs(clip.astype(int) - np.stack(smooth)).max() < 4


def test_the_content_of_a_file_reads_like_the_file(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.mkv", "a.avi"):
        path = write_video(tmp_path / name, moving_pictures(40), 25, "mpeg4" if name.endswith("avi") else "libx264")
        np.testing.assert_array_equal(read_clip(path.read_bytes(), 0.4, 6, 8, 16), read_clip(path, 0.4, 6, 8, 16))
    with pytest.raises(VideoError, match=r"a video of 5 bytes: expected a readable video"):
        read_clip(b"bytes")


@pytest.mark.parametrize("stem", ["{:05d}", "im_{:03d}", "50%_{:d}"])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_folder_of_numbered_images_is_a_video_of_24_fps(tmp_path: Path, stem: str, suffix: str) -> None:
    folder = tmp_path / "1%d_dog"
    folder.mkdir()
    pictures = [np.full((32, 48, 3), 20 * k + 10, np.uint8) for k in range(9)]
    for k, picture in enumerate(pictures):
        Image.fromarray(picture).save(folder / (stem.format(k + 1) + suffix))
    info = survey(folder)
    assert (info.num_frames, info.fps, info.width, info.height) == (9, 24, 48, 32)
    clip = read_clip(folder, 1 / info.fps, 4, 12)
    assert np.abs(clip.astype(int) - np.stack(pictures[1:8:2])).max() <= 2
    (folder / (stem.format(4) + suffix)).unlink()
    with pytest.raises(VideoError, match="expected the image") as caught:
        survey(folder)
    assert caught.value.kind == "truncated"


def test_raw_frames_are_read_by_the_size_and_rate_in_their_name(tmp_path: Path) -> None:
    frames = [np.concatenate([np.full((32, 48), 50 + 10 * k), np.full((16, 48), 128)]) for k in range(6)]
    path = tmp_path / "videoSRC01_48x32_24.yuv"
    path.write_bytes(b"".join(frame.astype(np.uint8).tobytes() for frame in frames))
    info = survey(path)
    assert (info.num_frames, info.fps, info.width, info.height) == (6, 24, 48, 32)
    levels = read_clip(path, 0, 3, 12)[:, 10, 10, 0]
    np.testing.assert_allclose(levels, [(50 + 10 * k - 16) * 255 / 219 for k in (0, 2, 4)], atol=1.5)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(VideoError, match=r"whole frames of 2,304 bytes .* got 13,823") as caught:
        survey(path)
    assert caught.value.kind == "truncated"
    unnamed = path.rename(tmp_path / "raw.yuv")
    with pytest.raises(VideoError, match=r"size and rate of raw frames in the file's name"):
        survey(unnamed)


def test_a_clip_may_begin_its_video_again(tmp_path: Path) -> None:
    for name, codec in (("a.avi", "mpeg4"), ("a.mp4", "libx264")):
        path = write_video(tmp_path / name, moving_pictures(7), 25, codec)
        every = np.stack(list(iter_frames(path)))
        looped = read_clip(path, 0, 20, 25, loop=True)
        np.testing.assert_array_equal(looped, every[np.arange(20) % 7])
        np.testing.assert_array_equal(read_clip(path, 0.08, 6, 12.5, loop=True), every[[2, 4, 6, 1, 3, 5]])
        with pytest.raises(VideoError, match="ends after 7 frames") as caught:
            read_clip(path, 0, 20, 25)
        assert caught.value.kind == "short"


def test_timestamps_that_do_not_rise_are_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("rawvideo", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for index, picture in enumerate(moving_pictures(30)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            frame.pts = index
            for packet in stream.encode(frame):
                packet.pts = 40 * ([0, 2, 1][index % 3] + 3 * (index // 3))  # as packed B-frames have them
                packet.dts, packet.time_base = 40 * (index - 2), Fraction(1, 1000)
                container.mux(packet)
    every = np.stack(list(iter_frames(path)))
    assert len(every) == 30
    np.testing.assert_array_equal(read_clip(path, 0, 10, 8), every[[int(k * 25 / 8) for k in range(10)]])


def remuxed(path: Path, target: Path, **options: str) -> Path:
    with av.open(str(path)) as source, av.open(str(target), "w", options=options) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    return target


@pytest.mark.parametrize(
    ("name", "options"), [("a.mp4", {"movflags": "faststart"}), ("a.mkv", {}), ("a.flv", {}), ("a.avi", None)]
)
def test_a_file_that_was_cut_off_is_truncated(tmp_path: Path, name: str, options: dict[str, str] | None) -> None:
    pictures = [np.random.default_rng(k).integers(0, 256, (32, 48, 3), dtype=np.uint8) for k in range(60)]
    if options is None:
        path = write_video(tmp_path / name, pictures, 25, "mpeg4")
    else:
        path = remuxed(write_video(tmp_path / "whole.mp4", pictures, 25), tmp_path / name, **options)
    assert survey(path).num_frames == 60
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(VideoError, match=r"truncated: its header promises") as caught:
        survey(path)
    assert caught.value.kind == "truncated"
    assert 20 < (caught.value.decodable or 0) < 40


def test_frames_that_the_decoder_loses_move_no_others(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi", moving_pictures(40), 25, "mpeg4")
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for k in (10, 11, 12):  # frames that say that they are not coded: the decoder leaves them out without a word
        start = content.index(b"\x00\x00\x01\xb6", packets[k][0])
        content[start + 4 : packets[k][0] + packets[k][1]] = bytes(packets[k][0] + packets[k][1] - start - 4)
    path.write_bytes(content)
    with pytest.raises(VideoError) as caught:
        read_clip(path, 0, 16, 12)
    assert caught.value.kind == "corrupt"


def test_damage_before_or_in_the_clip_is_an_error_and_behind_it_is_not(tmp_path: Path) -> None:
    noise = [np.random.default_rng(k).integers(0, 256, (32, 48, 3), dtype=np.uint8) for k in range(60)]
    path = write_video(tmp_path / "a.avi", noise, 25, "mpeg4", g="1000")
    whole = read_clip(path, 0, 10, 25)
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    middle = packets[30][0] + packets[30][1] // 2
    content[middle : middle + 40] = bytes(range(40))
    path.write_bytes(content)
    np.testing.assert_array_equal(read_clip(path, 0, 10, 25), whole)
    for start in (25, 40):
        with pytest.raises(VideoError) as caught:
            read_clip(path, start / 25, 10, 25)
        assert caught.value.kind == "corrupt"


def test_titles_in_another_encoding_are_read_and_unknown_codecs_named(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", moving_pictures(20), 25)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"Lavf", b"L\xe4vf"))
    assert survey(path).num_frames == 20
    assert read_clip(path, 0, 4, 8).shape == (4, 32, 48, 3)
    path.write_bytes(content.replace(b"avc1", b"zzzz"))
    for read in (survey, probe, read_clip):
        with pytest.raises(VideoError, match="FFmpeg can decode, got an unknown codec"):
            read(path)


def test_the_cover_of_a_song_is_not_a_video(tmp_path: Path) -> None:
    path, cover = tmp_path / "song.mp4", io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(cover, "JPEG")
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000, layout="mono")
        picture = container.add_stream("mjpeg")
        picture.width, picture.height, picture.pix_fmt = 64, 64, "yuvj420p"
        picture.disposition = Disposition.attached_pic
        packet = av.Packet(cover.getvalue())
        packet.stream, packet.pts, packet.dts = picture, 0, 0
        container.mux(packet)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.rate = 16000
        container.mux(sound.encode(silence))
        container.mux(sound.encode(None))
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 1
    for read in (survey, probe, read_clip):
        with pytest.raises(VideoError, match="a file without a video stream"):
            read(path)


@pytest.mark.parametrize("name", ["a.mkv", "a.ts", "a.flv", "a.mov", "a.nut", "fragmented.mp4"])
def test_a_container_changes_no_frame(shared: Path, tmp_path: Path, name: str) -> None:
    source = shared / "data" / "clips" / "mma_demo.mp4"  # with B-frames
    options = {"movflags": "frag_keyframe+empty_moov"} if name == "fragmented.mp4" else {}
    path = remuxed(source, tmp_path / name, **options)
    assert survey(path).num_frames == survey(source).num_frames == 280
    # The last two by seeking; 10 ms aside of where a frame at 28 per second begins, since some count in milliseconds.
    for start in (0.01, 2.51, 7.51):
        np.testing.assert_array_equal(read_clip(path, start, 16, 8, 32), read_clip(source, start, 16, 8, 32))


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_frames": 0}, {"size": 0}, {"size": -5}, {"fps": 0}, {"fps": -3}, {"start": -1}, {"start": float("nan")},
        {"crop": (2, 0.5)},
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense_are_named(tmp_path: Path, arguments: dict[str, Any]) -> None:
    path = write_video(tmp_path / "a.mp4", moving_pictures(20), 25)
    with pytest.raises(VideoError, match=r"a\.mp4: expected (num_frames and size|crop)"):
        read_clip(path, **arguments)


KINDS = {
    "hard/audio_only.mp3": "unreadable", "hard/header_only_300B.avi": "unreadable",
    "hard/text_renamed.avi": "unreadable", "hard/zero_byte.avi": "unreadable",
    "hard/truncated_half_moov_lost.mp4": "unreadable", "hard/truncated_half.avi": "truncated",
    "hard/corrupted.mp4": "corrupt", "hard/h264_raw_error_I_P.264": "corrupt",
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_real_damage_has_its_kind(shared: Path, name: str) -> None:
    path = shared / "data" / "clips" / name
    with pytest.raises(VideoError) as caught:
        list(decode(path)) if survey(path) else None
    assert caught.value.kind == KINDS[name]
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("shape", [(40, 72), (72, 42), (34, 64)])
@pytest.mark.parametrize("size", [16, 31])
def test_the_bilinear_filter_is_torchvisions(tmp_path, shape, size):
    """`Resize(size, antialias=True)` of the picture in single precision, then `CenterCrop(size)`."""
    noise = np.random.default_rng(0).integers(0, 256, (3, *shape, 3), dtype=np.uint8)
    path = write_video(tmp_path / "a.mkv", noise, 25)
    frames = torch.from_numpy(np.stack(decode_all(path)[0])).permute(0, 3, 1, 2)
    expected = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop((size, size))])(frames.float())
    found = read_clip(path, 0, 3, None, size, resize="bilinear")
    assert np.abs(found - expected.permute(0, 2, 3, 1).numpy()).max() < 0.501


@pytest.mark.parametrize("shape", [(40, 72), (72, 42)])
@pytest.mark.parametrize("size", [(18, 32), (32, 18), (40, 20)])
@pytest.mark.parametrize("resize", ["area", "bilinear"])
def test_a_rectangle_is_the_largest_one_at_the_centre(tmp_path, shape, size, resize):
    """Cropped by numpy, then resized whole by the same filter; `bilinear` resizes first, whose edges see more."""
    ramp = np.add.outer(np.arange(shape[0]), np.arange(shape[1]))[None, ..., None] * np.array([1, 2, 0.5])
    path = write_video(tmp_path / "a.mkv", (ramp % 256).astype(np.uint8).repeat(2, 0), 25, codec="ffv1")
    frames = read_clip(path, 0, 2, resize=resize)
    scale = min(shape[0] / size[0], shape[1] / size[1])
    height, width = round(size[0] * scale), round(size[1] * scale)
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    cropped = torch.from_numpy(frames[:, top : top + height, left : left + width]).permute(0, 3, 1, 2).float()
    expected = v2.functional.resize(cropped, list(size), antialias=True).permute(0, 2, 3, 1).numpy()
    found = read_clip(path, 0, 2, None, size, resize=resize)
    assert found.shape == (2, *size, 3)
    inner = np.abs(found - expected)[:, 2:-2, 2:-2]
    assert np.median(inner) < 1.5


@pytest.mark.parametrize("side", [16, 31])
@pytest.mark.parametrize("resize", ["area", "bilinear"])
@pytest.mark.parametrize("name", ["rotate_90.mov", "anamorphic_sar10_11.avi"])
def test_equal_sides_are_the_square(shared, name, resize, side):
    path = shared / "data" / "clips" / "hard" / name
    square, sides = (read_clip(path, 0, 2, None, size, resize=resize) for size in (side, (side, side)))
    np.testing.assert_array_equal(square, sides)


@pytest.mark.parametrize("name", ["rotate_90.mov", "anamorphic_sar10_11.avi", "portrait_160x320.mp4"])
def test_pictures_at_their_own_size_are_the_same_by_both_filters_but_for_their_colours(shared, name):
    path = shared / "data" / "clips" / "hard" / name
    area, bilinear = (read_clip(path, 0, 1, resize=resize) for resize in ("area", "bilinear"))
    assert area.shape == bilinear.shape
    assert np.abs(area.astype(int) - bilinear).mean() < 3
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        if name.startswith("portrait"):  # neither turned nor stretched: swscale's own conversion
            np.testing.assert_array_equal(bilinear[0], frame.to_ndarray(format="rgb24"))


@pytest.mark.parametrize("name", ["rotate_90.mov", "anamorphic_sar10_11.avi", "portrait_160x320.mp4"])
def test_the_bilinear_filter_resizes_pictures_as_they_are_shown(shared, name):
    found, expected = (
        read_clip(shared / "data" / "clips" / "hard" / name, 0, 1, None, 128, resize=resize)[0].astype(float)
        for resize in ("bilinear", "area")
    )
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.95
