"""Explain errors that a user can fix in one line. Import nothing heavy.

Torch and its process groups raise plain `RuntimeError`, which only their wording distinguishes from a bug.
"""

import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator

from vidtwin import files
from vidtwin.errors import UserError

_WORKER = re.compile(
    r"DataLoader worker \(pid.*?\) (?:is killed by signal: [^.]*|exited unexpectedly)|DataLoader timed out"
)
_SHARED_MEMORY = re.compile(r"[^.]*(?:out of shared memory|shared memory limit|</torch_)[^.]*", re.IGNORECASE)
_LOST = re.compile(r"connection (?:closed|reset)|broken pipe|remote process|ncclRemoteError|timed out", re.IGNORECASE)
_ERRNO = re.compile(r"\[Errno (\d+)\] .*?(?:: '(.*)')?$")
_LOCALES = ("ascii", "latin-1", "charmap")  # encodings, by Python's names, that locales have beside UTF-8
_PATIENCE = 2.0  # seconds until the system has noticed the end of a process that closed its connections


def explain(error: BaseException) -> str | None:
    """Return one line for an error that a user can fix; None for a bug, which keeps its traceback."""
    if isinstance(error, UserError):
        return _join(_last_line(str(error)))
    for cause in _causes(error):
        if line := _explain_worker(cause):
            return line
    for cause in _causes(error):
        if line := _explain_exchange(cause):
            return line
        if isinstance(cause, UnicodeEncodeError | UnicodeDecodeError) and cause.encoding.lower() in _LOCALES:
            letters = ascii(cause.object[cause.start : cause.end])
            return (
                f"Expected a locale that has the letters of all names and configs, got the encoding "
                f"{cause.encoding}, which lacks {letters}; set LC_ALL=C.UTF-8, or PYTHONUTF8=1."
            )
    if isinstance(error, OSError) and error.errno is None and (found := _ERRNO.search(_last_line(str(error)))):
        error = OSError(int(found[1]), os.strerror(int(found[1])), found[2])  # came from a data loader's worker
    return files.explain(error)


def _explain_worker(error: BaseException) -> str | None:
    """Explain the end of a process that a data loader had started."""
    found: str | None = None
    if isinstance(error, RuntimeError):
        if memory := _SHARED_MEMORY.search(str(error)):
            return (
                f"Expected shared memory for the data's processes, got {_join(memory[0])!r}; give the machine more "
                "(docker run --shm-size 8g), or lower data.num_workers: 0 needs none."
            )
        worker = _WORKER.search(str(error))
        found = worker and repr(_join(worker[0]))
    elif isinstance(error, ConnectionError | EOFError | FileNotFoundError) and _is_of_loader(error):
        try:
            found = _find_ended_child()  # in the middle of handing over a batch
        except RuntimeError as noticed:  # torch's handler of the signal that a child has ended
            return _explain_worker(noticed)
    if found is None:
        return None
    return (
        f"Expected the data's processes to live, got {found}; the system kills for lack of memory: lower "
        "data.num_workers or data.batch_size, and continue a training by --resume auto."
    )


def _is_of_loader(error: BaseException) -> bool:
    """Return whether an error comes from the exchange between a data loader and its workers."""
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return "torch.utils.data.dataloader" in modules and modules[-1].startswith("multiprocessing.")


def _explain_exchange(error: BaseException) -> str | None:
    """Explain an error of the exchange between processes."""
    text, distributed = str(error), getattr(sys.modules.get("torch"), "distributed", None)
    first = _join(text.strip().partition("\n")[0])
    ours = isinstance(error, getattr(distributed, "DistError", ())) or (
        isinstance(error, RuntimeError) and "gloo" in text.lower()
    )
    if ours and _LOST.search(text):
        found = _find_ended_child() or f"a lost one: {first}"
        return (
            f"Expected all processes to live, got {found}; its own message says why. Without one the system has killed "
            "it, mostly for lack of memory: lower data.batch_size or data.num_workers, and continue a training by "
            "--resume auto."
        )
    if isinstance(error, getattr(distributed, "DistNetworkError", ())):
        return f"Expected processes that reach one another, got {first}; check MASTER_ADDR and MASTER_PORT."
    return None


def _find_ended_child() -> str | None:
    """Describe a child of this process that has ended, if there is one; it stays for its owner to wait for."""
    if not hasattr(os, "waitid"):  # macOS before Python 3.13, Windows
        return None
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            child = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return None
        if child is not None and child.si_pid:
            if child.si_code == os.CLD_EXITED:
                return f"process {child.si_pid} ended with exit code {child.si_status}"
            return f"process {child.si_pid} ended by {signal.Signals(child.si_status).name}"
        if time.monotonic() > until:
            return None
        time.sleep(0.05)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _last_line(text: str) -> str:
    """Return the message of an error from a data loader's worker, which comes back with the worker's traceback."""
    if "Original Traceback" in text:
        return text.strip().splitlines()[-1].partition(": ")[2] or text
    return text


def _join(text: str) -> str:
    return " ".join(text.split())
