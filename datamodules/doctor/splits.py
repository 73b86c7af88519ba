"""Find the split of each video, check UCF-101's lists against the files, and find copies."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vidtwin.datamodules.ucf101.lists import OFFICIAL, VALIDATION_GROUPS, find_lists, parse_entry
from vidtwin.errors import few
from vidtwin.listing import read_lines

from .measure import FINGERPRINT_FRAMES, Measurement

FOLDERS = ("train", "val", "test")

# Chosen on real clips and re-encodings of them; docs/doctor.md has the distances.
COPY_BITS = 6  # of 64 that may differ in the same picture
COPY_FRAMES = FINGERPRINT_FRAMES // 2 + 1
COPY_LENGTH = 0.05  # share of the longer length by which copies may differ
STILL = 1.0  # motion below which all clips of one scene look the same

_PLAIN = 4  # bits: pictures with fewer zeros or ones, such as black ones, all look alike
_UCF_NAME = re.compile(r"v_(\w+)_g(\d+)_c\d+\.avi")


def split_names(names: Sequence[str], root: Path, number: int) -> tuple[dict[str, str], dict[str, Any] | None]:
    """Return the split of each video that has one, by name, and the check of UCF-101's lists if they exist.

    Args:
        names: Relative to `root`.
        number: Which of UCF-101's three splits.
    """
    lists = find_lists(root)
    named = sum("/" in name and _match(name) is not None for name in names)
    if lists is not None and 2 * named > len(names):
        check = check_ucf(names, lists)
        listed = {name: side for side in ("test", "train") for name in _read_list(lists, side, number)}
        return {name: listed[name] for name in names if name in listed}, {**check, "number": number}
    return {name: name.split("/")[0] for name in names if name.split("/")[0] in FOLDERS and "/" in name}, None


def check_ucf(names: Sequence[str], lists: Path) -> dict[str, Any]:
    """Compare lists and files: return `problems`, one line each, and each split's counts beside the official ones."""
    present = set(names)
    problems: list[str] = []
    splits: dict[str, Any] = {}
    classes = _read_classes(lists)
    for number, official in OFFICIAL.items():
        train, test = _read_list(lists, "train", number), _read_list(lists, "test", number)
        if not train and not test:
            continue
        shared = {_group(name) for name in train} & {_group(name) for name in test}
        validation = sum(int(match[2]) in VALIDATION_GROUPS for match in map(_match, train) if match)
        splits[str(number)] = {
            "train": len(train),
            "test": len(test),
            "official_train": official[0],
            "official_test": official[1],
            "validation": validation,
        }
        for what, wrong in (
            ("listed, but not there", sorted({*train, *test} - present)),
            ("there, but not listed", sorted(present - {*train, *test})),
            ("in train and test", sorted({*train} & {*test})),
            ("groups in train and test", sorted(f"{c} g{g}" for c, g in shared)),
        ):
            if wrong:
                problems.append(f"split {number}: {len(wrong)} {what}: {few(wrong)}")
        if not validation:
            problems.append(
                f"split {number}: no group 24 or 25 in the train list, which the data module holds out for validation; "
                "set data.val_groups to groups of the list"
            )
    if not splits:
        problems.append(f"{lists}: expected trainlist01.txt and testlist01.txt, found none")
    folders = {name.split("/")[0] for name in names if "/" in name}
    for what, wrong in (
        ("class folders that classInd.txt lacks", sorted(folders - classes)),
        ("classes of classInd.txt without a folder", sorted(classes - folders)),
    ):
        if wrong:
            problems.append(f"{len(wrong)} {what}: {few(wrong)}")
    return {
        "lists": str(lists),
        "line_ends": _find_line_ends(lists),
        "classes": len(classes),
        "other_spelling": sorted(set(filter(None, map(_find_other_spelling, names)))),
        "splits": splits,
        "problems": problems,
    }


def _find_other_spelling(name: str) -> str | None:
    """Return how a file spells its class if not as its folder does (HandstandPushups/v_HandStandPushups_…)."""
    folder, match = name.split("/")[0], _match(name)
    return f"{folder}/v_{match[1]}_…" if match and "/" in name and match[1] != folder else None


def _match(name: str) -> re.Match[str] | None:
    return _UCF_NAME.fullmatch(name.rpartition("/")[2])


