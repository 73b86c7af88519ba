"""`vidtwin prepare ucf101`: unpack what UCF-101's authors distribute, check it, and list it.

Everything is unpacked into a hidden folder beside its place and moves there only when all checks have passed: a kill
leaves nothing half-made under the names that training reads.
"""

import hashlib
import os
import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from tqdm import tqdm

from vidtwin.errors import UserError, few
from vidtwin.files import NO_ROOM, inside
from vidtwin.listing import read_lines, walk
from vidtwin.tables import read_table, write_table

from .archives import unpack
from .lists import FILES, OFFICIAL, VALIDATION_GROUPS, Lists, describe_names, group_of, parse_entry

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

USAGE = "ucf101 [ARCHIVE ...] [options]"
DESCRIPTION = """\
Unpack UCF-101, check that nothing is missing or damaged, and list its files.

  vidtwin prepare ucf101 UCF101.rar UCF101TrainTestSplits-RecognitionTask.zip
  vidtwin prepare ucf101 --verify

ARCHIVE: the videos and the lists, in any order: .rar, .zip, .tar, .tar.gz, or folders that hold them unpacked. Without
archives, check the content of --out.
"""
MANIFEST = "ucf101_manifest.csv"

_COLUMNS = ["path", "label", "group", *(f"split{split:02d}" for split in OFFICIAL), "bytes", "sha256"]
_SCRATCH = ".ucf101-{host}-{pid}.partial"


def add_options(parser: "ArgumentParser") -> None:
    """Add the options of the command."""
    parser.add_argument("dataset", choices=["ucf101"], metavar="ucf101", help="The data set.")
    parser.add_argument(
        "archives", nargs="*", default=[], metavar="ARCHIVE", help="Archives or folders: the videos, the lists."
    )
    parser.add_argument("--out", type=str, default="data", help="Folder for UCF-101 and ucfTrainTestlist.")
    parser.add_argument(
        "--partial", type=bool, default=False, help="Accept some of the videos, and cut the lists to them."
    )
    parser.add_argument(
        "--verify", type=bool, default=False, help=f"Read all videos again and compare them with {MANIFEST}."
    )


def run(options: "Namespace") -> int:
    """Run the command → exit code."""
    prepare_ucf101([Path(path) for path in options.archives], Path(options.out), options.partial, options.verify)
    return 0


