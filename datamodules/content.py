"""Digest the content of videos, to notice one that another replaces under its name.

A file is read once: its digest is stored in the user's cache folder beside the surveys of index.py, and stays valid as
long as the file keeps its size and modification time.
"""

import csv
import hashlib
import io
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from vidtwin.errors import UserError
from vidtwin.files import write_text
from vidtwin.listing import cache_home, identity, images_of
from vidtwin.video import is_lasting

log = logging.getLogger(__name__)

_Known = dict[tuple[str, int, int], str]  # path, size in bytes, modification time in ns → digest


def digest_all(paths: Sequence[Path], show: bool = False) -> list[str]:
    """Return the SHA-256 of each video file, or take it from the cache; "" for one that can't be read.

    That of a folder of images covers their names and contents.

    Args:
        paths: Video files, or folders of images.
        show: Show a progress bar if it takes a while.
    """
    if not paths:
        return []
    folder = os.path.commonpath([path.absolute().parent for path in paths])
    file = cache_home() / f"digests-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]}.tsv"
    known = _read(file)
    keys = [_key(path) for path in paths]
    waiting = {key: path for key, path in zip(keys, paths, strict=True) if key and key not in known}
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        digests = pool.map(_digest, waiting.values())
        bar = tqdm(digests, "reading test videos", len(waiting), disable=None if show else True, delay=1, unit="video")
        known |= {key: digest for key, digest in zip(waiting, bar, strict=True) if digest}
    if waiting:
        _write(file, known)
    return [known.get(key, "") if key else "" for key in keys]


def _key(path: Path) -> tuple[str, int, int] | None:
    try:
        return str(path.absolute()), *identity(path)
    except OSError as error:
        if not is_lasting(error):
            raise _refuse(path, error) from error
        return None  # missing
    except ValueError:  # a name that no file can have
        return None


def _digest(path: Path) -> str:
    try:
        if path.is_dir():
            listing = "".join(f"{image.name}\t{_digest(image)}\n" for image in images_of(path))
            return hashlib.sha256(os.fsencode(listing)).hexdigest()
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise _refuse(path, error) from error


def _refuse(path: Path, error: OSError) -> UserError:
    """Return the error for a failure of the system, which must not become a part of the protocol."""
    return UserError(f"Expected to read {path}, got an error of the system: {error.strerror or error}; try again.")


def _read(file: Path) -> _Known:
    try:
        with file.open(newline="", encoding="utf-8") as handle:
            rows = csv.reader(handle, dialect="excel-tab")
            return {(path, int(size), int(changed)): digest for path, size, changed, digest in rows}
    except (OSError, ValueError) as error:
        if not isinstance(error, FileNotFoundError):
            log.info("%s is not used: %s", file, error)
        return {}


def _write(file: Path, known: _Known) -> None:
    latest = {path: (path, size, changed, digest) for (path, size, changed), digest in known.items()}
    buffer = io.StringIO()
    csv.writer(buffer, dialect="excel-tab", lineterminator="\n").writerows(latest.values())
    try:
        write_text(file, buffer.getvalue())
    except (OSError, UnicodeEncodeError) as error:  # a read-only home, a name that is not UTF-8
        log.info("%s is not written: %s", file, error)
