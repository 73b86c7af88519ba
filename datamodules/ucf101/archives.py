"""Take UCF-101's videos and lists out of archives.

Paths in an archive are not followed: regular files with the names of UCF-101's videos and lists are taken, and these
names alone decide where they go.
"""

import gzip
import lzma
import os
import re
import shutil
import stat
import subprocess
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from vidtwin.errors import UserError, few
from vidtwin.files import inside
from vidtwin.listing import walk

from .lists import FILES, OFFICIAL, VIDEO_FILE, describe_names

_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,  # of zipfile: encrypted, or compressed by an unknown method
)
# Programs that unpack a whole RAR archive, the most able first. One run takes out all files: rarfile would start the
# program once per file, which reads a solid block anew from its beginning each time.
_RAR_TOOLS = {
    "unrar": ["x", "-y", "-idq", "{archive}", "{folder}/"],
    "unar": ["-quiet", "-force-overwrite", "-no-directory", "-output-directory", "{folder}", "{archive}"],
    "7zz": ["x", "-y", "-o{folder}", "{archive}"],
    "7z": ["x", "-y", "-o{folder}", "{archive}"],
    "bsdtar": ["-x", "-f", "{archive}", "-C", "{folder}"],
}

Member = tuple[str, Callable[[Path], object]]  # a file's path in an archive, and a function that writes it to disk


def unpack(archives: Sequence[Path], scratch: Path, videos: bool, lists: bool) -> list[str]:
    """Take videos and lists out of all archives into `scratch/videos` and `scratch/lists`; return the problems."""
    for folder in ("videos", "lists"):
        (scratch / folder).mkdir()
    strange: list[str] = []
    twice: list[str] = []
    total = sum(OFFICIAL[1]) if videos else None
    with tqdm(desc="unpacking", unit=" videos", total=total, disable=None) as bar:
        for archive in archives:
            try:
                for name, write in _members(archive, scratch, bar):
                    file = re.split(r"[/\\]", name)[-1]
                    target = None
                    if VIDEO_FILE.fullmatch(file):
                        target = inside(scratch / "videos", file) if videos else None
                    elif file in FILES:
                        target = inside(scratch / "lists", file) if lists else None
                    elif videos and file.lower().endswith(".avi") and not file.startswith("."):
                        strange.append(name)
                    if target is not None and target.exists():
                        twice.append(file)
                    elif target is not None:
                        write(target)
                        bar.update(target.parent.name == "videos")
            except _DAMAGE as error:
                raise UserError(
                    f"{archive}: expected an intact archive, got one that can't be unpacked ({error}); fetch it "
                    "again, or unpack it by other means and give the folder."
                ) from error
    return [
        *describe_names(strange, ".avi files with other names than UCF-101's"),
        *describe_names(twice, "files that come twice"),
    ]


def _members(archive: Path, scratch: Path, bar: Any) -> Iterator[Member]:
    """Yield the regular files of an archive or a folder."""
    if archive.is_dir():
        yield from _files(archive, _link_or_copy)
        return
    try:
        with archive.open("rb") as file:
            head = file.read(7)
    except FileNotFoundError:
        raise UserError(f"Expected an archive or a folder at {archive}, got none.") from None
    if head.startswith(b"Rar!\x1a\x07"):
        yield from _rar_members(archive, scratch, bar)
    elif head.startswith(b"PK") or zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                if not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16):
                    yield info.filename, partial(_copy, partial(opened.open, info))
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tar:
            for entry in tar:
                if entry.isreg():
                    yield entry.name, partial(_copy, partial(tar.extractfile, entry))
    else:
        raise UserError(
            f"{archive}: expected a .rar, .zip or .tar archive, got a file that begins with {head!r}; fetch it again."
        )


def _files(folder: Path, write: Callable[[Path, Path], object], links: bool = True) -> Iterator[Member]:
    """Yield the files under a folder except hidden ones, such as the folder that is unpacked into."""
    for place, _, names in walk(folder, links):
        for name in names:
            path = place / name
            if path.is_file() and (links or not path.is_symlink()):
                yield path.as_posix(), partial(write, path)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or a file system without hard links
        shutil.copyfile(source, target)


def _copy(open_file: Callable[[], IO[bytes] | None], target: Path) -> None:
    """Write a member; zipfile, tarfile and rarfile raise if it is cut off, and all but tar check a CRC."""
    source = open_file()
    assert source is not None  # as tarfile returns for other than regular files
    with source, target.open("wb") as file:
        shutil.copyfileobj(source, file, 1 << 20)


def _rar_members(archive: Path, scratch: Path, bar: Any) -> Iterator[Member]:
    """Yield stored files by Python, compressed ones by a program."""
    import rarfile

    def write(info: Any, target: Path) -> None:
        try:
            _copy(partial(opened.open, info), target)
        except rarfile.Error as error:
            raise EOFError(str(error)) from error

    try:
        with rarfile.RarFile(archive, errors="strict") as opened:  # by default a damaged header ends the list of files
            files = [info for info in opened.infolist() if info.is_file()]
            if all(info.compress_type == rarfile.RAR_M0 and not info.needs_password() for info in files):
                for info in files:
                    yield info.filename, partial(write, info)
                return
            odd = [info.filename for info in opened.infolist() if _leads_outside(info, scratch / "rar")]
            if odd:
                raise UserError(f"{archive}: expected plain files, got links or paths that lead outside: {few(odd)}.")
    except rarfile.Error as error:
        raise EOFError(str(error) or type(error).__name__) from error
    folder = scratch / "rar"
    _run_rar_tool(archive, folder, bar)
    yield from _files(folder, os.replace, links=False)


def _leads_outside(info: Any, folder: Path) -> bool:
    """Return whether a member is a link of any kind, or has a name that an unpacking program may take elsewhere."""
    try:
        inside(folder, info.filename)
    except UserError:
        return True
    return info.is_symlink() or getattr(info, "file_redir", None) is not None or ":" in info.filename


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
