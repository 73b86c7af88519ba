"""Any folder of videos, with or without a CSV file that says which they are."""

import csv as csv_files
import hashlib
from pathlib import Path
from typing import Any

from vidtwin.errors import UserError
from vidtwin.video import VIDEO_SUFFIXES

from .clips import SPLITS, ClipDataModule, Video


class VideoFolder(ClipDataModule):
    """Every video under a folder, or those that a CSV file names.

    Without CSV a video's label is the place of its parent folder among all of them in alphabetical order. Without
    splits in the CSV the name alone decides on which side a video falls, by its SHA-256: adding videos moves no other.

    Args:
        root: Folder; videos are found in it at any depth, by their suffix.
        csv: File with the columns `path` (under `root`, or absolute) and, if wanted, `label` (integers, or words that
            are numbered in alphabetical order) and `split` (train, val or test).
        val_fraction: Share of the videos held out for validation where no split is given.
        test_fraction: Share of the videos held out for testing where no split is given.
        **kwargs: Those of `ClipDataModule`.
    """

    def __init__(
        self,
        root: str,
        csv: str | None = None,
        val_fraction: float = 0.05,
        test_fraction: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction > 1:
            raise UserError(
                "Expected data.val_fraction and data.test_fraction of at least 0 and together at most 1, "
                f"got {val_fraction} and {test_fraction}."
            )
        self.root = Path(root)
        self.csv = Path(csv) if csv else None
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self._all: list[tuple[Video, str]] | None = None

    def videos(self, split: str) -> list[Video]:
        if self._all is None:
            self._all = self._from_csv(self.csv) if self.csv else self._from_folder()
        videos = [video for video, its_split in self._all if its_split == split]
        if not videos:
            counts = {s: sum(1 for _, its_split in self._all if its_split == s) for s in SPLITS}
            advice = f"the column split of {self.csv}" if self.csv else f"data.{split}_fraction"
            raise UserError(f"{self.root}: expected videos in split {split}, got none of {counts}; change {advice}.")
        return videos

    def _from_folder(self) -> list[tuple[Video, str]]:
        if not self.root.is_dir():
            raise UserError(f"Expected a folder of videos at {self.root}, there is none; set data.root.")
        paths = sorted(p for p in self.root.rglob("*") if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file())
        if not paths:
            raise UserError(
                f"{self.root}: expected videos ({', '.join(sorted(VIDEO_SUFFIXES))}), found none; set data.root."
            )
        folders = {folder: label for label, folder in enumerate(sorted({path.parent for path in paths}))}
        videos = [Video(path, path.relative_to(self.root).as_posix(), folders[path.parent]) for path in paths]
        return [(video, self._split_of(video.name)) for video in videos]

    def _from_csv(self, file: Path) -> list[tuple[Video, str]]:
        try:
            with file.open(newline="", encoding="utf-8-sig") as handle:
                rows = list(csv_files.DictReader(handle))
        except FileNotFoundError:
            raise UserError(f"Expected a CSV file at {file}, there is none; set data.csv.") from None
        if not rows or "path" not in rows[0]:
            came = f"the columns {list(rows[0])}" if rows else "no rows"
            raise UserError(f"{file}: expected the column path (and, if wanted, label and split), got {came}.")
        absent = [row["path"] for row in rows if not (self.root / row["path"]).is_file()]
        if absent:
            some = ", ".join(absent[:3]) + (", …" if len(absent) > 3 else "")
            raise UserError(
                f"{file}: expected its {len(rows)} videos in {self.root}, {len(absent)} are absent ({some}); "
                "set data.root or correct the file."
            )
        wrong = sorted({row["split"] or "" for row in rows if "split" in row} - set(SPLITS))
        if wrong:
            raise UserError(
                f"{file}: expected train, val or test in the column split, got {', '.join(map(repr, wrong))}."
            )
        labels = _numbered([row.get("label") or "" for row in rows])
        return [
            (Video(self.root / row["path"], row["path"], label), row.get("split") or self._split_of(row["path"]))
            for row, label in zip(rows, labels, strict=True)
        ]

    def _split_of(self, name: str) -> str:
        place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
        if place < self.test_fraction:
            return "test"
        return "val" if place < self.test_fraction + self.val_fraction else "train"


def _numbered(labels: list[str]) -> list[int]:
    """Integers as they are, words by alphabetical order, -1 for none."""
    words = sorted(set(labels) - {""})
    if all(word.removeprefix("-").isdecimal() for word in words):
        return [int(label) if label else -1 for label in labels]
    return [words.index(label) if label else -1 for label in labels]
