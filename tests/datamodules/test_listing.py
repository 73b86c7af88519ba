"""Lists of videos, and detection of changed ones."""

import os
import shutil
from pathlib import Path

import pytest

from vidtwin.datamodules.doctor import command as doctor
from vidtwin.datamodules.folder import VideoFolder
from vidtwin.datamodules.ucf101 import UCF101
from vidtwin.listing import cache_home, find_videos, identity


def write(path: Path, text: str, changed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, ns=(changed, changed))
    return path


def test_a_video_is_the_same_as_long_as_size_and_time_are(tmp_path: Path) -> None:
    video = write(tmp_path / "a.mp4", "12345", 7_000_000_001)
    assert identity(video) == (5, 7_000_000_001)
    (tmp_path / "link.mp4").symlink_to(video)
    assert identity(tmp_path / "link.mp4") == identity(video)
    with pytest.raises(FileNotFoundError):
        identity(tmp_path / "absent.mp4")


def test_a_folder_of_images_is_known_by_all_of_them(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    for number in range(3):
        write(folder / f"{number}.PNG", "12345", 5_000_000_000)
    write(folder / "._0.png", "left by a copy from a Mac", 9_000_000_000)
    write(folder / "notes.txt", "no image", 9_000_000_000)
    os.utime(folder, ns=(6_000_000_000, 6_000_000_000))
    assert identity(folder) == (15, 6_000_000_000)
    write(folder / "1.PNG", "54321", 7_000_000_000)
    assert identity(folder) == (15, 7_000_000_000)
    (folder / "2.PNG").rename(folder / "3.PNG")
    size, changed = identity(folder)
    assert size == 15
    assert changed > 7_000_000_000
    for path in folder.iterdir():
        path.unlink()
    assert identity(folder)[0] == 0


def test_the_cache_is_where_its_variables_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VIDTWIN_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_home() == tmp_path
    monkeypatch.setenv("VIDTWIN_CACHE", "")
    assert cache_home() == Path("/xdg/vidtwin")
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # as if it were not set, says its specification
    assert cache_home() == Path.home() / ".cache" / "vidtwin"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_home() == Path.home() / ".cache" / "vidtwin"


def test_videos_of_cameras_and_gifs_are_seen_in_folders(tmp_path: Path) -> None:
    for name in ("00000.MTS", "a.m2ts", "b.gif", "c.txt"):
        write(tmp_path / name, "", 0)
    assert [path.name for path in find_videos(tmp_path, image_folders=True)[0]] == ["00000.MTS", "a.m2ts", "b.gif"]


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A tree with links to folders beside it, above it, in it and to nowhere, and with hidden files."""
    root, store = tmp_path / "root", tmp_path / "store"
    for name in (
        "real/a.mp4",
        "real/._a.mp4",
        "real/.b-abcdefgh.mp4",
        ".cache/c.mp4",
        "real/notes.txt",
        "real/.DS_Store",
    ):
        write(root / name, "", 0)
    for name in ("far/d.mp4", "far/deep/e.MP4", "far/deep/._e.mp4"):
        write(store / name, "", 0)
    write(tmp_path / "images" / "0001.jpg", "", 0)
    write(tmp_path / "images" / "._0001.jpg", "", 0)
    (root / "alias").symlink_to("real")  # comes before it, and yet does not take its place
    (root / "class").symlink_to(store / "far")
    (store / "far/back").symlink_to(root)
    (store / "far/round").symlink_to(".")
    (root / "frames").symlink_to(tmp_path / "images")
    (root / "real/gone.mp4").symlink_to(tmp_path / "gone.mp4")
    (root / "gone").symlink_to(tmp_path / "gone")
    return root


def test_links_to_folders_are_followed_and_what_is_hidden_is_left_out(linked: Path) -> None:
    names = ["class/d.mp4", "class/deep/e.MP4", "real/a.mp4", "real/gone.mp4"]
    paths, others = find_videos(linked, image_folders=False)
    assert [path.relative_to(linked).as_posix() for path in paths] == names
    assert dict(others) == {".txt": 1, ".jpg": 1, "without a suffix": 1}  # of them a link to nowhere
    for images in (False, True):
        expected = sorted([*names, "frames"]) if images else names
        assert sorted(doctor.find_videos(linked, images)[0]) == expected
        folder = VideoFolder(str(linked), None, 0, 1, image_folders=images)
        assert [video.name for video in folder.videos("test")] == expected


def test_ucf_101_may_have_linked_classes_and_hidden_files(small_ucf: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(small_ucf / "UCF-101", tmp_path / "UCF-101"))
    expected = [video.name for video in UCF101(str(root)).videos("train")]
    (root / "Drift").rename(tmp_path / "Drift")
    (root / "Drift").symlink_to(tmp_path / "Drift")
    (root / "Bounce/._v_Bounce_g09_c01.avi").touch()
    (root / ".trash").mkdir()
    (root / ".trash/v_Bounce_g09_c01.avi").touch()
    assert [video.name for video in UCF101(str(root)).videos("train")] == expected
