"""Which files are videos, and whether one has changed."""

import os
from pathlib import Path

import pytest

from vidtwin.datamodules.listing import cache_home, identity


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
