"""Write files atomically (beside the target, flushed to disk, then moved over it), and keep foreign names inside.

`explain` says in one line why the system refused a file, if a user can fix it.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vidtwin.errors import UserError, causes

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a quota, a limit
_MARK = ".~vidtwin-"  # begins the names of temporary files, and of no hidden file of a user
_TEMPORARY = re.compile(rf"{re.escape(_MARK)}[a-z0-9_]{{8}}-(.+)", re.DOTALL)  # mkstemp's alphabet
_UNMARKED = re.compile(r"\.(.+)-[a-z0-9_]{8}(\.\w+)")  # of earlier versions
_LONGEST, _LONGEST_PATH = 255, 2000  # bytes of a part of a path, and of a whole foreign one
_LONGEST_SUFFIX = 32  # bytes; formats have shorter ones
_ADDED = len(f"{_MARK}12345678-")
_FOREIGN_ERROR = re.compile(r"\bos error (\d+)")
_ABANDONED = 3600  # seconds without a change, on a file system without locks
# Expected thing and advice by the system's error; a thing is formatted with the file's path.
_PERMISSION = ("permission for {}", "correct it, or name another path")
_PATH = ("a path that can be used, not {}", "name another")
_DISK = ("a disk that can be read and written at {}", "check it")
_HANDLES = ("fewer open files", "raise the limit by `ulimit -n`, or lower data.num_workers")
_REFUSALS = {
    **dict.fromkeys(NO_ROOM, ("room to write {}", "free space, or name another disk")),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _PERMISSION),
    **dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP), _PATH),
    errno.ENAMETOOLONG: ("a name that the file system takes, not {}", "shorten it"),
    **dict.fromkeys((errno.EIO, errno.ENODEV, errno.ENXIO, errno.ESTALE), _DISK),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), _HANDLES),
}
_ALSO_UNNAMED = (*NO_ROOM, errno.EMFILE, errno.ENFILE)


def no_room(error: BaseException | None) -> str | None:
    """Return the system's reason if a full disk, a quota or a limit caused an error, also below errors of libraries."""
    code = _find_no_room(error)
    return None if code is None else os.strerror(code)


def _find_no_room(error: BaseException | None) -> int | None:
    for cause in causes(error, contexts=True):
        if isinstance(cause, OSError) and cause.errno in NO_ROOM:
            return cause.errno
        # safetensors' errors have no OSError behind them.
        if (match := _FOREIGN_ERROR.search(str(cause))) and int(match[1]) in NO_ROOM:
            return int(match[1])
    return None


def explain(error: BaseException | None) -> str | None:
    """Return one line for the system's refusal of a file if it caused an error; None for other errors.

    Such as a folder that is read-only, or a full disk. A missing file is not among them: its reader checks for it.
    """
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno in _REFUSALS and (cause.filename or cause.errno in _ALSO_UNNAMED):
            wanted, advice = _REFUSALS[cause.errno]
            path = Path(os.fsdecode(cause.filename)) if isinstance(cause.filename, str | bytes | os.PathLike) else None
            if path is not None and (name := intended_name(path)):
                path = path.with_name(name)
            return f"Expected {wanted.format(path or 'a file')}, got {cause.strerror!r}; {advice}."
    return None


def inside(folder: str | Path, name: str) -> Path:
    """Return the path `folder/name` if it stays in the folder, be it there or not.

    Every path that is made of text from a file of others (a manifest, a list, an archive) comes from here.

    Args:
        folder: May itself be a link.
        name: Relative path with slashes.

    Raises:
        UserError: The name is not such a path, or leads out of the folder, be it by a symbolic link.
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
    and after a kill when the same file is written again. The system's errors, also of a full disk, name `path`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    handle, temporary = _make_temporary(path)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # mkstemp gives 0o600
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    except Exception as error:
        _name_target(error, path)
        code = _find_no_room(error)
        if code is None or isinstance(error, UserError) or (isinstance(error, OSError) and error.filename):
            raise  # it names its file
        raise OSError(code, os.strerror(code), str(path)) from error  # the system names no file that it can't extend
    finally:
        try:
            temporary.unlink(missing_ok=True)
        finally:
            if fcntl is not None:
                os.close(handle)


def parse_json(text: str | bytes) -> Any:
    """Parse JSON of a file that may come from anywhere; raise `ValueError` for any that can't be parsed."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _make_temporary(path: Path) -> tuple[int, Path]:
    """Make a locked temporary file beside `path` → its handle (on Windows closed) and path."""
    while True:
        try:
            handle, name = tempfile.mkstemp(prefix=_MARK, suffix=f"-{_shorten(path.name)}", dir=path.parent)
        except OSError as error:
            _name_target(error, path)
            raise
        if fcntl is None:
            os.close(handle)  # Windows moves no open file
            return handle, Path(name)
        _lock(handle, wait=True)  # by which `remove_leftovers` knows that it is in use
        if os.fstat(handle).st_nlink:
            return handle, Path(name)
        os.close(handle)  # another process took it for a leftover before it was locked


def _name_target(error: BaseException | None, path: Path) -> None:
    """Replace the name of the temporary file, which a user does not know, by `path` in an error and its causes."""
    while error is not None:
        name = error.filename if isinstance(error, OSError) else None
        if isinstance(name, str | bytes | os.PathLike) and intended_name(Path(os.fsdecode(name))):
            with suppress(AttributeError):  # PyAV's errors can't be changed
                error.filename = str(path)  # type: ignore[attr-defined]
        error = error.__cause__


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def link(path: Path, target: Path) -> None:
    """Make `path` a relative symbolic link to `target` in the same folder, in one move over an earlier `path`."""
    temporary = path.with_name(f"{_MARK}{secrets.token_hex(4)}-{_shorten(path.name)}")
    try:
        temporary.symlink_to(target.name)
    except OSError:  # a file system without links, such as a mounted cloud drive
        with replacing(path) as copy:
            shutil.copyfile(target, copy)
        return
    try:
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        _name_target(error, path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def intended_name(path: Path, unmarked: bool = False) -> str | None:
    """Return the name of the file that a temporary file was to become, cut if it is long; None for any other file.

    Args:
        path: Path of the temporary file.
        unmarked: Accept a name of earlier versions too, such as `.a-12345678.mp4`, which a user's file may also have.
    """
    if match := _TEMPORARY.fullmatch(path.name):
        return match[1]
    match = _UNMARKED.fullmatch(path.name) if unmarked else None
    return match[1] + match[2] if match else None


def _shorten(name: str) -> str:
    """Cut a name whose temporary one would be longer than the file system takes; a digest keeps it unique."""
    encoded, room = os.fsencode(name), _LONGEST - _ADDED
    if len(encoded) <= room:
        return name
    suffix = Path(name).suffix
    if len(os.fsencode(suffix)) > _LONGEST_SUFFIX:
        suffix = ""
    end = f"~{hashlib.sha256(encoded).hexdigest()[:8]}{suffix}"
    return encoded[: room - len(os.fsencode(end))].decode(errors="ignore") + end


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files that killed processes left in a folder, of the file `name` or of all its files.

    Files that a living process is writing stay. Those of earlier versions are removed if `name` is given.
    """
    wanted = None if name is None else _shorten(name)
    for path in folder.glob(".*-*"):
        target = intended_name(path, unmarked=name is not None)
        if target is not None and wanted in (None, target):
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
