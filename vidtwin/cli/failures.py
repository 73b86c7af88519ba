"""Explain errors that a user can fix in one line. Import nothing heavy.

Torch and its process groups raise plain `RuntimeError`, which only their wording distinguishes from a bug.
"""

import codecs
import errno
import locale
import os
import re
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from vidtwin import files
from vidtwin.errors import UserError, causes

_WORKER = re.compile(
    r"DataLoader worker \(pid.*?\) (?:is killed by signal: [^.]*|exited unexpectedly)|DataLoader timed out"
)
_SHARED_FILE = re.compile(r"[^.]*</torch_[^>]*>[^()]*\((\d+)\)")  # the system's error stands in brackets
_BUS_ERROR = re.compile(r"[^.]*workers are out of shared memory[^.]*")
_HANDLES = re.compile(r"received \d+ items of ancdata|too many open files", re.IGNORECASE)
_LOST = re.compile(
    r"connection (?:was likely )?(?:closed|reset)|broken pipe|remote process|ncclRemoteError", re.IGNORECASE
)
_LATE = re.compile(r"timed out|timeout", re.IGNORECASE)
_OF_GLOO = re.compile(r"gloo|application timeout caused pair closure", re.IGNORECASE)
_ERRNO = re.compile(r"\[Errno (\d+)\] .*?(?:: '(.*)')?$")
_PATIENCE = 2.0  # seconds until the system has noticed the end of a process that closed its connections


def explain(error: BaseException, command: str = "") -> str | None:
    """Return one line for an error that a user can fix; None for a bug, which keeps its traceback.

    Args:
        error: That ended a command.
        command: Its name, by which the line says how to continue.
    """
    if isinstance(error, UserError):
        return _join(_last_line(str(error)))
    try:
        return _explain(error, command)
    except RuntimeError as noticed:  # torch's handler of the signal that a child has ended, at any moment
        return _explain(noticed, command)


def _explain(error: BaseException, command: str) -> str | None:
    for cause in causes(error):
        if line := _explain_worker(cause, command):
            return line
    for cause in causes(error):
        if line := _explain_exchange(cause, command):
            return line
        if isinstance(cause, UnicodeEncodeError | UnicodeDecodeError) and _is_of_locale(cause.encoding):
            letters = ascii(cause.object[cause.start : cause.end])
            return (
                f"Expected a locale that has the letters of all names and configs, got the encoding "
                f"{cause.encoding}, which lacks {letters}; set LC_ALL=C.UTF-8, or PYTHONUTF8=1."
            )
    if isinstance(error, OSError) and error.errno is None and (found := _ERRNO.search(_last_line(str(error)))):
        error = OSError(int(found[1]), os.strerror(int(found[1])), found[2])  # came from a data loader's worker
    return files.explain(error)


def _explain_worker(error: BaseException, command: str) -> str | None:
    """Explain the end of a process that a data loader had started, or the memory that it shares."""
    found: str | None = None
    if isinstance(error, RuntimeError):
        text = str(error)
        shared = _SHARED_FILE.search(text)
        code = int(shared[1]) if shared else errno.EMFILE if _HANDLES.search(text) else None
        if full := shared if code in files.NO_ROOM else _BUS_ERROR.search(text):
            return (
                f"Expected shared memory for the data's processes, got {_join(full[0])!r}; give the machine more "
                "(docker run --shm-size 8g), or lower data.num_workers: 0 needs none."
            )
        if code == errno.ENOMEM and shared:
            return (
                f"Expected memory for the data's processes, got {_join(shared[0])!r}; lower data.num_workers or "
                "data.batch_size."
            )
        if code is not None:
            return files.explain(OSError(code, os.strerror(code)))
        worker = _WORKER.search(text)
        found = worker and repr(_join(worker[0]))
    elif isinstance(error, ConnectionError | EOFError | FileNotFoundError) and _is_of_loader(error):
        found = _find_ended_child()  # in the middle of handing over a batch
    if found is None:
        return None
    return (
        f"Expected the data's processes to live, got {found}; the system kills for lack of memory: lower "
        f"data.num_workers or data.batch_size, and {_continuation(command)}."
    )


def _is_of_loader(error: BaseException) -> bool:
    """Return whether an error comes from the exchange between a data loader and its workers."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return "torch.utils.data.dataloader" in modules and modules[-1].startswith("multiprocessing.")


def _explain_exchange(error: BaseException, command: str) -> str | None:
    """Explain an error of the exchange between processes."""
    text, distributed = str(error), getattr(sys.modules.get("torch"), "distributed", None)
    first = _join(text.strip().partition("\n")[0])
    meets = isinstance(error, tuple(getattr(distributed, name, ()) for name in ("DistNetworkError", "DistStoreError")))
    if not isinstance(error, getattr(distributed, "DistError", ())) and not (
        isinstance(error, RuntimeError) and _OF_GLOO.search(text)
    ):
        return None
    lost, late = _LOST.search(text), _LATE.search(text)
    ended = _find_ended_child() if lost or late else None
    if lost or ended:
        return (
            f"Expected all processes to live, got {ended or f'a lost one: {first}'}; its own message says why. Without "
            "one the system has killed it, mostly for lack of memory: lower data.batch_size or data.num_workers, and "
            f"{_continuation(command)}."
        )
    if meets:
        return (
            f"Expected processes that reach one another, got {first!r}; check MASTER_ADDR and MASTER_PORT, and that "
            "all processes of WORLD_SIZE have started."
        )
    if late:
        return (
            f"Expected all processes to answer, got {first!r}; one of them hangs or has ended, which its own "
            f"messages or `py-spy dump --pid PID` show; then {_continuation(command)}."
        )
    return None


def _continuation(command: str) -> str:
    return "continue by --resume auto" if command == "fit" else "run the command again"


def _find_ended_child() -> str | None:
    """Describe a child of this process that has failed, if there is one; it stays for its owner to wait for."""
    if not hasattr(os, "waitid"):  # macOS before Python 3.13, Windows
        return None
    until = time.monotonic() + _PATIENCE
    while True:
        for kind, process in _children():
            with suppress(ChildProcessError):
                child = os.waitid(kind, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if child is None or not child.si_pid:
                    continue
                if child.si_code != os.CLD_EXITED:
                    return f"process {child.si_pid} ended by {signal.Signals(child.si_status).name}"
                if child.si_status:
                    return f"process {child.si_pid} ended with exit code {child.si_status}"
        if time.monotonic() > until:
            return None
        time.sleep(0.05)


def _children() -> list[tuple[int, int]]:
    """Return the children of this process, as `os.waitid` names them; where the system lists none, any of them."""
    lists = list(Path("/proc/self/task").glob("*/children"))
    return [(os.P_PID, int(word)) for path in lists for word in path.read_text().split()] if lists else [(os.P_ALL, 0)]


def _is_of_locale(encoding: str) -> bool:
    """Return whether an error's encoding is the locale's and lacks letters, rather than one that code has named."""
    mine = {codecs.lookup(name).name for name in (locale.getpreferredencoding(False), sys.getfilesystemencoding())}
    if encoding == "charmap":  # Python's name for all that have a table of 256 letters
        return bool(mine - {"utf-8", "ascii", "iso8859-1"})
    return codecs.lookup(encoding).name in mine - {"utf-8"}


def _last_line(text: str) -> str:
    """Return the message of an error from a data loader's worker, which comes back with the worker's traceback."""
    if "Original Traceback" in text:
        return text.strip().splitlines()[-1].partition(": ")[2] or text
    return text


def _join(text: str) -> str:
    return " ".join(text.split())