def prepare_ucf101(archives: Sequence[Path], out: Path, partial: bool = False, verify: bool = False) -> None:
    """Make `out/UCF-101`, `out/ucfTrainTestlist` and `out/ucf101_manifest.csv`; check and keep those that exist.

    Args:
        archives: Files or folders that together hold the videos and the lists; they are not read if both are in `out`
            already.
        out: Folder of the result; it is made.
        partial: Accept some of the videos. The lists are then cut down to them, and the full lists kept in
            `out/ucfTrainTestlist_full`.
        verify: Compare the videos' SHA-256 with the manifest, not their sizes alone.

    Raises:
        UserError: An archive can't be unpacked, or its content is not UCF-101; `out` is then as it was.
    """
    videos, lists, full = out / "UCF-101", out / "ucfTrainTestlist", out / "ucfTrainTestlist_full"
    have_videos, have_lists = videos.is_dir(), lists.is_dir() or full.is_dir()
    if not archives and not (have_videos and have_lists):
        absent = " and ".join(str(place) for place, have in ((videos, have_videos), (lists, have_lists)) if not have)
        raise UserError(f"Expected archives to unpack, since {absent} is not there; give UCF-101's archives, or --out.")
    with _scratch(out) as scratch:
        problems: list[str] = []
        if not (have_videos and have_lists):
            problems += unpack(archives, scratch, not have_videos, not have_lists)
        source = (full if full.is_dir() else lists) if have_lists else scratch / "lists"
        official = _read_lists(source, archives)
        problems += official.problems()
        if not have_videos:
            problems += _arrange(scratch / "videos", scratch / "UCF-101", official)
        sizes = _measure_sizes(videos if have_videos else scratch / "UCF-101")
        listed = official.all_names()
        if not partial or not sizes:
            problems += describe_names(sorted(listed - set(sizes)), "missing videos")
        problems += describe_names(sorted(set(sizes) - listed), "videos that no list names")
        problems += describe_names([name for name, size in sizes.items() if size == 0], "empty videos")
        old = _read_manifest(out / MANIFEST)
        changed = sorted(name for name in sizes if name in old and sizes[name] != int(old[name]["bytes"]))
        problems += describe_names(changed, f"of another size than {MANIFEST} says")
        if problems:
            place = videos if have_videos else ", ".join(map(str, archives))
            advice = "Delete or complete what is wrong" if have_videos else "Fetch the archive again"
            raise UserError(
                f"{place}: expected UCF-101 with its {sum(OFFICIAL[1]):,} videos and official lists, but there are "
                f"{'; '.join(problems)}. {advice}{'' if partial else ', or accept fewer videos with --partial'}."
            )
        _place(scratch, out, source, official, set(sizes))
    rows = _make_rows(videos, sizes, official, old, verify)
    if rows != list(old.values()):
        _write_manifest(out / MANIFEST, rows)
    _summarize(out, rows, kept=have_videos, unread=archives if have_videos and have_lists else [])


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """Make a hidden folder in `out` for this process alone, and remove those of dead processes of this machine."""
    out.mkdir(parents=True, exist_ok=True)
    host = re.sub(r"\W", "_", socket.gethostname())
    for left in out.glob(_SCRATCH.format(host=host, pid="*")):
        if not _is_alive(int(left.name.removesuffix(".partial").rpartition("-")[2])):
            shutil.rmtree(left)
    folder = out / _SCRATCH.format(host=host, pid=os.getpid())
    folder.mkdir()
    try:
        yield folder
    except OSError as error:
        if error.errno in NO_ROOM:
            raise UserError(f"{out}: expected space for UCF-101 (7 GB), got a full disk; free some.") from None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # there os.kill would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _read_lists(folder: Path, archives: Sequence[Path]) -> Lists:
    absent = [file for file in FILES if not (folder / file).is_file()]
    if absent:
        place = ", ".join(map(str, archives)) if archives and folder.name == "lists" else folder
        raise UserError(
            f"{place}: expected UCF-101's lists, {len(absent)} of {len(FILES)} are absent ({few(absent)}); "
            "give UCF101TrainTestSplits-RecognitionTask.zip too."
        )
    return Lists.read(folder)


def _arrange(flat: Path, root: Path, lists: Lists) -> list[str]:
    """Move videos into the class folders of the lists, which HandstandPushups' file names do not spell."""
    places = {PurePosixPath(name).name: name for name in lists.all_names()}
    extra = []
    root.mkdir()
    for path in sorted(flat.iterdir()):
        if path.name in places:
            target = inside(root, places[path.name])
            target.parent.mkdir(exist_ok=True)
            path.replace(target)
        else:
            extra.append(path.name)
    return describe_names(extra, "videos that no list names")


def _measure_sizes(root: Path) -> dict[str, int]:
    """Map the .avi files under a folder, in alphabetical order, to their sizes in bytes (0 for a broken link)."""
    paths = [place / file for place, _, files in walk(root) for file in files if file.lower().endswith(".avi")]
    return {
        path.relative_to(root).as_posix(): path.stat().st_size if path.exists() else 0
        for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix())
    }


