"""UCF-101's official lists: find, read and check them."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from vidtwin.errors import few

# Videos in the train and the test list of each split.
OFFICIAL = {1: (9537, 3783), 2: (9586, 3734), 3: (9624, 3696)}
CLASSES = 101
VALIDATION_GROUPS = (24, 25)  # of the train lists, held out by default
KINDS = ("train", "test")
FILES = ("classInd.txt", *(f"{kind}list{split:02d}.txt" for split in OFFICIAL for kind in KINDS))
VIDEO_FILE = re.compile(r"v_\w+_g(\d\d)_c\d\d\.avi")


def class_root(folder: Path) -> Path:
    """Return the folder of the class folders: `folder` itself, or the `UCF-101` in it."""
    nested = folder / "UCF-101"
    return nested if nested.is_dir() else folder


def find_lists(root: Path) -> Path | None:
    """Find the folder `ucfTrainTestlist` beside `root`, the folder of the class folders, or in it."""
    places = (root.parent / "ucfTrainTestlist", root / "ucfTrainTestlist")
    return next((place for place in places if place.is_dir()), None)


def read_lines(path: Path) -> list[str]:
    """Read the lines that are not empty; the official lists end theirs with CRLF."""
    return [line for line in path.read_text(errors="replace").splitlines() if line.strip()]


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
        labels: By class, from 0.
        names: By split and kind ("train" or "test"): `CLASS/v_CLASS_g01_c01.avi`.
    """

    lines: dict[str, list[str]]
    labels: dict[str, int]
    names: dict[tuple[int, str], list[str]]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read all files of a folder, which has them."""
        lines = {file: read_lines(folder / file) for file in FILES}
        pairs = (line.split() for line in lines["classInd.txt"])
        labels = {pair[1]: int(pair[0]) - 1 for pair in pairs if len(pair) == 2 and pair[0].isdecimal()}
        names = {
            (split, kind): [line.split()[0] for line in lines[f"{kind}list{split:02d}.txt"]]
            for split in OFFICIAL
            for kind in KINDS
        }
        return cls(lines, labels, names)

    def all_names(self) -> set[str]:
        """Return the videos of all lists."""
        return {name for names in self.names.values() for name in names}

    def problems(self) -> list[str]:
        """List the differences from what the official lists promise."""
        found = []
        if sorted(self.labels.values()) != list(range(CLASSES)):
            found.append(f"{len(self.labels)} classes in classInd.txt instead of those numbered 1 to {CLASSES}")
        everything = self.all_names()
        unknown = {name.split("/")[0] for name in everything} - set(self.labels)
        found += describe_names(sorted(unknown), "classes of the lists that classInd.txt lacks")
        odd = [name for name in everything if group_of(name) is None]
        found += describe_names(sorted(odd), "names in the lists that are not those of videos")
        for split, counts in OFFICIAL.items():
            train, test = (self.names[split, kind] for kind in KINDS)
            for kind, names, count in zip(KINDS, (train, test), counts, strict=True):
                if len(names) != count:
                    found.append(f"{len(names):,} videos in {kind}list{split:02d}.txt instead of {count:,}")
            twice = [name for name, times in Counter(train + test).items() if times > 1]
            both = set(map(group_of, train)) & set(map(group_of, test))
            wrong = [
                line
                for line in self.lines[f"trainlist{split:02d}.txt"]
                if line.split()[1:] != [str(self.labels.get(line.split("/")[0], -1) + 1)]
            ]
            found += describe_names(sorted(twice), f"videos that split {split} lists twice")
            found += describe_names(sorted(everything - {*train, *test}), f"videos that split {split} lacks")
            groups = sorted(f"{group[0]} g{group[1]:02d}" for group in both if group)
            found += describe_names(groups, f"groups in both train and test of split {split}")
            found += describe_names(wrong, f"lines of trainlist{split:02d}.txt with another label than classInd.txt's")
        return found
