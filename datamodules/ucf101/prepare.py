"""`vidtwin prepare ucf101 ARCHIVE …`: UCF-101 unpacked from what its authors distribute, checked and listed.

Everything is unpacked into a hidden folder beside its place and moves there only when all checks have passed: a kill
leaves nothing half-made under the names that training reads. An archive's paths are not followed: regular files with
the names of UCF-101's videos and lists are taken, and these names alone decide where they go.
"""

import argparse
import csv
import errno
import functools
import gzip
import hashlib
import io
import lzma
import os
import re
import shutil
import socket
import stat
import subprocess
import tarfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, NoReturn

from tqdm import tqdm

from vidtwin.errors import UserError, few
from vidtwin.files import write_text
from vidtwin.listing import walk

from .lists import OFFICIAL, VALIDATION_GROUPS

MANIFEST = "ucf101_manifest.csv"

_CLASSES, _VIDEOS = 101, 13320
_KINDS = ("train", "test")
_LIST_FILES = ("classInd.txt", *(f"{kind}list{split:02d}.txt" for split in OFFICIAL for kind in _KINDS))
_VIDEO_FILE = re.compile(r"v_\w+_g(\d\d)_c\d\d\.avi")
_COLUMNS = ["path", "label", "group", *(f"split{split:02d}" for split in OFFICIAL), "bytes", "sha256"]
_SCRATCH = ".ucf101-{host}-{pid}.partial"
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,  # of zipfile: encrypted, or compressed in a way that it does not know
)
# How programs unpack a whole RAR archive, the most able first. One run for all files: what is compressed as one solid
# block would be read anew from its beginning for each file.
_RAR_TOOLS = {
    "unrar": ["x", "-y", "-idq", "{archive}", "{folder}/"],
    "unar": ["-quiet", "-force-overwrite", "-no-directory", "-output-directory", "{folder}", "{archive}"],
    "7zz": ["x", "-y", "-o{folder}", "{archive}"],
    "7z": ["x", "-y", "-o{folder}", "{archive}"],
    "bsdtar": ["-x", "-f", "{archive}", "-C", "{folder}"],
}

Member = tuple[str, Callable[[Path], object]]  # a file's path in an archive, and what writes it to a path on disk


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"vidtwin prepare: {message}; see vidtwin prepare ucf101 --help.")


def prepare_command(argv: list[str]) -> int:
    """Unpack and check a data set: vidtwin prepare ucf101 UCF101.rar UCF101TrainTestSplits-RecognitionTask.zip"""
    parser = _Parser("vidtwin prepare", description="Unpack UCF-101, check that it is whole, and list its files.")
    parser.add_argument("dataset", choices=["ucf101"])
    parser.add_argument(
        "archives",
        nargs="*",
        type=Path,
        help="the videos and the lists, in any order: .rar, .zip, .tar, .tar.gz, or folders that hold them unpacked; "
        "none checks what --out holds",
    )
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder for UCF-101 and ucfTrainTestlist")
    parser.add_argument("--partial", action="store_true", help="accept some of the videos, and cut the lists to them")
    parser.add_argument("--verify", action="store_true", help=f"read all videos again and compare with {MANIFEST}")
    args = parser.parse_intermixed_args(argv)
    prepare_ucf101(args.archives, args.out, args.partial, args.verify)
    return 0


