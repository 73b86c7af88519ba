"""Videos that are sound but unusual are read, damaged ones are named, and no file ends the work on the others."""

import errno
import io
import shutil
import tarfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from vidtwin import console
from vidtwin.apply.windows import VideoWindows, examine
from vidtwin.video import VideoError, iter_frames, probe, read_clip, reading, source, survey, write_video
from vidtwin.video.picture import Converter, FilterChain

ORIENTATION = 0x0112  # the tag of EXIF
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: np.rot90(p, 2).swapaxes(0, 1),
    8: lambda p: np.rot90(p),
}


def unpack(shared: Path, archive: str, target: Path) -> Path:
    with tarfile.open(shared / "data" / "odd" / archive) as files:
        files.extractall(target, filter="data")
    return target


def quarters(height: int = 32, width: int = 48) -> np.ndarray:
    """Return a picture whose quarters differ."""
    rows, columns = (np.arange(size) >= size // 2 for size in (height, width))
    return np.stack([rows[:, None] * 200 + 0 * columns, columns * 200 + 0 * rows[:, None],
                     (rows[:, None] ^ columns) * 90], -1).astype(np.uint8)  # fmt: skip


def write_images(folder: Path, count: int = 8, name: str = "{:05d}.png", orientation: int = 1) -> Path:
    """Write numbered images whose level rises by 20; `orientation` is that of EXIF."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        Image.fromarray(quarters() // 2 + 10 * number).save(folder / name.format(number), exif=exif)
    return folder


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_images_are_turned_as_their_exif_says(tmp_path: Path, orientation: int, suffix: str) -> None:
    folder = write_images(tmp_path / "a", 2, f"{{:02d}}.{suffix}", orientation)
    expected = UPRIGHT[orientation](quarters() // 2).astype(int)
    for shown in (next(iter_frames(folder)), read_clip(folder, 0, 1)[0]):
        assert shown.shape == expected.shape
        assert np.abs(shown - expected).mean() < 6


def test_images_of_one_folder_may_be_turned_in_different_ways(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "a", 1)
    write_images(tmp_path / "b", 3, orientation=6)
    (tmp_path / "b" / "00002.png").rename(folder / "00001.png")
    upright, turned = read_clip(folder, 0, 2)  # both have the size of the first one
    assert upright.shape == turned.shape == (32, 48, 3)
    expected = UPRIGHT[6](quarters() // 2 + 20)
    assert [tuple(turned[y, x] // 8) for y in (2, -3) for x in (2, -3)] == [
        tuple(expected[y, x] // 8) for y in (2, -3) for x in (2, -3)
    ]


def test_frames_with_side_data_that_pyav_does_not_know_are_read(shared: Path, tmp_path: Path) -> None:
    folder = unpack(shared, "exif_frames.tar.gz", tmp_path) / "clipA"
    assert len(list(iter_frames(folder))) == survey(folder).num_frames == 20
    camera = shared / "data" / "odd" / "camera_mjpeg_exif.avi"
    assert len(list(iter_frames(camera))) == survey(camera).num_frames == 40


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("31 is not a valid Type"), KeyError("x")])
def test_any_exception_of_a_file_is_an_error_of_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = write_video(tmp_path / "a.mp4", [quarters()] * 4, 25)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Converter, "planes", fail)
    for read in (lambda: list(iter_frames(path)), lambda: read_clip(path, 0, 2), lambda: list(VideoWindows(path, 2))):
        with pytest.raises(VideoError, match=rf"a\.mp4: expected a readable video, {type(error).__name__}: ") as caught:
            read()
        assert caught.value.lasting


def test_only_errors_of_the_system_may_pass() -> None:
    for code, lasting in ((errno.ENOSYS, True), (errno.EOPNOTSUPP, True), (errno.EPERM, True), (errno.EIO, False),
                          (errno.EACCES, False), (errno.EMFILE, False), (errno.ESTALE, False)):  # fmt: skip
        with pytest.raises(av.error.FFmpegError) as caught:
            av.error.err_check(-code)
        assert source.is_lasting(caught.value) == lasting
    assert not source.is_lasting(MemoryError())


def tagged(matrix: int = 1, transfer: int = 1, primaries: int = 1) -> av.VideoFrame:
    frame = av.VideoFrame.from_ndarray(np.full((48, 32), 90, np.uint8), format="yuv420p")
    frame.colorspace, frame.color_trc, frame.color_primaries, frame.color_range = matrix, transfer, primaries, 1
    return frame


def convert(frame: av.VideoFrame, name: str = "a.mp4") -> np.ndarray:
    return FilterChain(name, ("scale", "16:16"), ("format", "gbrp"))(frame).to_ndarray()


@pytest.mark.parametrize(
    ("tags", "like", "described"),
    [
        ({"transfer": 9}, {}, "its matrix"),
        ({"transfer": 10}, {}, "its matrix"),
        ({"transfer": 3, "primaries": 3}, {}, "its matrix"),
        ({"matrix": 8}, {"matrix": 2}, "BT.601"),
        ({"matrix": 3}, {"matrix": 2}, "BT.601"),
        ({"matrix": 10, "transfer": 14, "primaries": 9}, {"matrix": 9}, "BT.2020"),
        ({"matrix": 14, "transfer": 16, "primaries": 9}, {"matrix": 9}, "BT.2020"),
    ],
)
def test_colours_that_ffmpeg_refuses_are_converted_and_named_once(
    tags: dict[str, int], like: dict[str, int], described: str, capsys: pytest.CaptureFixture[str]
) -> None:
    console.log_once.cache_clear()
    for _ in range(2):
        np.testing.assert_array_equal(convert(tagged(**tags)), convert(tagged(**like)))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("vidtwin: a.mp4: FFmpeg can't convert its colours (matrix ")
    assert f"converted by {described}, as if the rest was untagged." in line


@pytest.mark.parametrize("name", ["tag_ycgco.mp4", "tag_trclog.mp4"])
def test_files_with_odd_colour_tags_are_read(shared: Path, name: str) -> None:
    path = shared / "data" / "odd" / name
    assert len(list(iter_frames(path, 32))) == survey(path).num_frames == 40


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "the image 00004.png is empty"), (b"no image" * 9, r"stops after 4 frames at 00004\.png: Invalid data")],
)
def test_an_empty_or_broken_image_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    folder = write_images(tmp_path / "a")
    (folder / "00004.png").write_bytes(content)
    for read in (lambda: list(iter_frames(folder)), lambda: read_clip(folder, 0, 8)):
        with pytest.raises(VideoError, match=message) as caught:
            read()
        assert caught.value.decodable == 4
        assert str(caught.value).startswith(f"{folder}: ")
    (folder / "00006.png").unlink()
    (folder / "00006.png").symlink_to(tmp_path / "nowhere.png")
    parts = VideoWindows(folder, 3)  # the commands use the frames before the damage
    assert [window.num_frames for window in parts] == [3, 1]
    assert "00004.png" in (parts.damage or "")
    (folder / "00004.png").unlink()
    write_images(folder, 6)
    with pytest.raises(VideoError, match=r"the image 00006\.png can't be read: No such file") as caught:
        list(iter_frames(folder))
    (folder / "00000.png").write_bytes(content)
    with pytest.raises(VideoError, match=r"00000\.png"):
        list(iter_frames(folder))


def test_the_frames_before_an_empty_image_are_no_whole_video(shared: Path, tmp_path: Path) -> None:
    folder = unpack(shared, "frames_zero_and_unpadded.tar.gz", tmp_path) / "zero"
    info, error = examine(folder)
    assert info.num_frames == 10
    assert str(error) == f"{folder}: the image 00010.jpg is empty."
    assert probe(folder).num_frames == 20


@pytest.mark.parametrize("name", ["frame{:d}.png", "000{:d}.png", "{:03d}.png"])
def test_images_come_in_the_order_of_their_numbers(tmp_path: Path, name: str) -> None:
    folder = write_images(tmp_path / "a", 13, name)
    assert survey(folder).num_frames == 13
    assert [int(frame[2, 2, 2]) for frame in iter_frames(folder)] == [10 * number for number in range(13)]
    (folder / name.format(11)).unlink()
    with pytest.raises(VideoError, match=r"expected the image .*11\.png, got .*12\.png") as caught:
        survey(folder)
    assert caught.value.kind == "truncated"


@pytest.mark.parametrize("name", ["frame_unpadded", "mispadded"])
def test_numbers_without_leading_zeros_make_a_video(shared: Path, tmp_path: Path, name: str) -> None:
    folder = unpack(shared, "frames_zero_and_unpadded.tar.gz", tmp_path) / name
    assert len(list(iter_frames(folder))) == survey(folder).num_frames == 20


def test_a_wmv_whose_sound_is_longer_than_its_pictures_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.wmv"
    with av.open(str(path), "w") as container:
        pictures, sound = container.add_stream("wmv2", rate=25), container.add_stream("wmav2", rate=44100)
        pictures.width, pictures.height, pictures.pix_fmt = 48, 32, "yuv420p"
        sound.layout, sound.bit_rate = "mono", 64_000
        for number in range(25):
            frame = av.VideoFrame.from_ndarray(quarters(), format="rgb24")
            frame.pts = number
            container.mux(pictures.encode(frame))
        for number in range(80):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), "fltp", "mono")
            silence.rate, silence.pts, silence.time_base = 44100, 2048 * number, Fraction(1, 44100)
            container.mux(sound.encode(silence))
        container.mux(pictures.encode(None))
        container.mux(sound.encode(None))
    assert survey(path).num_frames == 25


def test_mpeg_2_with_a_picture_for_each_field_is_sound(shared: Path, tmp_path: Path) -> None:
    whole = shared / "data" / "odd" / "mpeg2_field_pictures.mpg"
    assert survey(whole).num_frames == 7
    assert len(list(iter_frames(whole, 32))) == 7
    content = bytearray(whole.read_bytes())
    content[60_000:60_040] = bytes(range(40))
    (damaged := tmp_path / "a.mpg").write_bytes(content)
    with pytest.raises(VideoError, match=r"decoding stops after \d frames") as caught:
        list(iter_frames(damaged, 32))
    assert caught.value.kind == "corrupt"
    assert av.logging.get_level() is None


def test_a_file_that_is_known_to_be_unusual_is_opened_once_until_it_changes(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copy(shared / "data" / "odd" / "mpeg2_field_pictures.mpg", tmp_path))
    opened: list[bool] = []
    open_video = reading.open_video
    monkeypatch.setattr(reading, "open_video", lambda s, strict=True: opened.append(strict) or open_video(s, strict))
    clips, counts = [], []
    for _ in range(3):
        clips.append(read_clip(path, 0.0, 6, size=16))
        counts.append((opened.count(True), opened.count(False)))
        opened.clear()
    assert counts == [(1, 1), (0, 1), (0, 1)]
    assert np.array_equal(clips[0], clips[1])
    content = bytearray(path.read_bytes())
    content[60_000:60_040] = bytes(range(40))
    path.write_bytes(content)
    for _ in range(2):  # damage is named as it was
        with pytest.raises(VideoError, match=r"decoding stops after \d frames"):
            read_clip(path, 0.0, 7, size=16)


def test_damage_is_no_less_for_a_harmless_message_after_it() -> None:
    class Packet:
        def decode(self) -> list[av.VideoFrame]:
            for text in ("SEI type 5 size 8 truncated", "error while decoding MB 3 4", "SEI type 5 size 8 truncated"):
                av.logging.log(av.logging.ERROR, "h264", f"{text}\n")
            return []

    for _ in range(2):  # the same for a packet that repeats the messages of the one before
        assert reading._decode_lenient(Packet()) == ([], "error while decoding MB 3 4")
    assert av.logging.get_level() is None


def test_odd_messages_beside_the_pictures_of_h264_are_no_damage(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.h264", [quarters()] * 6, 25)
    content = bytearray(path.read_bytes())
    size = content.index(b"\0\0\1\x06\x05") + 5
    content[size : size + 3] = b"\xff\xff\xff"  # of the encoder's message
    path.write_bytes(content)
    assert survey(path).num_frames == len(list(iter_frames(path))) == 6


def test_a_gif_is_a_video(tmp_path: Path) -> None:
    images = [Image.fromarray(quarters() // 2 + 10 * number) for number in range(6)]
    images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=40)
    info = survey(tmp_path / "a.gif")
    assert (info.num_frames, info.fps) == (6, 25)
    assert [round(int(frame[2, 2, 2]) / 10) for frame in iter_frames(tmp_path / "a.gif")] == list(range(6))


COVER = 64  # its side in pixels


def write_streams(path: Path, *streams: tuple[int, int, int], chosen: int | None = None, cover: bool = False) -> Path:
    """Write ten frames of each stream (width, height, level), which brighten by 5; `chosen` is marked as default."""
    with av.open(str(path), "w") as container:
        if cover:
            picture = container.add_stream("mjpeg")
            picture.width, picture.height, picture.pix_fmt = COVER, COVER, "yuvj420p"
            picture.disposition = Disposition.attached_pic
        added = [container.add_stream("libx264", rate=25) for _ in streams]
        for number, (stream, (width, height, _)) in enumerate(zip(added, streams, strict=True)):
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            if number == chosen:
                stream.disposition = Disposition.default
        if cover:
            content = io.BytesIO()
            Image.new("RGB", (COVER, COVER), "red").save(content, "JPEG")
            packet = av.Packet(content.getvalue())
            packet.stream, packet.pts, packet.dts = picture, 0, 0
            container.mux(packet)
        for number in range(10):
            for stream, (width, height, level) in zip(added, streams, strict=True):
                flat = np.full((height, width, 3), level + 5 * number, np.uint8)
                frame = av.VideoFrame.from_ndarray(flat, "rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
        for stream in added:
            container.mux(stream.encode(None))
    return path


def boxes(content: bytes) -> list[bytes]:
    """Split the content of a box of MP4 into its boxes."""
    found, place = [], 0
    while place < len(content):
        size = int.from_bytes(content[place : place + 4], "big")
        found.append(content[place : place + size])
        place += size
    return found


def check_frames(path: Path, size: tuple[int, int], levels: list[int]) -> None:
    """Check the frames (width, height) that each way of reading gives, by their levels."""
    assert survey(path).num_frames == len(levels)
    assert (probe(path).width, probe(path).height) == size
    for frames in (np.stack(list(iter_frames(path))), read_clip(path, 0, len(levels))):
        assert frames.shape == (len(levels), size[1], size[0], 3)
        np.testing.assert_allclose(frames.mean((1, 2, 3)), levels, atol=2)


def test_a_cover_before_the_video_is_passed_over(tmp_path: Path) -> None:
    path = write_streams(tmp_path / "a.mp4", (48, 32, 40), cover=True)
    *others, index = boxes(path.read_bytes())
    parts = sorted(boxes(index[8:]), key=lambda box: box[4:8] != b"udta")  # which holds the cover
    path.write_bytes(b"".join([*others, index[:8], *parts]))
    with av.open(str(path)) as container:
        assert [stream.width for stream in container.streams.video] == [COVER, 48]
    check_frames(path, (48, 32), list(range(40, 90, 5)))


@pytest.mark.parametrize(("chosen", "size", "level"), [(None, (48, 32), 40), (0, (48, 32), 40), (1, (96, 64), 90)])
def test_of_two_videos_in_a_file_the_one_that_players_show_is_read(
    tmp_path: Path, chosen: int | None, size: tuple[int, int], level: int
) -> None:
    path = write_streams(tmp_path / "a.mkv", (48, 32, 40), (96, 64, 90), chosen=chosen)
    check_frames(path, size, list(range(level, level + 50, 5)))


def test_a_picture_whose_size_changes_keeps_that_of_the_first_frame(tmp_path: Path) -> None:
    parts = [
        write_streams(tmp_path / f"{level}.264", (*size, level)) for level, size in ((40, (48, 32)), (90, (96, 80)))
    ]
    path = tmp_path / "joined.264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    check_frames(path, (48, 32), list(range(40, 140, 5)))
