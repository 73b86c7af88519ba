"""Survey the videos of a data set once, in parallel, and cache the results.

All ranks have to know the usable videos before the first batch, since the length of an epoch depends on them. `survey`
demuxes a file, which takes a tenth of decoding it; the results are stored in the user's cache folder (`$VIDTWIN_CACHE`,
by default `~/.cache/vidtwin`) and stay valid as long as a video keeps its size and modification time.
"""

import csv
import hashlib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

import torch
from tqdm import tqdm

from vidtwin.files import write_text
from vidtwin.listing import cache_home, identity
from vidtwin.video import VideoError, VideoInfo, survey
from vidtwin.video.source import Kind

from .loader import WorkerLoader

log = logging.getLogger(__name__)

_VERSION = 3  # to be raised when `survey` returns something else for the same file
_FEW = 64  # files that are surveyed without starting processes


@dataclass(frozen=True)
class Fault:
    """The reason why a video can't be used.

    Attributes:
        kind: As of `VideoError`.
        reason: One line without the file's name.
        lasting: As of `VideoError`.
    """

    kind: Kind
    reason: str
    lasting: bool = True

    @classmethod
    def of(cls, error: VideoError, path: Path) -> "Fault":
        """Take the fault of the video at `path` from an error."""
        text = str(error).removeprefix(f"{path}: ").removeprefix(f"{path.absolute()}: ")
        return cls(error.kind, text.strip().rstrip("."), error.lasting)

    @property
    def broken(self) -> bool:
        """Return whether the file is at fault, not the choice of clips."""
        return self.kind in ("unreadable", "truncated", "corrupt")


Survey = VideoInfo | Fault
_Key = tuple[int, int]  # size in bytes and modification time in ns


def survey_all(paths: Sequence[Path], workers: int = 1, show: bool = False) -> list[Survey]:
    """Survey each video, or take the result from the cache.

    Args:
        paths: Video files, or folders of images.
        workers: Processes to survey with.
        show: Show a progress bar if it takes a while.
    """
    if not paths:
        return []
    file = _cache_file(paths)
    cached = _read(file)
    paths = [path.absolute() for path in paths]
    keys = [_key(path) for path in paths]
    missing = Fault("unreadable", "there is no such file")
    waiting = {
        path: key for path, key in zip(paths, keys, strict=True) if key and cached.get(str(path), ((), ()))[0] != key
    }
    for (path, key), found in zip(waiting.items(), _survey(list(waiting), workers, show), strict=True):
        cached[str(path)] = (key, found)
    if waiting:
        _write(file, cached)
    return [missing if key is None else cached[str(path)][1] for path, key in zip(paths, keys, strict=True)]


def _survey(paths: list[Path], workers: int, show: bool) -> Iterator[Survey]:
    loader = WorkerLoader(
        paths,  # type: ignore[arg-type]
        batch_size=16,
        num_workers=workers if len(paths) > _FEW else 0,
        collate_fn=_survey_each,
        generator=torch.Generator(),  # or what draws after this would depend on whether the cache knew the videos
    )
    shown = {"desc": "surveying videos", "unit": "video", "delay": 1, "dynamic_ncols": True}
    with tqdm(total=len(paths), disable=None if show else True, **shown) as bar:
        for batch in loader:
            yield from batch
            bar.update(len(batch))


def _survey_each(paths: list[Path]) -> list[Survey]:
    return [_survey_one(path) for path in paths]


def _survey_one(path: Path) -> Survey:
    try:
        return survey(path)
    except VideoError as error:
        return Fault.of(error, path)


def _key(path: Path) -> _Key | None:
    try:
        return identity(path)
    except (OSError, ValueError):  # missing, or a name that no file can have
        return None


def _cache_file(paths: Sequence[Path]) -> Path:
    """Return the cache of a data set: one file per common folder of videos."""
    folder = os.path.commonpath([os.path.abspath(path.parent) for path in paths])
    return cache_home() / f"videos-{hashlib.sha256(folder.encode()).hexdigest()[:16]}.tsv"


def _read(file: Path) -> dict[str, tuple[_Key, Survey]]:
    """Read earlier surveys by path; none if the file is missing, damaged or of another version."""
    cached: dict[str, tuple[_Key, Survey]] = {}
    try:
        with file.open(newline="", encoding="utf-8") as handle:
            rows = csv.reader(handle, dialect="excel-tab")
            if next(rows, None) != [str(_VERSION)]:
                return {}
            for path, size, changed, kind, *values in rows:
                found: Survey
                if kind:
                    found = Fault(cast(Kind, kind), values[0])
                else:
                    count, fps, duration, width, height = values
                    found = VideoInfo(Path(path), int(count), Fraction(fps), float(duration), int(width), int(height))
                cached[path] = ((int(size), int(changed)), found)
    except (OSError, ValueError) as error:
        if not isinstance(error, FileNotFoundError):
            log.info("%s is not used: %s", file, error)
        return {}
    return cached


def _write(file: Path, cached: dict[str, tuple[_Key, Survey]]) -> None:
    buffer = io.StringIO()
    rows = csv.writer(buffer, dialect="excel-tab", lineterminator="\n")
    rows.writerow([_VERSION])
    for path, (key, found) in cached.items():
        if isinstance(found, Fault):
            if not found.lasting:
                continue
            rows.writerow([path, *key, found.kind, found.reason])
        else:
            values = (found.num_frames, found.fps, found.duration, found.width, found.height)
            rows.writerow([path, *key, "", *values])
    try:
        write_text(file, buffer.getvalue())
    except (OSError, UnicodeEncodeError) as error:  # a read-only home, a name that is not UTF-8
        log.info("%s is not written: %s", file, error)
