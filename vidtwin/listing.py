"""Find videos in folders, read lists of them, detect changed files, and locate the cache."""

import codecs
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from vidtwin.console import log_once
from vidtwin.errors import UserError

_NUMBERED = re.compile(r"\d\.\w+$")  # the end of an image's name in a sequence: 00000.jpg, frame_1.png
_GROUPED = re.compile(r"([^/]*_g(\d+))_c\d+(\.\w+)?$")  # a clip of a group of UCF-101


def source_of(video: str) -> str:
    """Name the source of a video: its group if it is named as in UCF-101 (`v_Archery_g01_c02.avi`), else the video.

    Clips of a group are cut from one recording.
    """
    found = _GROUPED.search(video)
    return found[1] if found else video


def find_group(video: str) -> int | None:
    """Return the number of the group of a video that is named as in UCF-101; None for other names."""
    found = _GROUPED.search(video)
    return int(found[2]) if found else None


def walk(root: Path, links: bool = True) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Walk a tree as `os.walk` does, without hidden names: yield each folder, its subfolders and its files.

    Hidden names begin with a dot: the files that macOS copies beside others, and files that are still being written.

    Args:
        root: Folder to start from.
        links: Follow links to folders, after everything that is not behind a link. No folder is visited twice, however
            many paths lead to it.
    """
    seen: set[tuple[int, int]] = set()
    tops = [str(root)]
    for top in tops:  # grows while it is iterated
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
    """Return whether a file name is hidden."""
    return name.startswith(".")


def is_text(name: str) -> bool:
    """Return whether a name is valid UTF-8; Linux allows any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def find_videos(root: Path, image_folders: bool) -> tuple[list[Path], Counter[str]]:
    """Return the videos under a folder, sorted, and a count of the other files' suffixes.

    Args:
        root: Folder to search.
        image_folders: Treat a folder below `root` that holds numbered images and no video as a video, and do not
            search its subfolders.
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


def images_of(folder: Path) -> list[Path]:
    """List the images of a folder that is a video, sorted by name."""
    from vidtwin.video import IMAGE_SUFFIXES

    return sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(f.name))


def identity(path: Path) -> tuple[int, int]:
    """Return the size in bytes and the modification time in ns of a video, which change whenever the video does.

    For a folder of images both cover all images; renaming one counts as a change.

    Raises:
        OSError: The file does not exist.
    """
    status = path.stat()
    if not stat.S_ISDIR(status.st_mode):
        return status.st_size, status.st_mtime_ns
    images = [image.stat() for image in images_of(path)]
    changes = (image.st_mtime_ns for image in images)
    return sum(image.st_size for image in images), max([status.st_mtime_ns, *changes])


def encoding_of(file: Path) -> str:
    """Return the encoding of a text that may come from anywhere: UTF-8, UTF-16 if it begins with its mark, or Latin-1.

    Latin-1 is a guess, which is logged once.

    Raises:
        FileNotFoundError: There is no such file.
        UserError: It begins like UTF-16 and is not, or it is damaged UTF-8: some of its words are UTF-8, others not.
    """
    with file.open("rb") as handle:
        wide = handle.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        handle.seek(0)
        try:
            for _ in codecs.iterdecode(iter(lambda: handle.read(1 << 20), b""), "utf-16" if wide else "utf-8"):
                pass
        except UnicodeError as error:
            if wide:
                raise UserError(f"{file}: expected a text, got damaged UTF-16 ({error}); save it as UTF-8.") from None
            handle.seek(0)
            _check_latin(file, handle)
            return "latin-1"
    return "utf-16" if wide else "utf-8-sig"


def _check_latin(file: Path, lines: Iterable[bytes]) -> None:
    """Log the first line that is not UTF-8; raise `UserError` if other bytes beyond ASCII are."""
    first: tuple[int, bytes] | None = None
    some = False
    for number, line in enumerate(lines, 1):
        text = line.decode(errors="surrogateescape")  # a byte that is not UTF-8 becomes U+DC80 to U+DCFF
        if first is None and not is_text(text):
            first = number, line
        some = some or any(character > "\x7f" and not "\udc80" <= character <= "\udcff" for character in text)
    assert first is not None
    number, line = first
    shown = ascii(line.decode("latin-1").strip())[:100]
    if some:
        raise UserError(
            f"{file}: expected one encoding, got a line {number} that is not UTF-8 ({shown}) and others that are; "
            "save it as UTF-8."
        )
    log_once(f"{file}: line {number} is not UTF-8 ({shown}): the file is read as Latin-1", rank_zero=True)


def read_lines(file: Path) -> list[str]:
    """Read the lines of a text that are not empty, without their ends; encoding and errors as of `encoding_of`."""
    with file.open(encoding=encoding_of(file)) as handle:
        return [line.rstrip("\n") for line in handle if line.strip()]


def cache_home() -> Path:
    """Return the folder of files that can be recomputed: `$VIDTWIN_CACHE`, by default `~/.cache/vidtwin`."""
    home = os.environ.get("VIDTWIN_CACHE") or (os.environ.get("XDG_CACHE_HOME") or "~/.cache") + "/vidtwin"
    return Path(home).expanduser()


def excluded_names(file: Path) -> set[str]:
    """Read the video names of an exclusion list.

    Raises:
        UserError: The file does not exist.
    """
    try:
        lines = read_lines(file)
    except FileNotFoundError:
        raise UserError(f"Expected a list of videos to exclude at {file}, got no file; set data.exclude.") from None
    return {line.partition("\t")[0] for line in lines if not line.startswith("#")}