def _place(scratch: Path, out: Path, source: Path, lists: Lists, present: set[str]) -> None:
    """Move new folders to their places: the lists first, without which a data module would make splits of its own."""
    target, full = out / "ucfTrainTestlist", out / "ucfTrainTestlist_full"
    cut = present != lists.all_names()
    wanted = {
        file: [line for line in lines if file == "classInd.txt" or parse_entry(line)[0] in present]
        for file, lines in lists.lines.items()
    }
    if cut and not full.is_dir():
        shutil.copytree(source, scratch / "full")
        os.replace(scratch / "full", full)
    if any(not (target / file).is_file() or read_lines(target / file) != lines for file, lines in wanted.items()):
        new = scratch / "ucfTrainTestlist"
        new.mkdir()
        for file, lines in wanted.items():
            # As in the official files, whose lines end with CRLF.
            (new / file).write_bytes("".join(f"{line}\r\n" for line in lines).encode())
        if target.is_dir():
            os.replace(target, scratch / "old")
        os.replace(new, target)
    if (scratch / "UCF-101").is_dir():
        os.replace(scratch / "UCF-101", out / "UCF-101")
    if not cut and full.is_dir():
        shutil.rmtree(full)


def _read_manifest(path: Path) -> dict[str, dict[str, str]]:
    """Read the rows of a manifest by path; none if there is no manifest."""
    if not path.is_file():
        return {}
    try:
        rows = read_table(path)
    except ValueError:
        rows = []
    if not rows or list(rows[0]) != _COLUMNS or any(not row["bytes"].isdecimal() for row in rows):
        raise UserError(f"{path}: expected a table with the columns {', '.join(_COLUMNS)}; delete it to make it anew.")
    return {row["path"]: row for row in rows}


def _make_rows(
    root: Path, sizes: dict[str, int], lists: Lists, old: dict[str, dict[str, str]], verify: bool
) -> list[dict[str, str]]:
    """Make the manifest's rows; compute SHA-256 of videos that `old` lacks, or with `verify` compare that of all."""
    sides = {(split, name): kind for (split, kind), names in lists.names.items() for name in names}
    rows: list[dict[str, str]] = []
    changed: list[str] = []
    for name in tqdm(sizes, desc="sha256", unit=" videos", disable=None):
        digest = _sha256(root / name) if verify or name not in old else old[name]["sha256"]
        if name in old and digest != old[name]["sha256"]:
            changed.append(name)
        group = group_of(name)
        assert group is not None
        row = {"path": name, "label": str(lists.classes[group[0]] - 1), "group": str(group[1])}
        row |= {f"split{split:02d}": sides[split, name] for split in OFFICIAL}
        rows.append(row | {"bytes": str(sizes[name]), "sha256": digest})
    if changed:
        raise UserError(
            f"{root}: expected the content that {MANIFEST} lists, {len(changed):,} videos have another "
            f"({few(changed)}); unpack these again."
        )
    return rows


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(path: Path, rows: list[dict[str, str]]) -> None:
    write_table(path, _COLUMNS, ([row[column] for column in _COLUMNS] for row in rows))


def _summarize(out: Path, rows: list[dict[str, str]], kept: bool, unread: Sequence[Path]) -> None:
    size = sum(int(row["bytes"]) for row in rows) / 1e9
    classes = len({row["label"] for row in rows})
    lines = [
        f"{out / 'UCF-101'}: {len(rows):,} videos of {classes} classes, {size:.1f} GB"
        + (" (was there, checked)" if kept else "")
    ]
    for split in OFFICIAL:
        train = [row for row in rows if row[f"split{split:02d}"] == "train"]
        held_out = sum(int(row["group"]) in VALIDATION_GROUPS for row in train)
        lines.append(
            f"  split {split}: {len(train):,} train, of them {held_out:,} in groups 24 and 25 for validation; "
            f"{len(rows) - len(train):,} test"
        )
    lines.append(f"{out / MANIFEST}: their labels, splits, sizes and SHA-256")
    if unread:
        names = ", ".join(archive.name for archive in unread)
        lines.append(f"not read, since {out / 'UCF-101'} is there: {names}; delete that folder to unpack anew")
    groups = sorted({int(row["group"]) for row in rows if row["split01"] == "train"})
    other = "" if set(groups) & set(VALIDATION_GROUPS) or not groups else f" --data.val_groups '[{groups[-1]}]'"
    lines.append(f"next: vidtwin fit --config configs/vidtwin_base.yaml --data.root {out / 'UCF-101'}{other}")
    tqdm.write("\n".join(lines))
