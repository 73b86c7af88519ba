"""Folders of numbered units of work that a killed run continues.

A unit is a file that is written atomically (`vidtwin.files.replacing`) and verified before it is kept. One writer at a
time holds the folder's lock. Its manifest, if it has one, is written last.
"""

import errno
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from filelock import FileLock, Timeout

from vidtwin.console import log, log_once
from vidtwin.errors import UserError
from vidtwin.files import inside, parse_json, remove_leftovers

if TYPE_CHECKING:
    from lightning.fabric import Fabric

Unit = TypeVar("Unit")
_MOMENT = 0.5  # seconds
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Resumable(Generic[Unit]):
    """Numbered units in a folder.

    Args:
        folder: Folder of the units.
        name: Name of a unit's file with a field for its number, such as "shard-{:05d}.safetensors".
        read: Read and verify unit `number` from its existing file `path`. It raises `UserError` for an invalid file,
            which is made again, and returns None for one of another identity, which is replaced.
        kind: Name of the units together in messages, such as "latents".
        manifest: Name of the manifest, if there is one.
    """

    folder: Path
    name: str
    read: Callable[[int, Path], Unit | None]
    kind: str = "units"
    manifest: str | None = None

    def path(self, number: int) -> Path:
        """Return the path of a unit."""
        return self.folder / self.name.format(number)

    def get(self, number: int) -> Unit | None:
        """Return a unit; None if it is missing, of another identity, or invalid; log the last case."""
        path = self.path(number)
        if not path.exists():
            return None
        try:
            return self.read(number, path)
        except UserError as error:
            log(f"{error} It is made again.")
            path.unlink(missing_ok=True)
            return None

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Return those of `numbers` that are still to be made."""
        return [number for number in numbers if self.get(number) is None]

    def begin(self, difference: Callable[[], str | None], advice: str, overwrite: bool = False) -> bool:
        """Claim the folder for the units of one identity, under its lock → whether an earlier run has begun it.

        Args:
            difference: Compare the identity of the earlier run to this one's → what it has and this one has not, in
                words; None if they are the same. Called only if there was an earlier run.
            advice: What to do with a folder of another identity.
            overwrite: Remove the manifest and the units of an earlier run, whatever its identity.

        Raises:
            UserError: The folder belongs to another identity, or holds other files.
        """
        begun = any(self._files())
        if begun and overwrite:
            for path in list(self._files()):
                path.unlink()
        elif begun and (found := difference()):
            raise UserError(f"Expected {self.folder} to hold the {self.kind} of this command, got {found}; {advice}.")
        if not begun and any(not path.name.startswith(".") for path in self.folder.iterdir()):
            raise UserError(
                f"Expected an empty folder or one of {self.kind}, got {self.folder} with other files; give another."
            )
        remove_leftovers(self.folder)
        return begun

    def _files(self) -> Iterator[Path]:
        if self.manifest is not None and (self.folder / self.manifest).exists():
            yield self.folder / self.manifest
        yield from sorted(self.folder.glob(re.sub(r"\{.*\}", "[0-9]*", self.name)))


def read_json(path: Path, **expected: Any) -> dict[str, Any] | None:
    """Read a JSON object; return None if the file is missing or one of its values is not the `expected` one.

    Raises:
        UserError: The file is truncated or damaged.
    """
    try:
        content: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        same = all(content[key] == value for key, value in expected.items())
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: expected a whole JSON file, got one that is truncated or damaged.") from None
    return content if same else None


@contextmanager
def lock(folder: Path, writer: str, fabric: "Fabric | None" = None, wait: bool = False) -> Iterator[None]:
    """Let one writer (all its processes) into a folder at a time; the lock ends with the process.

    Args:
        folder: Made if it is missing.
        writer: Name of the work in messages, such as "sweep".
        fabric: Processes of the writer; the first one locks for all.
        wait: Wait for another writer to end; a wait of more than a moment is logged.

    Raises:
        UserError: Another writer holds the lock (without `wait`), or the folder is a file or may not be written.
    """
    held, refused = FileLock(inside(folder, ".lock")), None
    try:
        if fabric is None or fabric.is_global_zero:
            refused = _acquire(held, folder, writer, wait)
        if fabric is not None:
            refused = fabric.broadcast(refused)
        if refused is not None:
            raise UserError(refused)
        yield
    finally:
        held.release()


@contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Run the block in one process at a time by a lock on the file `path`, created in an existing folder.

    Raises:
        UserError: The file may not be written.
    """
    held = FileLock(path)
    try:
        if refused := _take(held, path, "process"):
            raise UserError(refused)
        yield
    finally:
        held.release()


def _acquire(held: FileLock, folder: Path, writer: str, wait: bool) -> str | None:
    """Acquire a folder's lock; return the reason on failure."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        return f"Expected a folder for this {writer}, got {folder}, which is a file or inside one; give another."
    except OSError as error:
        if error.errno not in _FORBIDDEN:
            raise
        return f"Expected to make the folder {folder} for this {writer}, got {error.strerror!r}; give another."
    path = Path(held.lock_file)
    try:
        return _take(held, path, writer, timeout=_MOMENT if wait else 0)
    except Timeout:
        if not wait:
            return f"Expected {folder} for this {writer} alone, got another one writing to it; wait for its end."
    log(f"{folder}: waiting for the end of another {writer} that writes to it")
    return _take(held, path, writer)


def _take(held: FileLock, path: Path, writer: str, timeout: float = -1) -> str | None:
    """Acquire a lock; return the reason if its file can't be written. Log a file system without locks and continue.

    Raises:
        Timeout: Another process holds it.
    """
    try:
        held.acquire(timeout=timeout)
    except Timeout:
        raise
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno in _FORBIDDEN:
            return (
                f"Expected to write {path}, by which one {writer} at a time works in {path.parent}, got "
                f"{error.strerror!r}; change its permissions, or give another folder."
            )
        reason = getattr(error, "strerror", None) or "a file system without locks"
        log_once(f"{path.parent} can't be locked ({reason}); run one {writer} at a time in it")
    return None
