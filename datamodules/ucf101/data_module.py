"""UCF-101: 13,320 videos of 101 human actions, 320x240, mostly 25 fps (Soomro et al. 2012, arXiv:1212.0402)."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from vidtwin.datamodules.clips import Video
from vidtwin.datamodules.data_module import ClipDataModule
from vidtwin.datamodules.lists import check_apart, check_unique
from vidtwin.errors import UserError, few
from vidtwin.listing import find_group, is_hidden, read_lines

from .lists import (
    KINDS,
    VALIDATION_GROUPS,
    class_root,
    find_lists,
    find_mislabelled,
    number_from_0,
    parse_entry,
    read_classes,
)

log = logging.getLogger(__name__)
T = TypeVar("T")

_TEST_GROUPS = range(1, 8)  # those of the official split 1


class UCF101(ClipDataModule):
    """UCF-101 with an official split, or any data set in its layout.

        root/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi, …
        ucfTrainTestlist/{classInd,trainlist01,testlist01,…}.txt     beside root or in it

    A group (`g01` to `g25`) holds the clips of one source video. The groups `val_groups` of the train list are held out
    as validation data; only `test` and `predict` need the test list. Labels are those of classInd.txt, from 0.

    Without lists, labels number the class folders in alphabetical order, and groups 1 to 7 are the test data, as in the
    official split 1.

    Args:
        root: Folder of the class folders, or a folder that holds it as `UCF-101`.
        split: Official split, 1 to 3.
        lists: Folder of the lists; by default `ucfTrainTestlist` beside `root` or in it.
        val_groups: Groups of the train list that are held out for validation; [] for none, with
            --trainer.limit_val_batches 0.
        **kwargs: Those of `ClipDataModule`.
    """

    def __init__(
        self,
        root: str,
        split: int = 1,
        lists: str | None = None,
        val_groups: Sequence[int] = VALIDATION_GROUPS,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if split not in (1, 2, 3):
            raise UserError(f"Expected data.split to be 1, 2 or 3, got {split}.")
        self.root = class_root(Path(root))
        self.split = split
        self.val_groups = list(val_groups)
        self._given_lists = lists
        self._files: set[str] | None = None

    def videos(self, split: str) -> list[Video]:
        lists = self._find_lists()
        names = self._read_checked(lists, split) if lists else self._pick_groups(split)
        if split != "test":
            names = self._hold_out(names, keep=split == "val")
        labels = self._number_classes(lists)
        unknown = sorted({name.split("/")[0] for name in names} - set(labels))
        if unknown:
            raise UserError(f"{lists}/classInd.txt: expected all classes of the lists, got none for {few(unknown)}.")
        return [Video(self.root / name, name, labels[name.split("/")[0]]) for name in names]

    def split_name(self, split: str) -> str:
        return f"{split}list{self.split:02d}" if self._find_lists() else f"{split} by groups"

    def cache_key(self, split: str) -> dict[str, Any]:
        return {"split": self.split, "val_groups": self.val_groups}

    def class_names(self) -> list[str]:
        labels = self._number_classes(self._find_lists())
        return sorted(labels, key=lambda name: labels[name])

    def _find_lists(self) -> Path | None:
        return find_lists(self.root) if self._given_lists is None else Path(self._given_lists)

    def _list_files(self) -> set[str]:
        """Return the names `Class/video.avi` of the videos on disk."""
        if self._files is None:
            if not self.root.is_dir():
                raise UserError(f"Expected UCF-101's class folders in {self.root}, got no such folder; set data.root.")
            files = {
                f"{path.parent.name}/{path.name}"
                for path in self.root.glob("*/*.avi")
                if not is_hidden(path.name) and not is_hidden(path.parent.name)
            }
            if not files:
                raise UserError(
                    f"Expected UCF-101's videos as {self.root}/CLASS/v_CLASS_g01_c01.avi, found none; set data.root."
                )
            self._files = files
        return self._files

    def _read_checked(self, lists: Path, split: str) -> list[str]:
        """Return the names of an official list, which do not follow from the class names (HandstandPushups)."""
        train, test = (lists / f"{kind}list{self.split:02d}.txt" for kind in KINDS)
        path = test if split == "test" else train
        present = self._list_files()
        entries = [parse_entry(line) for line in _read(read_lines, path)]
        names = [name for name, _ in entries]
        check_unique(path, names)
        if path == train and test.is_file():
            check_apart(path, {parse_entry(line)[0] for line in read_lines(test)} & set(names), "test", "")
        if wrong := find_mislabelled(entries, _read(read_classes, lists / "classInd.txt")):
            raise UserError(
                f"{path}: expected the numbers of classInd.txt, got {len(wrong):,} others ({few(wrong)}); correct one "
                "of the files."
            )
        absent = [name for name in names if name not in present]
        if absent:
            raise UserError(
                f"{path}: expected its {len(names)} videos in {self.root}, {len(absent)} are absent ({few(absent)}); "
                "complete the data, or cut the lists to what is there: vidtwin prepare ucf101 --partial, or data.lists."
            )
        return names

    def _pick_groups(self, split: str) -> list[str]:
        log.info("No ucfTrainTestlist at %s: groups 1 to 7 are the test data, labels follow the folders.", self.root)
        return [name for name in sorted(self._list_files()) if (_group(name) in _TEST_GROUPS) == (split == "test")]

    def _hold_out(self, names: list[str], keep: bool) -> list[str]:
        if not self.val_groups and not keep:
            return names
        groups = sorted({_group(name) for name in names})
        if not set(groups) & set(self.val_groups) or set(groups) <= set(self.val_groups):
            raise UserError(
                f"Expected some, but not all training videos of {self.root} in data.val_groups={self.val_groups}, "
                f"they are in groups {groups}; set data.val_groups to some of these."
            )
        return [name for name in names if (_group(name) in self.val_groups) == keep]

    def _number_classes(self, lists: Path | None) -> dict[str, int]:
        if lists is None:
            return {name: label for label, name in enumerate(sorted({f.split("/")[0] for f in self._list_files()}))}
        return number_from_0(_read(read_classes, lists / "classInd.txt"))


def _read(reader: Callable[[Path], T], path: Path) -> T:
    try:
        return reader(path)
    except FileNotFoundError:
        raise UserError(
            f"Expected UCF-101's list {path.name} in {path.parent}, got none; set data.lists to the folder of "
            "trainlist01.txt, testlist01.txt and classInd.txt."
        ) from None


def _group(name: str) -> int:
    group = find_group(name)
    if group is None:
        raise UserError(
            f"Expected a video named like v_CLASS_g01_c01.avi, got {name}; for other names use VideoFolder."
        )
    return group