def prepare_ucf101(archives: Sequence[Path], out: Path, partial: bool = False, verify: bool = False) -> None:
    """Make `out/UCF-101`, `out/ucfTrainTestlist` and `out/ucf101_manifest.csv`; what is there is checked and kept.

    Args:
        archives: Files or folders that together hold the videos and the lists; nothing is read of them if both are in
            `out` already.
        out: Folder of the result; it is made.
        partial: Accept some of the videos. The lists are then cut down to them, and the whole lists kept in
            `out/ucfTrainTestlist_full`.
        verify: Compare the videos' SHA-256 with the manifest, not their sizes alone.

    Raises:
        UserError: An archive can't be unpacked, or what it holds is not UCF-101; `out` is then as it was.
    """
    videos, lists, full = out / "UCF-101", out / "ucfTrainTestlist", out / "ucfTrainTestlist_full"
    have_videos, have_lists = videos.is_dir(), lists.is_dir() or full.is_dir()
    if not archives and not (have_videos and have_lists):
        absent = " and ".join(str(place) for place, have in ((videos, have_videos), (lists, have_lists)) if not have)
        raise UserError(f"Expected archives to unpack, since {absent} is not there; give UCF-101's archives, or --out.")
    with _scratch(out) as scratch:
        findings: list[str] = []
        if not (have_videos and have_lists):
            findings += _unpack(archives, scratch, not have_videos, not have_lists)
        source = (full if full.is_dir() else lists) if have_lists else scratch / "lists"
        listed = _read_lists(source, archives)
        findings += _wrong_lists(listed)
        if not have_videos:
            findings += _arrange(scratch / "videos", scratch / "UCF-101", listed)
        present = _sizes(videos if have_videos else scratch / "UCF-101")
        findings += _wrong_videos(present, listed, partial)
        old = _read_manifest(out / MANIFEST)
        changed = sorted(name for name in present if name in old and present[name] != int(old[name]["bytes"]))
        findings += _some(changed, f"of another size than {MANIFEST} says")
        if findings:
            where = videos if have_videos else ", ".join(map(str, archives))
            advice = "Delete or complete what is wrong" if have_videos else "Fetch the archive again"
            raise UserError(
                f"{where}: expected UCF-101 with its {_VIDEOS:,} videos and official lists, but there are "
                f"{'; '.join(findings)}. {advice}{'' if partial else ', or accept fewer videos with --partial'}."
            )
        _place(scratch, out, source, listed, set(present))
    rows = _rows(videos, present, listed, old, verify)
    if rows != list(old.values()):
        _write_manifest(out / MANIFEST, rows)
    _summarize(out, rows, kept=have_videos, unread=archives if have_videos and have_lists else [])


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A hidden folder in `out` for this process alone. Those of dead processes of this machine are removed."""
    out.mkdir(parents=True, exist_ok=True)
    host = re.sub(r"\W", "_", socket.gethostname())
    for left in out.glob(_SCRATCH.format(host=host, pid="*")):
        if not _alive(int(left.name.removesuffix(".partial").rpartition("-")[2])):
            shutil.rmtree(left)
    folder = out / _SCRATCH.format(host=host, pid=os.getpid())
    folder.mkdir()
    try:
        yield folder
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{out}: expected space for UCF-101 (7 GB), the disk is full; free some.") from None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    if os.name == "nt":  # there os.kill would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# Unpacking


def _unpack(archives: Sequence[Path], scratch: Path, videos: bool, lists: bool) -> list[str]:
    """Take the videos and lists out of all archives, into `scratch/videos` and `scratch/lists`; tells what is wrong."""
    for folder in ("videos", "lists"):
        (scratch / folder).mkdir()
    strange: list[str] = []
    twice: list[str] = []
    with tqdm(desc="unpacking", unit=" videos", total=_VIDEOS if videos else None, disable=None) as bar:
        for archive in archives:
            try:
                for name, write in _members(archive, scratch, bar):
                    file = re.split(r"[/\\]", name)[-1]
                    if _VIDEO_FILE.fullmatch(file):
                        target = scratch / "videos" / file if videos else None
                    elif file in _LIST_FILES:
                        target = scratch / "lists" / file if lists else None
                    else:
                        target = None
                        if videos and file.lower().endswith(".avi") and not file.startswith("."):
                            strange.append(name)
                    if target is not None and target.exists():
                        twice.append(file)
                    elif target is not None:
                        write(target)
                        bar.update(target.parent.name == "videos")
            except _DAMAGE as error:
                raise UserError(
                    f"{archive}: expected a whole archive, it can't be unpacked ({error}); fetch it again, or unpack "
                    "it by other means and give the folder."
                ) from error
    return [*_some(strange, ".avi files with other names than UCF-101's"), *_some(twice, "files that come twice")]


def _members(archive: Path, scratch: Path, bar: Any) -> Iterator[Member]:
    """The regular files of an archive or a folder."""
    if archive.is_dir():
        yield from _files(archive, _link_or_copy)
        return
    try:
        with archive.open("rb") as file:
            head = file.read(7)
    except FileNotFoundError:
        raise UserError(f"Expected an archive or a folder at {archive}, there is none.") from None
    if head.startswith(b"Rar!\x1a\x07"):
        yield from _rar_members(archive, scratch, bar)
    elif head.startswith(b"PK") or zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                if not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16):
                    yield info.filename, functools.partial(_copy, functools.partial(opened.open, info), info.file_size)
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tar:
            for entry in tar:
                if entry.isreg():
                    yield entry.name, functools.partial(_copy, functools.partial(tar.extractfile, entry), entry.size)
    else:
        raise UserError(
            f"{archive}: expected a .rar, .zip or .tar archive, got a file that begins with {head!r}; fetch it again."
        )


def _files(folder: Path, write: Callable[[Path, Path], object], links: bool = True) -> Iterator[Member]:
    """Files under a folder; hidden ones are left out, among them the folder that is unpacked into."""

    for place, _, names in walk(folder, links):
        for name in names:
            path = place / name
            if path.is_file() and (links or not path.is_symlink()):
                yield path.as_posix(), functools.partial(write, path)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or a file system without hard links
        shutil.copyfile(source, target)


def _copy(open_file: Callable[[], IO[bytes] | None], size: int, target: Path) -> None:
    source = open_file()
    assert source is not None  # as tarfile gives for what is no regular file
    with source, target.open("wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)
    if target.stat().st_size != size:
        raise EOFError(f"{target.name} ends after {target.stat().st_size:,} of {size:,} bytes")


def _rar_members(archive: Path, scratch: Path, bar: Any) -> Iterator[Member]:
    """Stored files are read in Python, compressed ones by a program."""
    try:
        import rarfile
    except ImportError:
        raise UserError(
            f"{archive}: expected the package rarfile, which reads RAR archives, it is not installed; pip install "
            "rarfile, or unpack the archive by other means and give the folder."
        ) from None

    def write(info: Any, target: Path) -> None:
        try:
            _copy(functools.partial(opened.open, info), info.file_size, target)
        except rarfile.Error as error:
            raise EOFError(str(error)) from error

    try:
        with rarfile.RarFile(archive, errors="strict") as opened:  # by default a damaged header ends the list of files
            files = [info for info in opened.infolist() if info.is_file()]
            if all(info.compress_type == rarfile.RAR_M0 and not info.needs_password() for info in files):
                for info in files:
                    yield info.filename, functools.partial(write, info)
                return
            odd = [info.filename for info in opened.infolist() if _leads_outside(info)]
            if odd:
                raise UserError(f"{archive}: expected plain files, got links or paths that lead outside: {few(odd)}.")
    except rarfile.Error as error:
        raise EOFError(str(error) or type(error).__name__) from error
    folder = scratch / "rar"
    _run_rar_tool(archive, folder, bar)
    yield from _files(folder, os.replace, links=False)


def _leads_outside(info: Any) -> bool:
    path = PurePosixPath(info.filename)
    return info.is_symlink() or path.is_absolute() or ".." in path.parts or ":" in info.filename


def _run_rar_tool(archive: Path, folder: Path, bar: Any) -> None:
    failures = []
    for tool, arguments in _RAR_TOOLS.items():
        program = shutil.which(tool)
        if program is None:
            continue
        shutil.rmtree(folder, ignore_errors=True)  # what another tool has left there
        folder.mkdir()
        places = {"archive": str(archive.resolve()), "folder": str(folder.resolve())}
        command = [program, *(argument.format(**places) for argument in arguments)]
        with (folder.parent / "rar.log").open("w+b") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
            try:
                while process.poll() is None:
                    time.sleep(0.2)
                    bar.n = sum(len(names) for _, _, names in os.walk(folder))
                    bar.refresh()
            finally:
                process.kill()
                process.wait()
            bar.n = 0
            if process.returncode == 0:
                return
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines()
        failures.append(f"{tool} says: {said[-1] if said else f'exit code {process.returncode}'}")
    if failures:
        raise EOFError("; ".join(failures))
    raise UserError(
        f"{archive}: expected one of the programs {', '.join(_RAR_TOOLS)}, which unpack compressed RAR archives, found "
        "none; install one, or unpack the archive by other means and give the folder."
    )


# Checking


@dataclass(frozen=True)
class _Lists:
    """The official lists as they are.

    Attributes:
        lines: Those of each file, without line ends and empty lines.
        labels: Class → label, from 0.
        names: (split, "train" or "test") → names `CLASS/v_CLASS_g01_c01.avi`.
    """

    lines: dict[str, list[str]]
    labels: dict[str, int]
    names: dict[tuple[int, str], list[str]]

    def all_names(self) -> set[str]:
        return {name for names in self.names.values() for name in names}


def _read_lists(folder: Path, archives: Sequence[Path]) -> _Lists:
    absent = [file for file in _LIST_FILES if not (folder / file).is_file()]
    if absent:
        where = ", ".join(map(str, archives)) if archives and folder.name == "lists" else folder
        raise UserError(
            f"{where}: expected UCF-101's lists, {len(absent)} of {len(_LIST_FILES)} are absent ({few(absent)}); "
            "give UCF101TrainTestSplits-RecognitionTask.zip too."
        )
    lines = {
        file: [line for line in (folder / file).read_text(errors="replace").splitlines() if line.strip()]
        for file in _LIST_FILES
    }
    classes = (line.split() for line in lines["classInd.txt"])
    labels = {pair[1]: int(pair[0]) - 1 for pair in classes if len(pair) == 2 and pair[0].isdecimal()}
    names = {
        (split, kind): [line.split()[0] for line in lines[f"{kind}list{split:02d}.txt"]]
        for split in OFFICIAL
        for kind in _KINDS
    }
    return _Lists(lines, labels, names)


def _wrong_lists(lists: _Lists) -> list[str]:
    findings = []
    if sorted(lists.labels.values()) != list(range(_CLASSES)):
        findings.append(f"{len(lists.labels)} classes in classInd.txt instead of those numbered 1 to {_CLASSES}")
    everything = lists.all_names()
    unknown = sorted({name.split("/")[0] for name in everything} - set(lists.labels))
    findings += _some(unknown, "classes of the lists that classInd.txt lacks")
    findings += _some(sorted(n for n in everything if _group(n) is None), "names in the lists that are none of videos")
    for split, counts in OFFICIAL.items():
        train, test = (lists.names[split, kind] for kind in _KINDS)
        for kind, names, count in zip(_KINDS, (train, test), counts, strict=True):
            if len(names) != count:
                findings.append(f"{len(names):,} videos in {kind}list{split:02d}.txt instead of {count:,}")
        twice = sorted(name for name, times in Counter(train + test).items() if times > 1)
        findings += _some(twice, f"videos that split {split} lists twice")
        findings += _some(sorted(everything - {*train, *test}), f"videos that split {split} lacks")
        both = {_group(name) for name in train} & {_group(name) for name in test}
        findings += _some(
            sorted(f"{g[0]} g{g[1]:02d}" for g in both if g), f"groups in both train and test of split {split}"
        )
        wrong = [
            line
            for line in lists.lines[f"trainlist{split:02d}.txt"]
            if line.split()[1:] != [str(lists.labels.get(line.split("/")[0], -1) + 1)]
        ]
        findings += _some(wrong, f"lines of trainlist{split:02d}.txt with another label than classInd.txt's")
    return findings


def _arrange(flat: Path, root: Path, lists: _Lists) -> list[str]:
    """Move videos into the class folders that the lists say: of HandstandPushups no file name tells the folder."""
    places = {PurePosixPath(name).name: name for name in lists.all_names()}
    root.mkdir()
    for folder in {name.split("/")[0] for name in places.values()}:
        (root / folder).mkdir()
    extra = []
    for path in sorted(flat.iterdir()):
        if path.name in places:
            path.replace(root / places[path.name])
        else:
            extra.append(path.name)
    for place in root.iterdir():
        if not any(place.iterdir()):  # of a class that a partial copy lacks
            place.rmdir()
    return _some(extra, "videos that no list names")


def _sizes(root: Path) -> dict[str, int]:
    """The .avi files under a folder by their paths in it, in alphabetical order, with their sizes in bytes."""
    sizes = {}

    for place, _, files in walk(root):
        for file in files:
            if file.lower().endswith(".avi"):
                path = place / file
                sizes[path.relative_to(root).as_posix()] = path.stat().st_size if path.exists() else 0
    return dict(sorted(sizes.items()))


def _wrong_videos(sizes: dict[str, int], lists: _Lists, partial: bool) -> list[str]:
    listed = lists.all_names()
    findings = _some(sorted(listed - set(sizes)), "missing videos") if not partial or not sizes else []
    findings += _some(sorted(set(sizes) - listed), "videos that no list names")
    return findings + _some([name for name, size in sizes.items() if size == 0], "empty videos")


def _group(name: str) -> tuple[str, int] | None:
    """Class folder and number of the group of a video; None for other names."""
    folder, _, file = name.partition("/")
    match = _VIDEO_FILE.fullmatch(file)
    return (folder, int(match[1])) if match else None


# Writing


def _place(scratch: Path, out: Path, source: Path, lists: _Lists, present: set[str]) -> None:
    """Move what is new to its place: the lists first, without which a data module would make splits of its own."""
    target, full = out / "ucfTrainTestlist", out / "ucfTrainTestlist_full"
    cut = present != lists.all_names()
    wanted = {
        file: [line for line in lines if file == "classInd.txt" or line.split()[0] in present]
        for file, lines in lists.lines.items()
    }
    if cut and not full.is_dir():
        shutil.copytree(source, scratch / "full")
        os.replace(scratch / "full", full)
    if not target.is_dir() or _read_lists(target, ()).lines != wanted:
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
    """The rows of a manifest by path; none if there is no manifest."""
    if not path.is_file():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if reader.fieldnames != _COLUMNS or any(not (row["bytes"] or "").isdecimal() for row in rows):
        raise UserError(f"{path}: expected a table with the columns {', '.join(_COLUMNS)}; delete it to make it anew.")
    return {row["path"]: row for row in rows}


def _rows(
    root: Path, sizes: dict[str, int], lists: _Lists, old: dict[str, dict[str, str]], verify: bool
) -> list[dict[str, str]]:
    """The manifest's rows. SHA-256 is taken of videos that it lacks; with `verify` of all, which are compared."""
    sides = {(split, name): kind for (split, kind), names in lists.names.items() for name in names}
    rows: list[dict[str, str]] = []
    changed: list[str] = []
    for name in tqdm(sizes, desc="sha256", unit=" videos", disable=None):
        digest = _sha256(root / name) if verify or name not in old else old[name]["sha256"]
        if name in old and digest != old[name]["sha256"]:
            changed.append(name)
        group = _group(name)
        assert group is not None
        row = {"path": name, "label": str(lists.labels[group[0]]), "group": str(group[1])}
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
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


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


def _some(names: Sequence[str], what: str) -> list[str]:
    """A finding with its count and a few names; none if there are no names."""
    return [f"{len(names):,} {what} ({few(names)})"] if names else []
