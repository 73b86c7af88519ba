"""What is in the videos of a data set: surveyed once, in parallel, and remembered.

Which videos can be used has to be known before the first batch, on all ranks alike: the length of an epoch depends on
it. `survey` demuxes a file, which takes a tenth of decoding it; the results are kept in a file of the user's cache
folder (`$VIDTWIN_CACHE`, by default `~/.cache/vidtwin`) and hold as long as a video keeps its size and time of change.
"""

import csv
import hashlib
import io
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from vidtwin.files import write_text
from vidtwin.listing import cache_home, identity
from vidtwin.video import VideoError, VideoInfo, survey
from vidtwin.video.source import Kind

from .loader import WorkerLoader

log = logging.getLogger(__name__)

_VERSION = 2  # to be raised when `survey` says something else of the same file
_FEW = 64  # files that are surveyed without starting processes


@dataclass(frozen=True)
class Fault:
    """Why a video can't be used.

    Attributes:
        kind: "unreadable", "truncated" and "corrupt" are faults of the file; "short" and "slow" only hold it against
            the clips that were asked for.
        reason: For people: a line without the file's name.
        lasting: Whether it is there the next time too; not where a disk or a network failed.
    """

    kind: Kind
    reason: str
    lasting: bool = True

    @classmethod
    def of(cls, error: VideoError, path: Path) -> "Fault":
        text = str(error).removeprefix(f"{path}: ").removeprefix(f"{path.absolute()}: ")
        return cls(error.kind, text.strip().rstrip("."), error.lasting)

    @property
    def broken(self) -> bool:
        return self.kind in ("unreadable", "truncated", "corrupt")


Finding = VideoInfo | Fault
_Key = tuple[int, int]  # size in bytes and time of change in ns


def survey_all(paths: Sequence[Path], workers: int = 1, show: bool = False) -> list[Finding]:
    """`survey` of each video, from the cache where it is known.

    Args:
        paths: Video files, or folders of images.
        workers: Processes to survey with.
        show: Show a progress bar where it takes a while.
    """
    if not paths:
        return []
    file = _cache_file(paths)
    known = _read(file)
    paths = [path.absolute() for path in paths]
    keys = [_key(path) for path in paths]
    absent = Fault("unreadable", "there is no such file")
    waiting = {
        path: key for path, key in zip(paths, keys, strict=True) if key and known.get(str(path), ((), ()))[0] != key
    }
    for (path, key), finding in zip(waiting.items(), _survey(list(waiting), workers, show), strict=True):
        known[str(path)] = (key, finding)
    if waiting:
        _write(file, known)
    return [absent if key is None else known[str(path)][1] for path, key in zip(paths, keys, strict=True)]


def _survey(paths: list[Path], workers: int, show: bool) -> list[Finding]:
    if len(paths) <= _FEW or workers < 1:
        return [_survey_one(path) for path in paths]
    loader = WorkerLoader(
        _Surveys(paths),
        batch_size=16,
        num_workers=workers,
        collate_fn=list,
        generator=torch.Generator(),  # or what draws after this would depend on whether the cache knew the videos
    )
    findings = []
    with tqdm(
        total=len(paths),
        desc="surveying videos",
        unit="video",
        disable=None if show else True,
        delay=1,
        dynamic_ncols=True,
    ) as bar:
        for batch in loader:
            findings += batch
            bar.update(len(batch))
    return findings


class _Surveys(Dataset[Finding]):
    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Finding:
        return _survey_one(self.paths[index])


def _survey_one(path: Path) -> Finding:
    try:
        return survey(path)
    except VideoError as error:
        return Fault.of(error, path)


def _key(path: Path) -> _Key | None:
    try:
        return identity(path)
    except OSError:
        return None


def _cache_file(paths: Sequence[Path]) -> Path:
    """One file for each folder that holds data sets or parts of one."""
    folder = os.path.commonpath([os.path.abspath(path.parent) for path in paths])
    return cache_home() / f"videos-{hashlib.sha256(folder.encode()).hexdigest()[:16]}.tsv"


def _read(file: Path) -> dict[str, tuple[_Key, Finding]]:
    """What was found earlier, by path; nothing where the file is not there or is another version's."""
    known: dict[str, tuple[_Key, Finding]] = {}
    try:
        with file.open(newline="", encoding="utf-8") as handle:
            rows = csv.reader(handle, dialect="excel-tab")
            if next(rows, None) != [str(_VERSION)]:
                return {}
            for path, size, changed, kind, *values in rows:
                finding: Finding
                if kind:
                    finding = Fault(cast(Kind, kind), values[0])
                else:
                    count, fps, duration, width, height = values
                    finding = VideoInfo(Path(path), int(count), Fraction(fps), float(duration), int(width), int(height))
                known[path] = ((int(size), int(changed)), finding)
    except (OSError, ValueError) as error:
        if not isinstance(error, FileNotFoundError):
            log.info("%s is not used: %s", file, error)
        return {}
    return known


def _write(file: Path, known: dict[str, tuple[_Key, Finding]]) -> None:
    buffer = io.StringIO()
    rows = csv.writer(buffer, dialect="excel-tab", lineterminator="\n")
    rows.writerow([_VERSION])
    for path, (key, finding) in known.items():
        if isinstance(finding, Fault):
            if not finding.lasting:
                continue
            rows.writerow([path, *key, finding.kind, finding.reason])
        else:
            values = (finding.num_frames, finding.fps, finding.duration, finding.width, finding.height)
            rows.writerow([path, *key, "", *values])
    try:
        write_text(file, buffer.getvalue())
    except (
        OSError,
        UnicodeEncodeError,
    ) as error:  # a read-only home, a name that is no text
        log.info("%s is not written: %s", file, error)
