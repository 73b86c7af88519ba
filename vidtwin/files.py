"""Write files atomically (beside the target, flushed to disk, then moved over it), and keep foreign names inside."""

import errno
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vidtwin.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a quota, a limit
_TEMPORARY = re.compile(r"\.(.+)-[a-z0-9_]{8}(\.\w+)")  # mkstemp's alphabet
# Bytes of a part of a foreign path, of which file systems take 255 and `replacing` adds 10, and of a whole one.
_LONGEST, _LONGEST_PATH = 240, 2000
_ABANDONED = 3600  # seconds without a change, on a file system without locks


def no_room(error: BaseException | None) -> str | None:
    """Return the system's reason if a full disk, a quota or a limit caused an error, also below errors of libraries."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return error.strerror
        if "os error 28" in str(error):  # safetensors', which has no OSError behind it
            return os.strerror(errno.ENOSPC)
        error = error.__cause__ or error.__context__
    return None


def inside(folder: str | Path, name: str) -> Path:
    """Return the path `folder/name` if it stays in the folder, be it there or not.

    Every path that is made of text from a file of others (a manifest, a list, an archive) comes from here.

    Args:
        folder: May itself be a link.
        name: Relative path with slashes.

    Raises:
        UserError: The name is no such path, or leads out of the folder, be it by a symbolic link.
    """
    path, fault = Path(folder), None
    try:
        path /= name
        parts = name.split("/")
        if "\0" in name or "\\" in name:
            fault = "it holds a NUL or a backslash"
        elif ".." in parts or Path(name).anchor:
            fault = "it is absolute or leads upwards"
        elif not set(parts) - {"", "."}:
            fault = "it is empty"
        elif max(len(part.encode()) for part in parts) > _LONGEST or len(name.encode()) > _LONGEST_PATH:
            fault = "it is too long"
        elif not path.resolve().is_relative_to(Path(folder).resolve()):
            fault = "a symbolic link leads out"
    except UnicodeEncodeError:
        fault = "it is not UTF-8"
    except (TypeError, AttributeError):
        fault = "it is not a string"
    except (OSError, RuntimeError) as error:  # such as links in a circle
        fault = str(error)
    if fault:
        raise UserError(
            f"Expected a name that stays inside {folder}, got {ascii(name)[:100]}: {fault}; correct the file that "
            "holds it."
        )
    return path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` (same suffix) that becomes `path` if the block ends without an error.

    A kill or a power failure at any moment leaves the previous file, or none. The temporary one is removed on an error,
    and after a kill when the same file is written again.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
        if fcntl is None:
            os.close(handle)  # Windows moves no open file
            break
        _lock(handle, wait=True)  # by which `remove_leftovers` knows that it is in use
        if os.fstat(handle).st_nlink:
            break
        os.close(handle)  # another process took it for a leftover before it was locked
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp gives 0o600
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    finally:
        try:
            temporary.unlink(missing_ok=True)
        finally:
            if fcntl is not None:
                os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def link(path: Path, target: Path) -> None:
    """Make `path` a relative symbolic link to `target` in the same folder, in one move over an earlier `path`."""
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        temporary.symlink_to(target.name)
    except OSError:  # a file system without links, such as a mounted cloud drive
        with replacing(path) as copy:
            shutil.copyfile(target, copy)
        return
    try:
        temporary.replace(path)
        _flush_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def intended_name(path: Path) -> str | None:
    """Return the name of the file that a temporary file was to become; None for any other file."""
    match = _TEMPORARY.fullmatch(path.name)
    return match[1] + match[2] if match else None


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files that killed processes left in a folder, of the file `name` or of all its files.

    Files that a living process is writing stay.
    """
    for path in folder.glob(".*-*"):
        target = intended_name(path)
        if target is not None and name in (None, target):
            with suppress(OSError), path.open("rb+") as file:  # in use, or moved or removed meanwhile
                if _lock(file.fileno(), wait=False) or time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink()  # under the lock: a process that has just made the file waits for it


def _lock(handle: int, wait: bool) -> bool:
    """Lock an open file → False on a file system without locks; without `wait`, `BlockingIOError` if it is locked."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _flush_folder(folder: Path) -> None:
    """Flush a folder to disk, or a power failure may undo the move."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems flush no folders
            raise
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
