"""Data module of a folder of videos, with or without lists of them."""

import csv as csv_files
import os
import string
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from vidtwin.data import SPLITS
from vidtwin.errors import UserError, few
from vidtwin.listing import encoding_of, find_videos, is_hidden, is_text, read_lines
from vidtwin.video import VIDEO_SUFFIXES

from .clips import Video
from .data_module import ClipDataModule
from .lists import check_apart, check_unique
from .sampler import hash_to_unit

Listed = tuple[list[str], list[str], list[str]]  # paths, labels and splits of a list's videos; "" if it gives none


class VideoFolder(ClipDataModule):
    """Every video under a folder, or those named by lists.

    Without lists a video's label is the rank of its parent folder among all of them in alphabetical order. If no split
    is given, it follows from the SHA-256 of the video's name, so adding videos moves no other.

    A missing video of a list is reported when it is read. It is an error if all videos of a list are missing, or if a
    video comes twice, or in training and in another split.

    Args:
        root: Folder that is searched at any depth for videos, by their suffix. Links to folders are followed; hidden
            files and folders (whose names begin with a dot) are left out.
        csv: File with the columns of `path_template` and optionally `label` (integers, or words that are numbered in
            alphabetical order) and `split` (train, val or test).
        splits: The videos of each split, under `root`: a folder, a .csv file like `csv`, whose column `split` is
            ignored, or a .txt file with a path per line. Labels are numbered over all splits together; in a folder they
            are the names of its subfolders, and a .txt file has none. If "val" is left out, it is the share
            `val_fraction` of "train".
        path_template: A video's path, under `root` or absolute, from the columns of a .csv file; `{path}` is a line of
            a .txt file. Columns are text: `{time_start:0>6}` pads one with zeros.
        image_folders: Treat folders of numbered images as videos, too, and do not search their subfolders. Lists may
            always name such folders.
        val_fraction: Share of the videos held out for validation if no split is given.
        test_fraction: Share of the videos held out for testing if no split is given.
        **kwargs: Arguments of `ClipDataModule`.
    """

    def __init__(
        self,
        root: str,
        csv: str | None = None,
        val_fraction: float = 0.05,
        test_fraction: float = 0.1,
        splits: dict[str, str] | None = None,
        path_template: str = "{path}",
        image_folders: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction > 1:
            raise UserError(
                "Expected data.val_fraction and data.test_fraction of at least 0 and together at most 1, "
                f"got {val_fraction} and {test_fraction}."
            )
        if splits is not None and (csv or not splits or not set(splits) <= set(SPLITS)):
            got = "data.csv too" if csv else ", ".join(splits) or "none"
            raise UserError(f"Expected data.splits to name some of train, val and test, without data.csv, got {got}.")
        self.root = Path(root)
        self.csv = Path(csv) if csv else None
        self.splits = {split: self.root / place for split, place in (splits or {}).items()}
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.path_template, self.image_folders = path_template, image_folders
        self._columns = _columns_of(path_template)
        self._prefix = os.path.join(os.path.abspath(root), "")
        self._videos: dict[str, list[Video]] = {}

    def videos(self, split: str) -> list[Video]:
        if split not in self._videos:
            self._videos |= self._list_split(split) if self.splits else self._divide()
        videos = self._videos[split]
        if not videos:
            counts = {name: len(videos) for name, videos in self._videos.items()}
            advice = f"the column split of {self.csv}" if self.csv else f"data.{split}_fraction"
            if split == "train" and not self.csv:
                advice = "data.val_fraction and data.test_fraction, or train on other data"
            raise UserError(f"{self.root}: expected videos in split {split}, got none of {counts}; change {advice}.")
        return videos

    def cache_key(self, split: str) -> dict[str, Any]:
        splits = {name: place.name for name, place in self.splits.items()}
        shares = {"val_fraction": self.val_fraction, "test_fraction": self.test_fraction}
        return {"splits": splits, "csv": self.csv.name if self.csv else None, **shares}

    def _divide(self) -> dict[str, list[Video]]:
        """Divide the videos of one folder or file into splits."""
        rows: Iterable[tuple[str, int, str]]
        if self.csv is None:
            paths = self._find(self.root)
            labels = {folder: label for label, folder in enumerate(sorted({path.parent for path in paths}))}
            rows = ((path.relative_to(self.root).as_posix(), labels[path.parent], "") for path in paths)
        else:
            names, words, given = self._read_checked(self.csv)
            wrong = sorted(set(given) - set(SPLITS)) if any(given) else []
            if wrong:
                raise UserError(
                    f"{self.csv}: expected train, val or test in the column split, got {', '.join(map(repr, wrong))}."
                )
            numbers = _number(words)
            rows = zip(names, map(numbers.__getitem__, words), given, strict=True)
        parts: dict[str, list[Video]] = {split: [] for split in SPLITS}
        for name, label, split in rows:
            parts[split or self._draw_split(name, self.test_fraction)].append(Video(self.root / name, name, label))
        return parts

    def _list_split(self, split: str) -> dict[str, list[Video]]:
        """List the videos of a split of `splits`; of "train" and "val" together if one is a part of the other."""
        held_out = split != "test" and "val" not in self.splits
        source = "train" if held_out else split
        if source not in self.splits:
            raise UserError(
                f"Expected data.splits to name the split {split}, got {', '.join(self.splits)} alone; add {split}."
            )
        place = self.splits[source]
        if place.suffix.lower() in (".csv", ".txt"):
            names, words, _ = self._read_checked(place)
            paths: Iterable[Path] = (self.root / name for name in names)
        else:
            if not place.is_relative_to(self.root):
                raise UserError(f"Expected data.splits to name folders under data.root={self.root}, got {place}.")
            paths = self._find(place)
            names = [path.relative_to(self.root).as_posix() for path in paths]
            words = [path.relative_to(place).parts[0] if path.parent != place else "" for path in paths]
        if source == "train":
            self._check_apart(names)
        numbers = _number({*words, *self._label_words()}) if any(words) else {"": -1}
        videos = [Video(path, name, numbers[word]) for path, name, word in zip(paths, names, words, strict=True)]
        if not held_out:
            return {split: videos}
        parts: dict[str, list[Video]] = {"train": [], "val": []}
        for video in videos:
            parts[self._draw_split(video.name, 0)].append(video)
        return parts

    def _label_words(self) -> Iterator[str]:
        """Yield the labels of all `splits`, so that a class has one number, even if a split lacks others."""
        for place in self.splits.values():
            if place.is_dir():
                yield from (entry.name for entry in os.scandir(place) if entry.is_dir() and not is_hidden(entry.name))
            elif place.suffix.lower() == ".csv" and place.is_file():
                yield from self._read_csv(place, labels_only=True)[1]

    def _find(self, folder: Path) -> list[Path]:
        """Find the videos under a folder, sorted."""
        if not folder.is_dir():
            option = "data.root or data.splits" if self.splits else "data.root"
            raise UserError(f"Expected a folder of videos at {folder}, got no folder; set {option}.")
        paths, _ = find_videos(folder, self.image_folders)
        if not paths:
            raise UserError(
                f"{folder}: expected videos ({', '.join(sorted(VIDEO_SUFFIXES))}), found none; set data.root, or "
                "data.image_folders if each is a folder of images."
            )
        if odd := [ascii(str(path.relative_to(folder))) for path in paths if not is_text(str(path))]:
            raise UserError(f"{folder}: expected names in UTF-8, {len(odd):,} are not ({few(odd)}); rename these.")
        return paths

    def _read_checked(self, file: Path) -> Listed:
        """Read a list that names each video once; not all may be missing, while single ones are reported later."""
        names, labels, splits = self._read(file)
        if not any(os.path.exists(self.root / name) for name in names):
            raise UserError(
                f"{file}: expected its {len(names):,} videos in {self.root}, all are missing ({few(names)}); set "
                "data.root or data.path_template."
            )
        check_unique(file, map(self._normalize, names))
        return names, labels, splits

    def _check_apart(self, names: Sequence[str]) -> None:
        """Raise `UserError` if a training video is in another split whose list or folder exists."""
        train = set(map(self._normalize, names))
        for split, place in self.splits.items():
            if split == "train":
                continue
            if place.is_dir():
                folder = os.path.join(os.path.abspath(place), "")
                shared = [n for n in train if os.path.normpath(os.path.join(self._prefix, n)).startswith(folder)]
            elif place.is_file():
                shared = [name for name in map(self._normalize, self._read(place)[0]) if name in train]
            else:
                continue
            check_apart(self.splits["train"], shared, split, ", or correct data.splits")

    def _normalize(self, name: str) -> str:
        """Return a video's normalized path under `root`."""
        place = os.path.normpath(name)
        if os.path.isabs(place):
            place = place.removeprefix(self._prefix)
        return name if place == name else place  # not a second copy of a million names

    def _read(self, file: Path) -> Listed:
        try:
            if file == self.csv or file.suffix.lower() == ".csv":
                return self._read_csv(file)
            if self._columns != ["path"]:
                raise UserError(
                    f"{file}: expected {{path}} alone in data.path_template for a list of paths, got "
                    f"{self.path_template}."
                )
            lines = read_lines(file)
        except FileNotFoundError:
            option = "data.splits" if self.splits else "data.csv"
            raise UserError(f"Expected a list of videos at {file}, got no file; set {option}.") from None
        names = [self.path_template.format(path=line.strip()) for line in lines]
        return names, [""] * len(names), [""] * len(names)

    def _read_csv(self, file: Path, labels_only: bool = False) -> Listed:
        """Read a .csv file; only the needed part of its millions of rows is kept."""
        listed: Listed = ([], [], [])
        names, labels, splits = listed
        with file.open(newline="", encoding=encoding_of(file)) as handle:
            rows = _number_rows(handle, file)
            _, header = next(rows, (1, []))
            if labels_only and "label" not in header:
                return listed
            at = {column: place for place, column in enumerate(header)}
            if header and not set(self._columns) <= set(header):
                columns = f"the column{'s' * (len(self._columns) > 1)} {', '.join(self._columns)}"
                raise UserError(
                    f"{file}: expected {columns} (and optionally label and split), got the columns {header}; correct "
                    "the file or data.path_template."
                )
            for line, row in rows:
                if len(row) < len(header) or any(row[len(header) :]):
                    raise UserError(
                        f"{file}: expected {len(header)} columns in line {line}, got {len(row)}; correct the file."
                    )
                if not labels_only:
                    names.append(self.path_template.format_map({c: row[at[c]] for c in self._columns}))
                    splits.append(sys.intern(row[at["split"]]) if "split" in at else "")
                labels.append(sys.intern(row[at["label"]]) if "label" in at else "")
        if not labels_only and not names:
            raise UserError(f"{file}: expected rows of the columns {', '.join(self._columns)}, got no rows.")
        return listed

    def _draw_split(self, name: str, test_fraction: float) -> str:
        place = hash_to_unit(name)
        if place < test_fraction:
            return "test"
        return "val" if place < test_fraction + self.val_fraction else "train"


def _number_rows(handle: TextIO, file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a table that are not empty, each with the number of the line in which it begins."""
    rows = csv_files.reader(handle, strict=True)
    line = 1
    try:
        for row in rows:
            if row:
                yield line, row
            line = rows.line_num + 1
    except csv_files.Error as error:
        raise UserError(
            f"{file}: expected a table whose quotes are closed, got an unreadable row from line {line} on "
            f"({error}); correct the file."
        ) from None


def _columns_of(template: str) -> list[str]:
    try:
        columns, reason = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None], ""
    except ValueError as error:
        columns, reason = [], f" ({error})"
    if not columns or not all(columns):
        raise UserError(
            f"Expected data.path_template with columns in braces, such as {{page_dir}}/{{videoid}}.mp4, got "
            f"{template!r}{reason}."
        )
    return list(dict.fromkeys(columns))


def _number(labels: Iterable[str]) -> dict[str, int]:
    """Number labels: integers keep their value, words follow the alphabet, and "" is -1."""
    words = sorted(set(labels) - {""})
    integers = all(word.removeprefix("-").isdecimal() for word in words)
    return {"": -1} | {word: int(word) if integers else number for number, word in enumerate(words)}
