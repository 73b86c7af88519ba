"""Which files and folders are videos and which are left out, whether one has changed, where this machine keeps that."""

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from vidtwin.errors import UserError

_NUMBERED = re.compile(r"\d\.\w+$")  # the end of an image's name in a sequence: 00000.jpg, frame_1.png


def walk(root: Path, links: bool = True) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Each folder from `root` on, its folders and its files, as `os.walk` gives them, without hidden ones.

    Links to folders are followed, after all that is not behind a link, and no folder comes twice, whichever way leads
    to it; with `links` false they are not. Hidden are names that begin with a dot: what macOS copies beside files, and
    files that are half-written.
    """
    seen: set[tuple[int, int]] = set()
    tops = [str(root)]
    for top in tops:  # which grows
        for place, folders, files in os.walk(top):
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            yield Path(place), folders, sorted(name for name in files if not is_hidden(name))
            if links:
                tops += (path for name in folders if os.path.islink(path := os.path.join(place, name)))


def is_hidden(name: str) -> bool:
    return name.startswith(".")


def is_text(name: str) -> bool:
    """Whether a name is one of characters; to Linux names are bytes, and those that are no UTF-8 are none."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def find_videos(root: Path, image_folders: bool) -> tuple[list[Path], Counter[str]]:
    """The videos under a folder, sorted, and the suffixes of the files that are none.

    Args:
        root: Folder.
        image_folders: A folder below `root` that holds numbered images and no video is a video too, and its subfolders
            are not searched.
    """
    from vidtwin.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES

    paths: list[Path] = []
    others: Counter[str] = Counter()
    for place, folders, files in walk(root):
        suffixes = [os.path.splitext(file)[1].lower() for file in files]
        videos = [place / file for file, suffix in zip(files, suffixes, strict=True) if suffix in VIDEO_SUFFIXES]
        images = [file for file, suffix in zip(files, suffixes, strict=True) if suffix in IMAGE_SUFFIXES]
        paths += videos
        if image_folders and not videos and place != root and any(map(_NUMBERED.search, images)):
            paths.append(place)
            folders.clear()
            suffixes = [suffix for suffix in suffixes if suffix not in IMAGE_SUFFIXES]
        others.update(suffix or "without a suffix" for suffix in suffixes if suffix not in VIDEO_SUFFIXES)
    return sorted(paths), others


def has_numbered_images(folder: Path) -> bool:
    """Whether a folder may be a video itself."""
    return any(_NUMBERED.search(image.name) for image in images_of(folder))


def images_of(folder: Path) -> list[Path]:
    """The images of a folder that is a video, by their names."""
    from vidtwin.video import IMAGE_SUFFIXES

    return sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(f.name))


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


def excluded_names(file: Path) -> set[str]:
    """Names of an exclusion list."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"Expected a list of videos to leave out at {file}, there is none; set data.exclude.") from None
    return {line.partition("\t")[0] for line in lines if line.strip() and not line.startswith("#")}