def _group(name: str) -> tuple[str, str]:
    match = _match(name)
    return (name.split("/")[0], match[2]) if match else (name, "")


def _read_list(lists: Path, side: str, number: int) -> list[str]:
    path = lists / f"{side}list{number:02d}.txt"
    return [parse_entry(line)[0] for line in read_lines(path)] if path.is_file() else []


def _read_classes(lists: Path) -> set[str]:
    path = lists / "classInd.txt"
    return {line.strip().split(maxsplit=1)[-1] for line in read_lines(path)} if path.is_file() else set()


def _find_line_ends(lists: Path) -> str:
    contents = [path.read_bytes() for path in lists.glob("*.txt")]
    windows = sum(content.count(b"\r\n") for content in contents)
    lines = sum(content.count(b"\n") for content in contents)
    return "LF" if not windows else "CRLF" if windows == lines else "CRLF and LF"


def find_copies(measurements: Sequence[Measurement], splits: dict[str, str]) -> dict[str, Any]:
    """Find videos that show the same as another one.

    Returns:
        `across`: for each video that has a copy in a split that matters more (test, then validation), `{"name",
        "split", "copy_of", "copy_split", "exact"}`; `within`: likewise for each with an earlier copy in its own split
        (`exact` files first); `alike`: pairs across splits that look the same and hardly move: copies, or two clips of
        one scene, which a fingerprint does not distinguish.
    """
    usable = sorted((m for m in measurements if m.fault is None), key=lambda m: m.seconds or 0.0)
    rank = {name: FOLDERS.index(splits[name]) if name in splits else -1 for name in (m.name for m in usable)}
    across: dict[str, dict[str, Any]] = {}
    within: dict[str, dict[str, Any]] = {}
    alike: dict[str, dict[str, Any]] = {}
    for first, second, exact in (*_same_files(usable, splits), *_same_pictures(usable)):
        loser, winner = sorted((first, second), key=lambda m: (rank[m.name], m.name))
        if rank[first.name] == rank[second.name]:
            loser, winner = winner, loser  # the first by name stays
        elif min(rank[first.name], rank[second.name]) < 0:
            continue
        entry = {"name": loser.name, "copy_of": winner.name, "exact": exact}
        still = not exact and min(first.motion or 0.0, second.motion or 0.0) < STILL
        if rank[first.name] == rank[second.name]:
            if not still:
                within.setdefault(loser.name, entry)
            continue
        entry |= {"split": splits[loser.name], "copy_split": splits[winner.name]}
        (alike if still else across).setdefault(loser.name, entry)
    return {
        "across": [across[name] for name in sorted(across)],
        "within": [within[name] for name in sorted(within)],
        "alike": [alike[name] for name in sorted(alike.keys() - across.keys())],
    }


def _same_files(
    usable: Sequence[Measurement], splits: dict[str, str]
) -> Iterator[tuple[Measurement, Measurement, bool]]:
    """Yield each file with the first one of each split that has the same content."""
    firsts: dict[str | None, dict[str | None, Measurement]] = {}
    ordered = sorted(usable, key=lambda m: m.name)
    for m in ordered:
        firsts.setdefault(m.sha256, {}).setdefault(splits.get(m.name), m)
    for m in ordered:
        for first in firsts[m.sha256].values():
            if first is not m:
                yield m, first, True


def _same_pictures(usable: Sequence[Measurement]) -> Iterator[tuple[Measurement, Measurement, bool]]:
    """Yield pairs with mostly equal frames from `usable`, sorted by length, in memory that grows with the videos."""
    if not usable:
        return
    prints = np.array([[int(word, 16) for word in m.fingerprint] for m in usable], dtype=np.uint64)
    ones = np.bitwise_count(prints)
    distinct = (ones >= _PLAIN) & (ones <= 64 - _PLAIN)
    lengths = np.array([m.seconds or 0.0 for m in usable])
    ends = np.searchsorted(lengths, lengths / (1 - COPY_LENGTH), side="right")
    for index, end in enumerate(ends):
        later = slice(index + 1, int(end))
        near: NDArray[np.bool_] = np.bitwise_count(prints[later] ^ prints[index]) <= COPY_BITS
        same = (near & distinct[later] & distinct[index]).sum(axis=1) >= COPY_FRAMES
        for other in np.flatnonzero(same):
            yield usable[index], usable[index + 1 + int(other)], False
