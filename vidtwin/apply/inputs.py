"""Find the videos of a command's arguments, and check the files to write. Imports no torch."""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vidtwin import console
from vidtwin.errors import UserError
from vidtwin.listing import find_videos


@dataclass(frozen=True)
class Input:
    """A video.

    Attributes:
        path: File, or folder of numbered images.
        name: Unique path of its outputs below their folder, without a suffix: "a", or "class/a" of a folder.
    """

    path: Path
    name: str


def find(given: Sequence[str | Path]) -> list[Input]:
    """Find videos: files, folders (all videos below them) and globs, sorted within each, each file once.

    Raises:
        UserError: A file is missing, a folder or glob has no video, or two videos have the same name.
    """
    found: dict[Path, Path] = {}  # resolved → as given
    below: dict[Path, Path] = {}  # resolved → folder from which its name starts
    for word in given:
        for path, root in _expand(Path(word)):
            real = path.resolve()
            if real not in found:
                found[real], below[real] = path, root
    if not found:
        raise UserError("Expected videos: files, folders or globs, got none.")
    whole = {real: path.relative_to(below[real]).as_posix() for real, path in found.items()}
    stems = {real: os.path.splitext(name)[0] if found[real].is_file() else name for real, name in whole.items()}
    counts = Counter(stems.values())
    names = {real: stem if counts[stem] == 1 else whole[real] for real, stem in stems.items()}
    counts = Counter(names.values())
    for name, count in counts.items():
        if count > 1:
            same = [str(found[real]) for real in names if names[real] == name]
            raise UserError(
                f"Expected inputs of different names, got {', '.join(same[:3])}; give a folder that holds them all."
            )
    return [Input(found[real], name) for real, name in names.items()]


def check_classes(inputs: Iterable[Input]) -> None:
    """Raise `UserError` unless each video is in a folder, which names its class."""
    for entry in inputs:
        if "/" not in entry.name:
            raise UserError(
                f"Expected each video in a folder of its class for --labels folders, got {entry.path}; give the folder "
                "that holds the classes."
            )


def log_existing(existing: int, found: int, folder: str | Path) -> None:
    """Log how many of the inputs --skip_existing left out, if any."""
    if existing:
        console.log(f"{existing:,} of {found:,} outputs exist in {folder} and were skipped")


def target(out: str | Path, name: str, suffix: str) -> Path:
    """Return the path of an output, such as `OUT/class/a.mp4`. (`with_suffix` would cut "a.b".)"""
    return Path(out) / f"{name}{suffix}"


def check_folder(path: str | Path) -> None:
    """Raise `UserError` if `path` can't be a folder of outputs: it or a parent is a file or may not be written."""
    folder = Path(path)
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        inside = "" if there == folder else f" for {folder}"
        raise UserError(f"Expected --out to be a folder, got the file {there}{inside}.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"Expected --out to be a folder that may be written, got {folder}: no right to write in {there}."
        )


def check_targets(
    targets: Iterable[Path], inputs: Iterable[Input] = (), overwrite: bool = False, may_skip: bool = False
) -> None:
    """Raise `UserError` if a file to write is an input, or exists and may not be replaced.

    `may_skip` says that the command has --skip_existing, which the message then names.
    """
    sources = {entry.path.resolve(): entry.path for entry in inputs}
    there = []
    for path in targets:
        if (source := sources.get(path.resolve())) is not None:
            raise UserError(f"Expected --out to be another folder than that of {source}, which would be replaced.")
        if path.exists():
            there.append(path)
    if there and not overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        keep = "--skip_existing makes the others, " if may_skip else ""
        raise UserError(
            f"Expected outputs that do not exist yet, got {there[0]}{more}; {keep}--overwrite replaces them."
        )


def _expand(path: Path) -> list[tuple[Path, Path]]:
    """Return the videos of an argument, each with the folder from which its name starts."""
    if path.is_dir():
        return _search_folder(path)
    if path.is_file():
        return [(path, path.parent)]
    if glob.has_magic(str(path)):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if matches:
            return [entry for match in matches for entry in _expand(match)]
        raise UserError(f"Expected files that {path} matches, got none.")
    if path.parent.is_dir():
        near = sorted(entry.name for entry in path.parent.iterdir() if path.suffix and entry.suffix == path.suffix)[:5]
        among = f"; in its folder are {', '.join(near)}" if near else ""
    else:
        among = f"; the folder {path.parent} does not exist"
    raise UserError(f"Expected a video at {path}, got no such file{among}.")


def _search_folder(folder: Path) -> list[tuple[Path, Path]]:
    videos, others = find_videos(folder, image_folders=True)
    if videos:
        return [(video, folder) for video in videos]
    # The folder itself may be a video: numbered images and nothing below it.
    inside, _ = (
        find_videos(folder.parent, image_folders=True) if folder.resolve() != folder.resolve().parent else ([], 0)
    )
    if folder in inside:
        return [(folder, folder.parent)]
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(4)) or "nothing"
    raise UserError(f"Expected videos in {folder}, got {kinds}.")
