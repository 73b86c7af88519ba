"""Which files and folders are videos, whether one has changed, and where this machine keeps what it knows of them."""

import os
import stat
from pathlib import Path


def images_of(folder: Path) -> list[Path]:
    """The images of a folder that is a video, by their names."""
    from vidtwin.video import IMAGE_SUFFIXES

    return sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith("."))


def identity(path: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns: the same as long as a video is the same.

    Of a folder of images both are those of all of them, and a change of names counts. `OSError` if there is no such
    file.
    """
    status = path.stat()
    if not stat.S_ISDIR(status.st_mode):
        return status.st_size, status.st_mtime_ns
    images = [image.stat() for image in images_of(path)]
    changes = (image.st_mtime_ns for image in images)
    return sum(image.st_size for image in images), max([status.st_mtime_ns, *changes])


def cache_home() -> Path:
    """Where what can be found out again is kept: `$VIDTWIN_CACHE`, by default `~/.cache/vidtwin`."""
    home = os.environ.get("VIDTWIN_CACHE") or (os.environ.get("XDG_CACHE_HOME") or "~/.cache") + "/vidtwin"
    return Path(home).expanduser()
