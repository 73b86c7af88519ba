"""UCF-101's official lists: find, read and check them."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from vidtwin.datamodules.lists import find_repeated
from vidtwin.errors import UserError, few
from vidtwin.listing import read_lines

# Videos in the train and the test list of each split.
OFFICIAL = {1: (9537, 3783), 2: (9586, 3734), 3: (9624, 3696)}
CLASSES = 101
VALIDATION_GROUPS = (24, 25)  # of the train lists, held out by default
KINDS = ("train", "test")
FILES = ("classInd.txt", *(f"{kind}list{split:02d}.txt" for split in OFFICIAL for kind in KINDS))
VIDEO_FILE = re.compile(r"v_\w+_g(\d\d)_c\d\d\.avi")
_ENTRY = re.compile(r"\s*(.+?\.avi|\S+)(?:\s+(\d+))?\s*")  # names of classes may have spaces
_CLASS = re.compile(r"\s*(\d+)\s+(.+?)\s*")


def class_root(folder: Path) -> Path:
    """Return the folder of the class folders: `folder` itself, or the `UCF-101` in it."""
    nested = folder / "UCF-101"
    return nested if nested.is_dir() else folder


def find_lists(root: Path) -> Path | None:
    """Find the folder `ucfTrainTestlist` beside `root`, the folder of the class folders, or in it."""
    places = (root.parent / "ucfTrainTestlist", root / "ucfTrainTestlist")
    return next((place for place in places if place.is_dir()), None)


def parse_entry(line: str) -> tuple[str, int | None]:
    """Return name and number of the class, if there is one, of a line `CLASS/v_CLASS_g01_c01.avi 1`."""
    match = _ENTRY.fullmatch(line)
    return (match[1], int(match[2]) if match[2] else None) if match else (line.strip(), None)


def read_classes(path: Path) -> dict[str, int]:
    """Read the classes' numbers from classInd.txt; `UserError` for an invalid or repeated line."""
    lines = read_lines(path)
    pairs = [(match[2], int(match[1])) for match in map(_CLASS.fullmatch, lines) if match]
    if len(pairs) < len(lines):
        wrong = next(line for line in lines if not _CLASS.fullmatch(line))
        raise UserError(f"{path}: expected lines of a number and a class, got {wrong!r}; correct the file.")
    for repeated in (find_repeated(name for name, _ in pairs), find_repeated(str(number) for _, number in pairs)):
        if repeated:
            raise UserError(f"{path}: expected each class once, {few(repeated)} come twice or more; correct the file.")
    return dict(pairs)


def number_from_0(classes: dict[str, int]) -> dict[str, int]:
    """Return labels from 0 of classes whose numbers begin with 1, as the official ones do, or with 0."""
    first = 0 if 0 in classes.values() else 1
    return {name: number - first for name, number in classes.items()}


def find_mislabelled(entries: Iterable[tuple[str, int | None]], classes: dict[str, int]) -> list[str]:
    """Return the names of entries with another number than their class has."""
    return [name for name, number in entries if number not in (None, classes.get(name.split("/")[0], number))]


def group_of(name: str) -> tuple[str, int] | None:
    """Return class folder and group of a video `CLASS/v_CLASS_g01_c01.avi`; None for other names."""
    folder, _, file = name.partition("/")
    match = VIDEO_FILE.fullmatch(file)
    return (folder, int(match[1])) if match else None


def describe_names(names: Sequence[str], problem: str) -> list[str]:
    """Describe a problem by its count and a few names: a list of one line, or of none if there are no names."""
    return [f"{len(names):,} {problem} ({few(names)})"] if names else []


@dataclass(frozen=True)
class Lists:
    """The official lists.

    Attributes:
        lines: By file, without line ends and empty lines.
        classes: Their numbers, from 1.
        names: By split and kind ("train" or "test"): `CLASS/v_CLASS_g01_c01.avi`.
    """

    lines: dict[str, list[str]]
    classes: dict[str, int]
    names: dict[tuple[int, str], list[str]]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read all files of a folder, which has them."""
        lines = {file: read_lines(folder / file) for file in FILES}
        names = {
            (split, kind): [parse_entry(line)[0] for line in lines[f"{kind}list{split:02d}.txt"]]
            for split in OFFICIAL
            for kind in KINDS
        }
        return cls(lines, read_classes(folder / "classInd.txt"), names)

    def all_names(self) -> set[str]:
        """Return the videos of all lists."""
        return {name for names in self.names.values() for name in names}

    def problems(self) -> list[str]:
        """List the differences from what the official lists promise."""
        found = []
        if sorted(self.classes.values()) != list(range(1, CLASSES + 1)):
            found.append(f"{len(self.classes)} classes in classInd.txt instead of those numbered 1 to {CLASSES}")
        everything = self.all_names()
        unknown = {name.split("/")[0] for name in everything} - set(self.classes)
        found += describe_names(sorted(unknown), "classes of the lists that classInd.txt lacks")
        odd = [name for name in everything if group_of(name) is None]
        found += describe_names(sorted(odd), "names in the lists that are not those of videos")
        for split, counts in OFFICIAL.items():
            train, test = (self.names[split, kind] for kind in KINDS)
            for kind, names, count in zip(KINDS, (train, test), counts, strict=True):
                if len(names) != count:
                    found.append(f"{len(names):,} videos in {kind}list{split:02d}.txt instead of {count:,}")
            both = set(map(group_of, train)) & set(map(group_of, test))
            wrong = find_mislabelled(map(parse_entry, self.lines[f"trainlist{split:02d}.txt"]), self.classes)
            found += describe_names(find_repeated(train + test), f"videos that split {split} lists twice")
            found += describe_names(sorted(everything - {*train, *test}), f"videos that split {split} lacks")
            groups = sorted(f"{group[0]} g{group[1]:02d}" for group in both if group)
            found += describe_names(groups, f"groups in both train and test of split {split}")
            found += describe_names(wrong, f"lines of trainlist{split:02d}.txt with another label than classInd.txt's")
        return found
